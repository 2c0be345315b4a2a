// paged_attention for 9 to 64 query rows a KV head (speculative decode, wide groups) over an FP8 cache, on sm_90a: products of
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
#include "wide_loader.h"
#include "wide_rows.h"

namespace quantkv {

#if QKV_HAS_WARPGROUP_PRODUCTS

template <Format F, class Shape> struct WideDecode : WideRows<Shape> {
  using Rows = WideRows<Shape>;
  using Rows::kRowTiles, Rows::params, Rows::list, Rows::shared, Rows::work, Rows::o, Rows::sum, Rows::version;
  static constexpr int kSteps = Shape::kDim / 16, kTokenSteps = Shape::kTokens / 16;

  using WideRows<Shape>::WideRows;

  // What is read for the next turn of the loop while products are under way.
  struct Ahead {
    WideNext next;
    int keys; // where this lane's K lies
  };

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
  QKV_DEVICE void widen_keys(int at, uint32_t (&k)[kSteps][4]) const {
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

  // What softmax needs of this lane's rows, two by two.
  QKV_DEVICE void read_rows(int kind, Words<4> (&rows)[kRowTiles]) const {
    const WideRow *const from = &shared.rows[version][kind][2 * (thread_index() % 4)];
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) rows[j] = *reinterpret_cast<const Words<4> *>(from + 8 * j);
  }

  // Weights of this lane's scores to shared memory, from `offset` in the panel on; their sums to `sums`. `rows`: what scores are to be
  // multiplied by, too. `scales`: V's dynamic ones of this lane's tokens. Answers the largest sum of two weights.
  QKV_DEVICE float write_weights(const float (&s)[kRowTiles][4], const float (&scales)[2], const Words<4> (&rows)[kRowTiles],
                                 uint32_t number, int offset, float (&sums)[kRowTiles][2]) const {
    unsigned char *const panel = weights_panel(number);
    const float inverse = Shape::kDynamic ? shared.v_inverse[version] : 1.0f, of_token[2] = {scales[0] * inverse, scales[1] * inverse};
    float top = 0.0f;
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      float weight[4];
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        weight[i] = exp2_approx(fused_multiply_add(s[j][i], float_of(rows[j].w[i % 2 * 2]), -float_of(rows[j].w[i % 2 * 2 + 1])));
      }
      sums[j][0] = weight[0] + weight[2];
      sums[j][1] = weight[1] + weight[3];
      top = maximum(top, maximum(sums[j][0], sums[j][1]));
      QKV_UNROLL
      for (int i = 0; Shape::kDynamic && i < 4; i++) weight[i] *= of_token[i / 2];
      unsigned char *const to = panel + (offset ^ 16 * (weights_chunk(number) + j)); // of chunk 0 is the offset
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
    Words<4> rows[kRowTiles];
    read_rows(kind, rows);
    write_weights(s, scales, rows, number, shared.offsets[thread].weights, sums);
    if (!is_added) add_weights(sums);
    sync_threads();
  }

