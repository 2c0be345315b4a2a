// paged_attention for few query rows a KV head (decode, speculative decode), on tensor cores: sm_80 and up.
//
// The limit is reading K and V once, so nothing else may be in the way: codes go from global memory straight to
// registers, are widened there to f16 (exactly, two codes an instruction) and multiplied as they lie. Nothing passes
// through shared memory, and warps meet only where a piece of work ends.
//
//   S   = K Q^T      [16 tokens, 8 rows]        tokens on the long side of the 16 x 8 x 16 product
//   O^T += V^T P^T   [16 channels, 8 rows] x D/16
//
// A tile is 16 tokens of a KV head; where a row is 64 bytes it is two such parts, with one softmax step for both.
// Rows are the (query, query head) pairs of a piece, 8 * RowTiles at most. Lane 4g + t holds
//   K   of tokens g and g + 8: every 4th run of kWidthK bytes. A product over d may take the channels in any order:
//       what the hardware calls channels (2t, 2t+1, 2t+8, 2t+9) of a step are four that lie side by side in memory;
//       q is loaded in the same order. Where rows are whole lines of L2, eight lanes have one: see multiply_lines().
//   V   of tokens 2t, 2t+1, 2t+8, 2t+9: every 8th run of kWidthV bytes. V^T wants pairs of tokens of one channel: bytes
//       of two tokens are interleaved by byte_permute before they are widened.
//   S   of tokens g and g + 8, rows 2t and 2t + 1; P becomes the second product's operand by transpose_8x8
//   O   of two channels a 16-row tile of O^T, rows 2t and 2t + 1
// Where rows are packed as vLLM does (Order::Packed), four tokens of a channel of V lie side by side, which is what the
// product wants: a lane holds those of tokens 4t .. 4t + 3, and K and S accordingly.
//
// The four warps of a block take tiles in turn, each with a softmax state of its own, and merge them in shared memory
// when the piece ends. The loads of a tile are issued before the products of the one before it are used up, but for tiles
// of 16 KiB (256 channels of 16 bits): two in flight would not fit, nor need they, since a warp has 6700 clocks for one.
#pragma once
#include "paged_attention_decode_merge.h"
#include "paged_attention_decode_products.h"
#include "paged_attention_decode_work.h"

