// paged_attention for 17 to 64 query rows a KV head (speculative decode, wide groups) over an FP8 cache, on sm_90a: products of
// a warpgroup (wgmma).
//
// The limit is reading K and V once, as for the decode kernel of fewer rows (ops/paged_attention_decode.h), and products are
// turned the same way, so that codes become the operand that comes from registers: each is widened to f16 once, by the thread
// that multiplies it, and never stored.
//
//   S   = K Q^T        [64 tokens, rows]           Q from shared memory
//   O^T += V^T P^T     [64 channels, rows] x 2     P from shared memory, which all four warps have written
//
// A block is one warpgroup; a tile is 64 tokens of a KV head, of which a warp loads 16 of K and of V. Lane 4g + t has
//   K   of its warp's tokens g and g + 8: chunks t and t + 4 of 16 channels. A product over d may take channels in any order: step
//       4h + i takes channels 64h + 16t + 4i .. + 4 for what the hardware calls 2t, 2t+1, 2t+8, 2t+9; Q lies in that order.
//   S   of tokens g and g + 8, rows 8j + 2t and 8j + 2t + 1
//   V   of all tokens 16i + 2t, 2t+1, 2t+8, 2t+9: channels 32w + 4g .. + 4, one word each, w its warp. Bytes of two tokens are
//       interleaved before they are widened; the channels are rows g and g + 8 of the first O^T and of the second.
//   O   of these channels, rows 8j + 2t and 8j + 2t + 1
//
// K and V come to shared memory in the background, a tile ahead, K to where its own warp reads it. A tile has one barrier:
// before it weights are written, relative to what they were before; after it V of all warps is there. Scores far above what
// weights are relative to are rare: a warp that meets one says so before the barrier, and after it all warps follow. So they do with
// dynamic scales of V: weights are multiplied by them, relative to a power of two of the whole block.
#pragma once
#include "../ops/paged_attention_decode_merge.h"
#include "../ops/paged_attention_prefill_rows.h"
#include "wide_shared.h"