  // o = or += V^T P^T, in the background. This lane's first word of V is at `from`. All words are read at once: nothing moves up past the
  // fence of a product.
  QKV_DEVICE void start_outputs(uint32_t number, const unsigned char *from, bool adds) {
    uint32_t v[kTokenSteps][4];
    QKV_UNROLL
    for (int step = 0; step < kTokenSteps; step++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        v[step][i] = *reinterpret_cast<const uint32_t *>(from + (16 * step + i / 2 * 8 + i % 2) * Shape::kDim);
      }
    }
    const uint32_t parity = any(number % 2 != 0) ? 1 : 0; // by a vote, which makes it, and the operand's place, the warp's own
    const PanelMatrix weights = matrix_by_columns(weights_panel(parity) + 16 * weights_chunk(parity), Shape::kTokens * kPanelRow);
    QKV_UNROLL
    for (int step = 0; step < kTokenSteps; step++) {
      uint32_t a[2][4];
      QKV_UNROLL
      for (int m = 0; m < 2; m++) {
        const uint32_t selector = m == 0 ? 0x5140 : 0x7362; // two channels of a word, of two tokens
        decode4_to_f16<F>(byte_permute(v[step][0], v[step][1], selector), a[m][0], a[m][1]);
        decode4_to_f16<F>(byte_permute(v[step][2], v[step][3], selector), a[m][2], a[m][3]);
      }
      products_begin();
      QKV_UNROLL
      for (int m = 0; m < 2; m++) multiply_columns_f16(o[m], a[m], weights + 16 * kPanelRow * step, step > 0 || adds);
    }
    products_commit();
  }

  QKV_DEVICE Ahead look_ahead(const WideLoader<Shape> &loader) const { return {loader.next(), shared.offsets[thread_index()].keys}; }

  // One tile, number `number` of all; its K is in `k`. Answers whether it is the piece's last.
  //
  // Products with V are waited for here, not where the loop needs their registers: ptxas keeps what a product under way reads up to a
  // wait that follows it, but not across the back edge of a loop. (scripts/check_products.py looks for what is lost then.)
  QKV_DEVICE bool attend(const WideLoader<Shape> &loader, const Piece &piece, uint32_t number, const uint32_t (&k)[kSteps][4], Ahead &ahead) {
    float s[kRowTiles][4], sums[kRowTiles][2], scales[2] = {1.0f, 1.0f};
    start_scores(s, k);
    const WideTile tile = work.tiles[number % 4];
    const int kind = (tile.flags & WideTile::kPlain) != 0 ? 0 : 1;
    Words<4> rows[kRowTiles];
    read_rows(kind, rows);
    const int offset = shared.offsets[thread_index()].weights;
    products_wait<0>(s);
    if constexpr (Shape::kDynamic) use_scales(s, piece, tile, number, scales);
    if (kind == 1) make_scores(s, piece, tile);
    const float top = write_weights(s, scales, rows, number, offset, sums);
    // A warp's weights count now, unless they are so large that they may not be numbers.
    bool is_above = any(top > kMostWeight);
    if constexpr (Shape::kDynamic) is_above |= any(maximum(scales[0], scales[1]) * shared.v_inverse[version] >= 2.0f);
    if (is_above) shared.above[number % 2] = number + 1;
    else add_weights(sums);
    const int values = shared.offsets[thread_index()].values;
    copy_async_wait<2>(); // V of this tile
    sync_threads();
    if (shared.above[number % 2] == number + 1) follow_scores(s, scales, kind, number, !is_above);
    start_outputs(number, shared.values[number % Shape::kValueSlots] + values, (tile.flags & WideTile::kFirst) == 0);
    ahead = look_ahead(loader);
    products_wait<0>(o[0]);
    products_wait<0>(o[1]);
    return (tile.flags & WideTile::kLast) != 0;
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
    Ahead ahead = look_ahead(loader);
    for (int32_t number = -1;; number++) {
      if (is_last) {
        if (at >= 0 && Rows::finish(work.pieces[at % kWidePieces])) break;
        if (++at == work.known) return;
      }
      if (number >= 0) {
        copy_async_wait<1>(); // K of this tile: V of it may be under way
        sync_warp();
        widen_keys(ahead.keys, k);
        sync_warp();
      }
      loader.load(ahead.next);
      if (is_last) begin(work.pieces[at % kWidePieces]);
      is_last = false;
      if (number < 0) ahead = look_ahead(loader);
      else is_last = attend(loader, work.pieces[at % kWidePieces], static_cast<uint32_t>(number), k, ahead);
    }
    Rows::merge(work.pieces[at % kWidePieces]);
  }
};

#endif // QKV_HAS_WARPGROUP_PRODUCTS

// Grid: one block a worker of the list. Shared: WideShared. Asks for: K and V of format F, 128 channels, rows contiguous and
// aligned to 16 bytes, as queries and outputs are; 16-bit activations; rows of the list <= Rows.
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