namespace quantkv {

// Tiles of a warp's first piece that L2 is asked for while the kernel before this one ends. More come too early: they
// take the bandwidth of the blocks that are not done.
constexpr int kTilesAhead = 2;

// A row of O in shared memory: where channels `channel` and the next one (even, odd) are, of a row of kStride. They are
// o[..][tile][0], [2] of the lanes 4g + t; or packed o[..][tile][0] or [2] of neighbours g, all of a tile side by side.
template <class Shape> QKV_DEVICE int shared_pair(int channel) {
  if constexpr (Shape::kPacked) return channel / 16 * Shape::kTileStride + channel % 16;
  constexpr int width = Shape::kWidthV, element = Shape::kElement;
  const int byte = channel * element, g = byte / width % 8;
  const int tile = (byte / (8 * width) * width + byte % width) / (2 * element); // of the lane's share of a row
  return tile * Shape::kTileStride + 2 * g;
}

// Softmax state of a warp: rows 2t, 2t + 1 of each row tile. Sums are of this lane's tokens alone.
template <class Shape> struct DecodeState {
  float o[Shape::kRowTiles][Shape::kSteps][4];
  float max[Shape::kRowTiles][2], sum[Shape::kRowTiles][2];
  float v_inverse; // of the power of two that o is relative to (dynamic scales of V)

  QKV_DEVICE DecodeState() : v_inverse(inverse_of(kSmallestScale)) {
    QKV_UNROLL
    for (int i = 0; i < Shape::kRowTiles; i++) {
      max[i][0] = max[i][1] = negative_infinity();
      sum[i][0] = sum[i][1] = 0.0f;
      QKV_UNROLL
      for (int j = 0; j < Shape::kSteps; j++) o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0.0f;
    }
  }

  QKV_DEVICE void rescale(int i, float first, float second) {
    QKV_UNROLL
    for (int j = 0; j < Shape::kSteps; j++) {
      o[i][j][0] *= first;
      o[i][j][1] *= second;
      o[i][j][2] *= first;
      o[i][j][3] *= second;
    }
  }
};

// Products to scores in base 2; what a row does not see becomes -inf. What every launch runs once or twice, for the tile
// that a sequence ends in, must be few instructions: the first time they cost 10 to 20 clocks each.
template <class Shape>
QKV_DEVICE void make_scores(float (&c)[Shape::kRowTiles][4], const AttentionParams &params, const Piece &piece,
                            const DecodeTile<Shape> &tile, int part, const DecodeQuery<Shape> &query) {
  const TilePart<Shape> &own = tile.parts[part];
  const int t = Shape::reread_lane() % 4;
  const bool has_slopes = params.op.alibi_slopes != nullptr, plain = params.cap == 0.0f && !has_slopes;
  QKV_UNROLL
  for (int i = 0; i < Shape::kRowTiles; i++) {
    const Words<2> factors = *reinterpret_cast<const Words<2> *>(&query.factor[8 * i + 2 * t]);
    QKV_UNROLL
    for (int j = 0; j < 4; j++) {
      c[i][j] *= float_of(factors.w[j % 2]);
      if constexpr (Shape::kDynamic) c[i][j] *= tile.key_scale(part, j / 2);
    }
  }
  if (plain && tile.whole) return;
  if (params.cap != 0.0f) {
    QKV_UNROLL
    for (int i = 0; i < Shape::kRowTiles; i++) {
      QKV_UNROLL
      for (int j = 0; j < 4; j++) c[i][j] = params.cap * tanh_of(c[i][j]);
    }
  }
  const int32_t position = tile.position + part * Shape::kPart;
  const int tokens[2] = {Shape::score_token(0), Shape::score_token(1)};
  const bool has[2] = {own.halves.has(piece, position, tokens[0]), own.halves.has(piece, position, tokens[1])};
  QKV_UNROLL
  for (int i = 0; i < Shape::kRowTiles; i++) {
    QKV_UNROLL
    for (int j = 0; j < 4; j++) {
      const int row = 8 * i + 2 * t + j % 2, pair = j / 2;
      const int32_t query_position = query.position[row], key = position + tokens[pair];
      if (has_slopes) c[i][j] += query.slope[row] * static_cast<float>(key - query_position);
      if (!has[pair] || !visible_to(params, query_position)(key)) c[i][j] = negative_infinity();
    }
  }
}

// Weights are multiplied by V's scales relative to a power of two, which keeps them in f16: one that no scale met is twice as large
// as. Makes it that.
template <class Shape> QKV_DEVICE void follow_scales(DecodeState<Shape> &state, const DecodeTile<Shape> &tile) {
  float largest = 0.0f;
  QKV_UNROLL
  for (int part = 0; part < Shape::kParts; part++) {
    largest = maximum(largest, maximum(tile.value_scale(part, 0), tile.value_scale(part, 1)));
  }
  if (!any(largest * state.v_inverse >= 2.0f)) return;
  QKV_UNROLL
  for (int mask = 4; mask < 32; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
  const float inverse = inverse_unit(largest);
  if (inverse < state.v_inverse) {
    const float factor = inverse * inverse_of(state.v_inverse);
    QKV_UNROLL
    for (int i = 0; i < Shape::kRowTiles; i++) state.rescale(i, factor, factor);
    state.v_inverse = inverse;
  }
}

// Scores to weights, relative to state.max; p is the operand of the second product. state.max is a score, within kMostAbove
// of the largest: to find the largest takes lanes six shuffles, to see that none is that far above takes them a vote.
template <class Shape>
QKV_DEVICE void make_weights(uint32_t (&p)[Shape::kParts][Shape::kRowTiles][2], const float (&c)[Shape::kParts][Shape::kRowTiles][4],
                             DecodeState<Shape> &state, const DecodeTile<Shape> &tile) {
  if constexpr (Shape::kDynamic) follow_scales(state, tile);
  QKV_UNROLL
  for (int i = 0; i < Shape::kRowTiles; i++) {
    float first = maximum(c[0][i][0], c[0][i][2]), second = maximum(c[0][i][1], c[0][i][3]);
    QKV_UNROLL
    for (int part = 1; part < Shape::kParts; part++) {
      first = maximum(first, maximum(c[part][i][0], c[part][i][2]));
      second = maximum(second, maximum(c[part][i][1], c[part][i][3]));
    }
    // After the first tile rarely any.
    if (any(first > state.max[i][0] + kMostAbove || second > state.max[i][1] + kMostAbove)) {
      QKV_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        first = maximum(first, shuffle_xor(first, mask));
        second = maximum(second, shuffle_xor(second, mask));
      }
      first = maximum(first, state.max[i][0]);
      second = maximum(second, state.max[i][1]);
      float rescale0 = softmax_rescale(state.max[i][0], first), rescale1 = softmax_rescale(state.max[i][1], second);
      state.sum[i][0] *= rescale0;
      state.sum[i][1] *= rescale1;
      state.rescale(i, rescale0, rescale1);
      state.max[i][0] = first;
      state.max[i][1] = second;
    }
    const float reference0 = softmax_reference(state.max[i][0]), reference1 = softmax_reference(state.max[i][1]);
    QKV_UNROLL
    for (int part = 0; part < Shape::kParts; part++) {
      const float(&score)[4] = c[part][i];
      const float e[4] = {exp2_approx(score[0] - reference0), exp2_approx(score[1] - reference1),
                          exp2_approx(score[2] - reference0), exp2_approx(score[3] - reference1)};
      state.sum[i][0] += e[0] + e[2];
      state.sum[i][1] += e[1] + e[3];
      QKV_UNROLL
      for (int pair = 0; pair < 2; pair++) {
        float x = e[2 * pair], y = e[2 * pair + 1];
        if constexpr (Shape::kDynamic) {
          const float factor = tile.value_scale(part, pair) * state.v_inverse;
          x *= factor;
          y *= factor;
        }
        p[part][i][pair] = transpose_8x8(Shape::kBf16 ? pack_bf16(x, y) : pack_f16(x, y));
      }
    }
  }
}

// A warp's state to shared memory: O [warps, rows, kStride], (max, sum) [warps, rows].
template <class Shape> QKV_DEVICE void share_state(DecodeState<Shape> &state, float *shared) {
  const int lane = Shape::reread_lane(), warp = Shape::reread_thread() / kWarp, g = lane / 4, t = lane % 4;
  float *states = shared + Shape::kWarps * Shape::kRows * Shape::kStride;
  QKV_UNROLL
  for (int i = 0; i < Shape::kRowTiles; i++) {
    QKV_UNROLL
    for (int j = 0; j < 2; j++) {
      float sum = state.sum[i][j];
      QKV_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      const int row = warp * Shape::kRows + 8 * i + 2 * t + j;
      if (g == 0) {
        states[2 * row] = state.max[i][j];
        states[2 * row + 1] = sum;
      }
      QKV_UNROLL
      for (int tile = 0; tile < Shape::kSteps; tile++) {
        const float unit = Shape::kDynamic ? inverse_of(state.v_inverse) : 1.0f;
        const float first = state.o[i][tile][j] * unit, second = state.o[i][tile][2 + j] * unit;
        float *const to = shared + row * Shape::kStride + tile * Shape::kTileStride;
        if constexpr (Shape::kPacked) {
          to[g] = first;
          to[8 + g] = second;
        } else {
          *reinterpret_cast<Words<2> *>(to + 2 * g) = {{bits_of(first), bits_of(second)}};
        }
      }
    }
  }
}

// Merges the warps' states: the rows of the piece, or its partial state. A warp takes a row at a time, a lane four
// neighbouring channels. The last piece of a worker may be one that others' states are merged with.
template <class Shape, bool kMerges>
QKV_DEVICE void write_rows(const AttentionParams &params, const WorkList &list, const Piece &piece, int32_t worker, float v_scale,
                           int32_t merged, const float *shared) {
  constexpr int kChunk = 4 * kWarp; // channels of a warp at a time
  const float *states = shared + Shape::kWarps * Shape::kRows * Shape::kStride;
  const int thread = reread_thread_index(), lane = thread % kWarp;
  const quantkv_half &v = params.op.cache.v;
  const bool by_channel = is_quantized(format_of(v)) && v.scale.channel_stride != 0, whole = piece.slot < 0;
  const MergeRole role(list, worker, piece.merge, merged, Shape::kMostPieces);
  if (!whole && !role.is_sound) return set_fault(params.paging.faults, QUANTKV_FAULT_PLAN);
  const bool to_output = whole || (kMerges && role.is_first);
  for (int row = thread / kWarp; row < piece.rows(); row += Shape::kWarps) {
    MergeState own = {negative_infinity(), 0.0f, {}};
    float weight[Shape::kWarps];
    QKV_UNROLL
    for (int warp = 0; warp < Shape::kWarps; warp++) own.max = maximum(own.max, states[2 * (warp * Shape::kRows + row)]);
    QKV_UNROLL
    for (int warp = 0; warp < Shape::kWarps; warp++) {
      const float *of = states + 2 * (warp * Shape::kRows + row);
      weight[warp] = softmax_rescale(of[0], own.max);
      own.sum += of[1] * weight[warp];
    }
    QKV_UNROLL
    for (int first = 0; first < Shape::kDim; first += kChunk) {
      const bool inside = first + 4 * lane < Shape::kDim, is_last = first + kChunk >= Shape::kDim;
      const int channel = inside ? first + 4 * lane : 0;
      MergeState states[1] = {{own.max, own.sum, {0.0f, 0.0f, 0.0f, 0.0f}}}, &state = states[0];
      QKV_UNROLL
      for (int warp = 0; warp < Shape::kWarps; warp++) {
        const float *from = shared + (warp * Shape::kRows + row) * Shape::kStride;
        QKV_UNROLL
        for (int i = 0; i < 2; i++) {
          const Words<2> pair = *reinterpret_cast<const Words<2> *>(from + shared_pair<Shape>(channel + 2 * i));
          state.acc[2 * i] += float_of(pair.w[0]) * weight[warp];
          state.acc[2 * i + 1] += float_of(pair.w[1]) * weight[warp];
        }
      }
      if constexpr (kMerges) {
        const int32_t rows[1] = {row};
        if (!whole && !merge_rows<Shape::kAtOnce>(states, list, worker, role, rows, channel / 4, inside, is_last)) {
          return set_fault(params.paging.faults, QUANTKV_FAULT_PLAN); // and writes nothing
        }
      }
      const RowEnd end = {params, list, piece, worker, row, channel, inside, is_last};
      if (to_output) end.to_output(state, by_channel, v_scale);
      else end.to_slot(state);
    }
  }
}

// Grid: one block a worker of the list. Shared: Shape::kSharedBytes, or more. Asks for: K and V of format F and head dim D, rows
// contiguous and aligned to kWidthK and kWidthV, or packed, runs of 8 slots aligned; 16-bit activations, bf16 ones if F is bf16; rows of the list <= kRows.
//
// Memory must never idle: before a warp has finished a piece it has found the next one, asked for its queries, and
// issued the loads of its first tile there. Before the kernel before this one has ended, L2 is asked for the first tiles.
template <Format F, int D, int RowTiles, bool Dynamic, Order O>
QKV_KERNEL QKV_LAUNCH_BOUNDS((DecodeShape<F, D, RowTiles, Dynamic, O>::kThreads),
                             (DecodeShape<F, D, RowTiles, Dynamic, O>::blocks_on(QKV_COMPUTE_CAPABILITY)))
void paged_attention_decode(QKV_GRID_CONSTANT const AttentionParams params, QKV_GRID_CONSTANT const WorkList list) {
#if QKV_HAS_TENSOR_CORES
  using Shape = DecodeShape<F, D, RowTiles, Dynamic, O>;
  using Tiles = DecodeTiles<Shape>;
  QKV_DYNAMIC_SHARED(shared_bytes);
  QKV_SHARED(DecodeQuery<Shape>, queries, 2); // of this piece and of the next, in turn
  QKV_SHARED(DecodeWork, works, 1);
  QKV_SHARED(DecodeWarp<Shape>, warps, Shape::kWarps);
  float *shared = reinterpret_cast<float *>(shared_bytes);
  DecodeWork &work = works[0];
  DecodeWarp<Shape> &warp = warps[warp_index()];
  const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
  DecodeTile<Shape> next; // the tile on its way
  PartLoader<Shape> loaders[Shape::kParts];
  // What can be asked for as soon as a piece is known. Loads first, then what waits for them.
  auto begin_piece = [&](int32_t number) {
    const Piece &piece = work.at(number).piece;
    const Tiles tiles(params, piece);
    const int32_t *entry = tiles.entry(0);
    const int32_t block = entry != nullptr ? *entry : 0;
    const float scale = static_scale(k, piece.kv_head, 0), v_scale = static_scale(v, piece.kv_head, 0);
    begin_query(queries[number % 2], params, piece);
    warp.blocks[lane_index()] = tiles.checked(entry, block);
    warp.k_scale[lane_index()] = scale;
    if (lane_index() == 0) warp.v_scale[number % 2] = v_scale;
  };
  // The blocks of a tile, number `in_batch` of those that the lanes' `blocks` are for.
  auto look = [&](int32_t blocks, int32_t in_batch) {
    QKV_UNROLL
    for (int i = 0; i < Shape::kParts; i++) loaders[i].look(params, blocks, in_batch * Shape::kParts + i);
  };
  // Aims at that tile, at `position` of piece `number`.
  auto aim = [&](int32_t number, int32_t position) {
    const DecodeWork::Found &found = work.at(number);
    QKV_UNROLL
    for (int i = 0; i < Shape::kParts; i++) {
      loaders[i].aim(params, found.bases[lane_index()], found.piece.kv_head, position + i * Shape::kPart);
      next.parts[i].halves = loaders[i].halves();
    }
  };
  auto load_keys = [&] {
    QKV_UNROLL
    for (int i = 0; i < Shape::kParts; i++) loaders[i].keys(k, next.parts[i].k);
  };
  auto load_values = [&](DecodeTile<Shape> &tile) {
    QKV_UNROLL
    for (int i = 0; i < Shape::kParts; i++) loaders[i].values(v, tile.parts[i]);
  };
  // Those of tile n of this piece, which may be the first of the next one. Always a group, be it empty.
  auto load_scales = [&](int32_t n, bool load) {
    if constexpr (Dynamic) {
      TileScales *const scales = warp.scales_of(n);
      QKV_UNROLL
      for (int i = 0; i < Shape::kParts; i++) {
        if (load) loaders[i].scales(params, scales[i]);
      }
      copy_async_commit();
    }
  };
  auto take_scales = [&](DecodeTile<Shape> &tile, int32_t n) {
    if constexpr (Dynamic) {
      copy_async_wait<1>(); // the next tile's may be on their way
      sync_warp();
      tile.scales = warp.scales_of(n);
    }
  };
  auto load_first = [&](int32_t number) {
    look(warp.blocks[lane_index()], 0);
    aim(number, Tiles(params, work.at(number).piece).position(0));
    load_keys();
    if constexpr (!Shape::kNothingAhead) load_values(next);
    load_scales(0, true);
  };
  // The first two pieces. A plan of an earlier call is not what the kernel before this one writes: there is no need to wait to read it.
  if (!params.op.plan_is_ready) wait_for_previous_kernel();
  if (warp_index() == 0) {
    QKV_NO_UNROLL
    for (int32_t number = 0; number < 2 && (number == 0 || work.has(0)); number++) work.look<Shape>(params, list, number);
  }
  sync_threads();
  const bool any_work = work.has(0);
  if (params.op.plan_is_ready) {
    if (any_work) Tiles(params, work.at(0).piece).prefetch(kTilesAhead);
    wait_for_previous_kernel();
  }
  allow_next_kernel();
  if (!any_work) return;
  begin_piece(0);
  if constexpr (Shape::kRereads) {
    if (lane_index() == 0) warp.tiles_before = 0;
    sync_warp();
  }
  load_first(0);
  copy_async_wait<0>();
  make_query(queries[0], params, work.at(0).piece, warp.k_scale[lane_index()]);
  sync_threads();

  for (int32_t number = 0;; number = Shape::kRereads ? warp.next_number : number + 1) {
    const DecodeWork::Found &found = work.at(number), &next_found = work.at(number + 1);
    const Piece &piece = found.piece;
    const DecodeQuery<Shape> &query = queries[number % 2];
    Tiles tiles(params, piece);
    tiles.next_blocks = warp.blocks[lane_index()];
    tiles.begin_batch(0);
    // The next piece, and the one after it.
    auto go_on = [&] {
      if (!next_found.is_there) return;
      begin_piece(number + 1);
      if (number % Shape::kWarps == warp_index()) work.look<Shape>(params, list, number + 2);
    };
    // Once loads of this one's second tile are on their way; if there is none, now.
    if (tiles.count < 2 || !Shape::kLooksLate) {
      go_on();
      if (tiles.count == 0 && next_found.is_there) load_first(number + 1);
    }

    DecodeState<Shape> state;
    for (int32_t n = 0; n < tiles.count; n++) {
      DecodeTile<Shape> tile = next;
      tile.position = tiles.position(n);
      tile.whole = found.seen.has(tile.position) && tile.has_all_halves();
      const bool is_last = n + 1 == tiles.count, load = !is_last || next_found.is_there;
      if (is_last) {
        look(warp.blocks[lane_index()], 0);
      } else {
        const int32_t in_batch = (n + 1) & (tiles.batch() - 1);
        if (in_batch == 0) tiles.begin_batch(n + 1);
        look(tiles.blocks, in_batch);
      }
      float c[Shape::kParts][RowTiles][4];
      QKV_UNROLL
      for (int i = 0; i < Shape::kParts; i++) {
        if constexpr (Shape::kWholeLines) multiply_lines<F>(c[i], tile.parts[i], query);
        else multiply_keys<F>(c[i], tile.parts[i], query);
      }
      if constexpr (Shape::kNothingAhead) load_values(tile); // loaders still aim at this tile
      if (load) {
        aim(is_last ? number + 1 : number,
            is_last ? Tiles(params, next_found.piece).position(0) : tile.position + Shape::kWarps * Shape::kTile);
        if constexpr (!Shape::kNothingAhead) load_keys();
        if constexpr (Shape::kValuesAhead) load_values(next);
      }
      load_scales(n + 1, load);
      take_scales(tile, n);
      if (!tile.whole) tile.drop_missing(piece);
      QKV_UNROLL
      for (int i = 0; i < Shape::kParts; i++) make_scores(c[i], params, piece, tile, i, query);
      uint32_t p[Shape::kParts][RowTiles][2];
      make_weights(p, c, state, tile);
      QKV_UNROLL
      for (int i = 0; i < Shape::kParts; i++) {
        if constexpr (Shape::kPacked) multiply_packed_values<F>(state.o, tile.parts[i], p[i]);
        else multiply_values<F>(state.o, tile.parts[i], p[i]);
      }
      if constexpr (!Shape::kValuesAhead) {
        if (load) {
          if constexpr (Shape::kNothingAhead) load_keys();
          else load_values(next);
        }
      }
      if constexpr (Shape::kLooksLate) {
        if (n == 0 && !is_last) go_on();
      }
    }
    if constexpr (Shape::kRereads) {
      sync_warp(); // no lane has still to read what they were
      if (lane_index() == 0) {
        warp.next_number = number + 1;
        warp.tiles_before += tiles.count;
      }
    }
    sync_threads(); // nobody reads states of the piece before any more
    share_state(state, shared);
    copy_async_wait<0>();
    if (next_found.is_there) make_query(queries[(number + 1) % 2], params, next_found.piece, warp.k_scale[lane_index()]);
    const float v_scale = warp.v_scale[number % 2]; // a lane that is ahead puts that of the piece after the next one there
    sync_threads();
    if (!next_found.is_there) {
      write_rows<Shape, true>(params, list, piece, work.worker, v_scale, found.merged, shared);
      break;
    }
    write_rows<Shape, false>(params, list, piece, work.worker, v_scale, found.merged, shared);
  }
#endif
}

} // namespace quantkv