namespace quantkv {

#if QKV_HAS_WARPGROUP_PRODUCTS

template <Format F, class Shape> struct WideDecode {
  static constexpr int kRowTiles = Shape::kRowTiles, kSteps = Shape::kDim / 16;

  const AttentionParams &params;
  const WorkList &list;
  WideShared<Shape> &shared;
  WideWork &work;
  float o[2][kRowTiles][4]; // nothing yet, if the tile is the first of its piece
  float sum[kRowTiles][2]; // of this lane's tokens
  int version;             // of shared.rows and shared.v_inverse

  QKV_DEVICE WideDecode(const AttentionParams &params, const WorkList &list, WideShared<Shape> &shared)
      : params(params), list(list), shared(shared), work(shared.works[warp_index()]), version(0) {}

  // Queries of a piece, and what softmax needs of its rows, of which each warp has a quarter.
  QKV_DEVICE void begin(const Piece &piece) {
    constexpr int kRows = Shape::kRows / Shape::kWarps; // of a warp
    version ^= 1;
    const auto store = [&](int row, int chunk, const Words<4> &words) {
      const int t = chunk % 8 / 2;
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        *reinterpret_cast<uint32_t *>(shared.query[chunk / 8] + panel_offset(row, chunk % 2 * 4 + i) + 4 * t) = words.w[i];
      }
    };
    load_prefill_queries<f16, Shape::kDim, kRows>(params, piece, store, shared.query_factors);
    sync_warp();
    const int thread = reread_thread_index(), lane = thread % kWarp, row = kRows * (thread / kWarp) + lane;
    if (lane < kRows) {
      const quantkv_half &k = params.op.cache.k;
      const int query = piece.query_of(row);
      const float scale = k.scale.channel_stride == 0 ? static_scale(k.scale, piece.kv_head, 0) : 1.0f;
      shared.rows[version][0][row] = {params.score_factor * scale * shared.query_factors[row], kUnseen};
      shared.rows[version][1][row] = {1.0f, kUnseen};
      shared.position[row] = piece.first_position + query;
      const bool exists = row < piece.rows();
      shared.slope[row] = exists ? alibi_slope(params, piece.first_head + row - query * piece.num_heads) : 0.0f;
    }
    if (Shape::kDynamic && thread == 0) shared.v_inverse[version] = inverse_of(kSmallestScale);
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) sum[j][0] = sum[j][1] = 0.0f;
    fence_for_products();
    sync_threads();
  }

  // This lane's K of the warp's tokens, as an operand.
  QKV_DEVICE void widen_keys(uint32_t (&k)[kSteps][4]) const {
    const int at = shared.offsets[thread_index()].keys;
    QKV_UNROLL
    for (int half = 0; half < 2; half++) {
      const unsigned char *from = shared.keys[0] + (at ^ 64 * half);
      const Words<4> first = *reinterpret_cast<const Words<4> *>(from);
      const Words<4> second = *reinterpret_cast<const Words<4> *>(from + 8 * Shape::kDim);
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        uint32_t(&step)[4] = k[4 * half + i];
        decode4_to_f16<F>(first.w[i], step[0], step[2]);
        decode4_to_f16<F>(second.w[i], step[1], step[3]);
      }
    }
  }

  // s = K Q^T, in the background.
  QKV_DEVICE void start_scores(float (&s)[kRowTiles][4], const uint32_t (&k)[kSteps][4]) const {
    products_begin();
    QKV_UNROLL
    for (int step = 0; step < kSteps; step++) {
      multiply_rows_f16(s, k[step], matrix_by_rows(shared.query[step / 4]) + 32 * (step % 4), step > 0);
    }
    products_commit();
  }

  // Products to scores in base 2, where that takes more than a factor; what a row does not see becomes -inf.
  QKV_DEVICE void make_scores(float (&s)[kRowTiles][4], const Piece &piece, const WideTile &tile) const {
    const int lane = forget(lane_index()), g = lane / 4, t = lane % 4;
    const bool has[2] = {tile.halves.has(piece, tile.position, g), tile.halves.has(piece, tile.position, g + 8)};
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        const int row = 8 * j + 2 * t + i % 2;
        const int32_t query_position = shared.position[row], key = tile.position + g + i / 2 * 8;
        s[j][i] *= shared.rows[version][0][row].factor;
        if (params.cap != 0.0f) s[j][i] = params.cap * tanh_quick(s[j][i]);
        s[j][i] += shared.slope[row] * static_cast<float>(key - query_position);
        if (!has[i / 2] || !visible_to(params, query_position)(key)) s[j][i] = negative_infinity();
      }
    }
  }

  // Multiplies products by the dynamic scales of their tokens. `values`: V's of this lane's two tokens, zero for one that is not there.
  QKV_DEVICE void use_scales(float (&s)[kRowTiles][4], const Piece &piece, const WideTile &tile, uint32_t number, float (&values)[2]) const {
    const TileScales &scales = shared.scales[2 * (reread_thread_index() / kWarp) + number % 2];
    const int g = forget(lane_index()) / 4;
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      const float key = scales.k[g + 8 * i];
      QKV_UNROLL
      for (int j = 0; j < kRowTiles; j++) {
        s[j][2 * i] *= key;
        s[j][2 * i + 1] *= key;
      }
      values[i] = (tile.flags & WideTile::kSeen) != 0 || tile.halves.has(piece, tile.position, g + 8 * i) ? scales.v[g + 8 * i] : 0.0f;
    }
  }

  // Weights of a tile begin in this chunk of their panel.
  static QKV_DEVICE int weights_chunk(uint32_t number) { return Shape::kWeightPanels == 1 ? static_cast<int>(number % 2) * 4 : 0; }
  QKV_DEVICE unsigned char *weights_panel(uint32_t number) const { return shared.weights[number % Shape::kWeightPanels]; }

  // Weights of this lane's scores to shared memory, their sums to `sums`. `rows`: what scores are to be multiplied by, too. `scales`:
  // V's dynamic ones of this lane's tokens. Answers the largest score, relative to what weights are.
  QKV_DEVICE float write_weights(const float (&s)[kRowTiles][4], const float (&scales)[2], const WideRow *rows, uint32_t number,
                                 float (&sums)[kRowTiles][2]) const {
    const int t = thread_index() % 4, offset = shared.offsets[thread_index()].weights; // of chunk 0: others at the exclusive or with theirs
    unsigned char *const panel = weights_panel(number);
    const float inverse = Shape::kDynamic ? shared.v_inverse[version] : 1.0f, of_token[2] = {scales[0] * inverse, scales[1] * inverse};
    float top = negative_infinity();
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      const Words<4> row = *reinterpret_cast<const Words<4> *>(&rows[8 * j + 2 * t]); // and the next one
      float weight[4];
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        const float x = fused_multiply_add(s[j][i], float_of(row.w[i % 2 * 2]), -float_of(row.w[i % 2 * 2 + 1]));
        top = maximum(top, x);
        weight[i] = exp2_approx(x);
      }
      sums[j][0] = weight[0] + weight[2];
      sums[j][1] = weight[1] + weight[3];
      QKV_UNROLL
      for (int i = 0; Shape::kDynamic && i < 4; i++) weight[i] *= of_token[i / 2];
      unsigned char *const to = panel + (offset ^ 16 * (weights_chunk(number) + j));
      *reinterpret_cast<uint32_t *>(to) = pack_f16(weight[0], weight[1]);
      *reinterpret_cast<uint32_t *>(to + 8 * kPanelRow) = pack_f16(weight[2], weight[3]);
    }
    fence_for_products();
    return top;
  }

  QKV_DEVICE void add_weights(const float (&sums)[kRowTiles][2]) {
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      sum[j][0] += sums[j][0];
      sum[j][1] += sums[j][1];
    }
  }

  // Makes the largest scores, and scales of V, what weights are relative to, and writes the tile's again, which are in `sum` if
  // `is_added`. All warps; three barriers.
  QKV_DEVICE void follow_scores(const float (&s)[kRowTiles][4], const float (&scales)[2], int kind, uint32_t number, bool is_added) {
    const int thread = reread_thread_index(), lane = thread % kWarp, g = lane / 4, t = lane % 4;
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        const int row = 8 * j + 2 * t + i;
        const float factor = shared.rows[version][kind][row].factor;
        float top = maximum(s[j][i] * factor, s[j][2 + i] * factor);
        QKV_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) top = maximum(top, shuffle_xor(top, mask));
        if (g == 0) shared.of_warps[thread / kWarp][row] = top;
      }
    }
    if constexpr (Shape::kDynamic) {
      float largest = maximum(scales[0], scales[1]);
      QKV_UNROLL
      for (int mask = 4; mask < kWarp; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
      if (lane == 0) shared.scales_of_warps[thread / kWarp] = largest;
    }
    sync_threads();
    float of_scales = 1.0f; // what outputs are multiplied by for them
    if constexpr (Shape::kDynamic) {
      float largest = kSmallestScale;
      QKV_UNROLL
      for (int warp = 0; warp < Shape::kWarps; warp++) largest = maximum(largest, shared.scales_of_warps[warp]);
      const float before = shared.v_inverse[version], inverse = inverse_unit(largest), now = inverse < before ? inverse : before;
      of_scales = now * inverse_of(before);
      if (thread == 0) shared.v_inverse[version ^ 1] = now;
    }
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        const int row = 8 * j + 2 * t + i;
        const WideRow before = shared.rows[version][0][row];
        float top = before.reference;
        QKV_UNROLL
        for (int warp = 0; warp < Shape::kWarps; warp++) top = maximum(top, shared.of_warps[warp][row]);
        const float rescale = exp2_approx(before.reference - top);
        sum[j][i] *= rescale;
        QKV_UNROLL
        for (int m = 0; m < 2; m++) {
          o[m][j][i] *= rescale * of_scales;
          o[m][j][2 + i] *= rescale * of_scales;
        }
        if (thread < 4) {
          shared.rows[version ^ 1][0][row] = {before.factor, top};
          shared.rows[version ^ 1][1][row] = {1.0f, top};
        }
      }
    }
    version ^= 1;
    sync_threads();
    float sums[kRowTiles][2];
    write_weights(s, scales, shared.rows[version][kind], number, sums);
    if (!is_added) add_weights(sums);
    sync_threads();
  }

  // o = or += V^T P^T, in the background.
  QKV_DEVICE void start_outputs(uint32_t number, const unsigned char *values, bool adds) {
    const unsigned char *from = values + shared.offsets[thread_index()].values;
    const PanelMatrix weights = matrix_by_columns(weights_panel(number) + 16 * weights_chunk(number), Shape::kTokens * kPanelRow);
    QKV_UNROLL
    for (int step = 0; step < Shape::kTokens / 16; step++) {
      uint32_t v[4], a[2][4];
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        v[i] = *reinterpret_cast<const uint32_t *>(from + (16 * step + i / 2 * 8 + i % 2) * Shape::kDim);
      }
      QKV_UNROLL
      for (int m = 0; m < 2; m++) {
        const uint32_t selector = m == 0 ? 0x5140 : 0x7362; // two channels of a word, of two tokens
        decode4_to_f16<F>(byte_permute(v[0], v[1], selector), a[m][0], a[m][1]);
        decode4_to_f16<F>(byte_permute(v[2], v[3], selector), a[m][2], a[m][3]);
      }
      products_begin();
      QKV_UNROLL
      for (int m = 0; m < 2; m++) multiply_columns_f16(o[m], a[m], weights + 16 * kPanelRow * step, step > 0 || adds);
    }
    products_commit();
  }

  // One tile, number `number` of all; its K is in `k`. Afterwards products with V are under way. Answers whether it is the piece's last.
  QKV_DEVICE bool attend(const Piece &piece, uint32_t number, const uint32_t (&k)[kSteps][4]) {
    float s[kRowTiles][4], sums[kRowTiles][2], scales[2] = {1.0f, 1.0f};
    start_scores(s, k);
    const WideTile tile = work.tiles[number % 4];
    const bool is_plain = params.cap == 0.0f && params.op.alibi_slopes == nullptr;
    const int kind = is_plain && (tile.flags & WideTile::kSeen) != 0 ? 0 : 1;
    products_wait<0>(s);
    if constexpr (Shape::kDynamic) use_scales(s, piece, tile, number, scales);
    if (kind == 1) make_scores(s, piece, tile);
    const float top = write_weights(s, scales, shared.rows[version][kind], number, sums);
    // A warp's weights count now, unless they are so large that they may not be numbers.
    bool is_above = any(top > kMostAbove);
    if constexpr (Shape::kDynamic) is_above |= any(maximum(scales[0], scales[1]) * shared.v_inverse[version] >= 2.0f);
    if (is_above) shared.above[number % 2] = number + 1;
    else add_weights(sums);
    copy_async_wait<2>(); // V of this tile
    sync_threads();
    if (shared.above[number % 2] == number + 1) follow_scores(s, scales, kind, number, !is_above);
    start_outputs(number, shared.values[number % Shape::kValueSlots], (tile.flags & WideTile::kFirst) == 0);
    return (tile.flags & WideTile::kLast) != 0;
  }

  // Sums of all lanes and warps; a thread a row has its state then.
  QKV_DEVICE void share_sums() {
    const int thread = reread_thread_index(), lane = thread % kWarp, g = lane / 4, t = lane % 4;
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        float all = sum[j][i];
        QKV_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) all += shuffle_xor(all, mask);
        if (g == 0) shared.of_warps[thread / kWarp][8 * j + 2 * t + i] = all;
      }
    }
    sync_threads();
  }

  // This lane's channels of row 8j + 2t + i.
  QKV_DEVICE void take(int j, int i, float (&x)[4]) const {
    const float unit = Shape::kDynamic ? inverse_of(shared.v_inverse[version]) : 1.0f;
    QKV_UNROLL
    for (int c = 0; c < 4; c++) x[c] = o[c / 2][j][c % 2 * 2 + i] * unit;
  }

  // Leaves the rows of a piece that others' are to be merged with, or a run of pieces, where K and V were: it is its worker's last, so that
  // no copies are under way. `max`, `all`: a thread a row's state.
  QKV_DEVICE void lay_out(const Piece &piece, float max, float all) {
    const int thread = reread_thread_index(), lane = thread % kWarp, t = lane % 4, run = 8 * (thread / kWarp) + lane / 4;
    float *const rows = reinterpret_cast<float *>(shared.values[0]);
    static_assert(Shape::kRows * Shape::kDim * 4 <= sizeof(shared.values) + sizeof(shared.keys), "they follow each other");
    if (thread < piece.rows()) {
      shared.of_warps[0][thread] = max;
      shared.of_warps[1][thread] = all;
    }
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        float x[4];
        take(j, i, x);
        const Words<4> words = {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
        *reinterpret_cast<Words<4> *>(rows + (8 * j + 2 * t + i) * Shape::kDim + 4 * run) = words;
      }
    }
  }

  // Then merges them, a warp two rows at a time.
  QKV_DEVICE void merge(const Piece &piece) const {
    sync_threads();
    const int thread = reread_thread_index(), lane = thread % kWarp;
    const float *rows = reinterpret_cast<const float *>(shared.values[0]);
    const int32_t worker = work.place.worker;
    const MergeRole role(list, worker, piece.merge, list.merges[larger_of(piece.merge, 0)].num_pieces, Shape::kMostPieces);
    const quantkv_scale &scales = params.op.cache.v.scale;
    const float v_scale = static_scale(scales, piece.kv_head, 0);
    constexpr int kRowsAtOnce = 2, kPiecesAtOnce = 3;
    QKV_NO_UNROLL
    for (int base = thread / kWarp; base < piece.rows(); base += kRowsAtOnce * Shape::kWarps) {
      MergeState states[kRowsAtOnce];
      int32_t row[kRowsAtOnce];
      QKV_UNROLL
      for (int i = 0; i < kRowsAtOnce; i++) {
        row[i] = base + i * Shape::kWarps < piece.rows() ? base + i * Shape::kWarps : base; // the same twice, if there is one only
        const Words<4> words = *reinterpret_cast<const Words<4> *>(rows + row[i] * Shape::kDim + 4 * lane);
        states[i] = {shared.of_warps[0][row[i]], shared.of_warps[1][row[i]], {}};
        QKV_UNROLL
        for (int j = 0; j < 4; j++) states[i].acc[j] = float_of(words.w[j]);
      }
      if (!merge_rows<kPiecesAtOnce>(states, list, worker, role, row, lane, true, true)) {
        return set_fault(params.paging.faults, QUANTKV_FAULT_PLAN); // and writes nothing
      }
      QKV_UNROLL
      for (int i = 0; i < kRowsAtOnce; i++) {
        const RowEnd end = {params, list, piece, worker, row[i], 4 * lane, true, true};
        if (role.is_first) end.to_output(states[i], scales.channel_stride != 0, v_scale);
        else end.to_slot(states[i]);
      }
    }
  }

  // Rows of the piece, or its partial state. Or what merge() needs: then it answers true.
  QKV_DEVICE bool finish(const Piece &piece) {
    const int row = reread_thread_index(), lane = row % kWarp, t = lane % 4, run = 8 * (row / kWarp) + lane / 4;
    const bool is_whole = piece.slot < 0;
    share_sums();
    float max = negative_infinity(), all = 0.0f; // of the row
    if (row < piece.rows()) {
      const float reference = shared.rows[version][0][row].reference;
      max = reference == kUnseen ? negative_infinity() : reference;
      QKV_UNROLL
      for (int warp = 0; warp < Shape::kWarps; warp++) all += shared.of_warps[warp][row];
    }
    const int32_t worker = work.place.worker;
    if (!is_whole) {
      const MergeRole role(list, worker, piece.merge, list.merges[larger_of(piece.merge, 0)].num_pieces, Shape::kMostPieces);
      if (!role.is_sound) {
        set_fault(params.paging.faults, QUANTKV_FAULT_PLAN);
        return false; // and writes nothing
      }
      if (role.members + role.runs > 0) {
        lay_out(piece, max, all);
        return true;
      }
      if (row < piece.rows()) store_relaxed(slot_state(list, worker, row), Words<2>{{state_word(max), state_word(all)}});
    } else {
      if (row < piece.rows()) {
        const int query = piece.query_of(row), token = piece.first_token + query, head = piece.first_head + row - query * piece.num_heads;
        const SoftmaxEnd end = end_of_row(params, head, max, all);
        store_lse(params, token, head, end.lse);
        shared.end_factor[row] = end.factor;
        shared.token[row] = token;
        shared.head[row] = head;
      }
      sync_threads();
    }
    const quantkv_scale &scales = params.op.cache.v.scale;
    const float one_scale = static_scale(scales, piece.kv_head, 0);
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        const int row = 8 * j + 2 * t + i;
        if (row >= piece.rows()) continue;
        float x[4];
        take(j, i, x);
        if (is_whole) {
          const SoftmaxEnd end = {shared.end_factor[row], 0.0f};
          QKV_UNROLL
          for (int c = 0; c < 4; c++) {
            const float scale = scales.channel_stride == 0 ? one_scale : static_scale(scales, piece.kv_head, 4 * run + c);
            x[c] = softmax_result(x[c], end) * scale;
          }
          store_activation_x4(params.op, row_index(params.op.output, shared.token[row], shared.head[row]) + 4 * run, x);
        } else {
          store_relaxed(slot_values(list, worker, row) + run, Words<4>{{state_word(x[0]), state_word(x[1]), state_word(x[2]), state_word(x[3])}});
        }
      }
    }
    return false;
  }

  QKV_DEVICE void run() {
    shared.offsets[thread_index()] = WideLoader<Shape>::offsets_of(thread_index());
    if (lane_index() == 0) work.known = 0;
    if (thread_index() == 0) shared.above[0] = shared.above[1] = 0;
    // A plan of an earlier call is not what the kernel before this one writes: there is no need to wait to read it.
    if (params.op.plan_is_ready) {
      work.next(params, list);
      if (work.known > 0) DecodeTiles<Shape>(params, work.pieces[0]).prefetch(2);
    }
    wait_for_previous_kernel();
    if (!params.op.plan_is_ready) work.next(params, list);
    allow_next_kernel();
    const WideLoader<Shape> loader(params, list, shared);
    loader.start();
    if (work.known == 0) return;
    // The first tile's load is a turn of the loop, since it is much code.
    uint32_t k[kSteps][4];
    int32_t at = -1;
    bool is_last = true;
    for (int32_t number = -1;; number++) {
      if (is_last) {
        products_wait<0>(o[0]);
        products_wait<0>(o[1]);
        if (at >= 0 && finish(work.pieces[at % kWidePieces])) break;
        if (++at == work.known) return;
      }
      if (number >= 0) {
        copy_async_wait<1>(); // K of this tile: V of it may be under way
        sync_warp();
        widen_keys(k);
        sync_warp();
      }
      products_wait<0>(o[0]);
      products_wait<0>(o[1]);
      loader.load();
      if (is_last) begin(work.pieces[at % kWidePieces]);
      is_last = false;
      if (number < 0) continue;
      is_last = attend(work.pieces[at % kWidePieces], static_cast<uint32_t>(number), k);
    }
    merge(work.pieces[at % kWidePieces]);
  }
};

#endif // QKV_HAS_WARPGROUP_PRODUCTS

// Grid: one block a worker of the list. Shared: WideShared. Asks for: K and V of format F, 128 channels, rows contiguous and
// aligned to 16 bytes; 16-bit activations; rows of the list <= Rows.
template <Format F, int Rows, bool Dynamic>
QKV_KERNEL void QKV_LAUNCH_BOUNDS((WideShape<F, Rows, Dynamic>::kThreads), (WideShape<F, Rows, Dynamic>::kBlocks))
    paged_attention_decode_wide(QKV_GRID_CONSTANT const AttentionParams params, QKV_GRID_CONSTANT const WorkList list) {
#if QKV_HAS_WARPGROUP_PRODUCTS
  using Shape = WideShape<F, Rows, Dynamic>;
  QKV_PANELS_SHARED(memory);
  WideDecode<F, Shape>(params, list, *reinterpret_cast<WideShared<Shape> *>(memory)).run();
#endif
}

} // namespace quantkv
