// paged_attention of many query rows on tensor cores (sm_80 and up): f16 or bf16 products, f32 sums.
//
// A block of 4 warps holds up to 64 query rows, 16 a warp, and goes through their keys kKeys at a time:
//   S = Q K^T      m16n8k16, rows x keys; both by ldmatrix
//   softmax        in registers, base 2, state per row
//   O += P V       P is S's fragment packed to 16 bits; V by transposing ldmatrix
// K and V tiles are copied from their blocks in the background: the next K while the softmax runs, the next V while
// the next scores are computed. 8-bit codes land raw and are decoded to f16 in shared memory, exactly.
//
// Tiles are [rows or keys, kDim] of 16-bit elements, in chunks of 8 elements (16 bytes); chunk c of row r lies at
// c ^ (r % 8), so that the eight rows of a matrix meet all banks. Head dims that are no power of two take the next
// larger kDim and leave the chunks past their end alone. Packed V, of which the slots of a channel lie side by side, becomes a
// tile of [kDim, keys], and ldmatrix has nothing to transpose.
//
// Range. f16 products: if the type or a scale per channel asks for it, a query row is scaled by a power of two into
// f16's range; the factor goes to the scores. Dynamic V scales go into P, relative to the largest power of two met so
// far. Scales per tensor and head go to the scores and outputs.
#pragma once
#include "paged_attention_prefill_rows.h"

namespace quantkv {

constexpr int kPrefillWarps = 4;
constexpr int kPrefillThreads = kPrefillWarps * kWarp;

// Whether V may be packed: of 256 channels there is no register left.
template <int kDim> constexpr bool kPrefillUnpacks = kDim <= 128;
template <int kDim> constexpr int kPrefillKeys = kDim <= 128 ? 64 : 32;

template <int kDim> struct PrefillShared {
  static constexpr int kKeys = kPrefillKeys<kDim>;
  // [rows, kDim]; at the end the outputs.
  alignas(128) unsigned char query[kPrefillRows * kDim * 2];
  // 16-bit caches: K and V. 8-bit ones: K or V decoded; codes of K and of V, [2][kKeys, kDim] bytes.
  alignas(128) unsigned char tiles[2][kKeys * kDim * 2];
  // Of two tiles, the one at hand and the next:
  int32_t blocks[2][kKeys];              // where its tokens lie; -1: a hole, not to be read
  int32_t blocks_of_runs[2][kKeys / 8];  // and eight tokens that do in one block
  float k_dynamic[2][kKeys], v_dynamic[2][kKeys];
  uint32_t present[2][kKeys / kWarp];    // a bit a token: not a hole
  float v_dynamic_max[2][kKeys / kWarp]; // over present tokens
  float query_factors[kPrefillRows];     // what brings the row back to its size
};

#if QKV_HAS_TENSOR_CORES

// Products of a type.
template <class T> struct Products;
template <> struct Products<f16> {
  static QKV_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_16816_f16(c, a, b0, b1);
  }
  static QKV_DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
};
template <> struct Products<bf16> {
  static QKV_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_16816_bf16(c, a, b0, b1);
  }
  static QKV_DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
};

// Chunk `chunk` + `odd` of a row, where `chunk` is even and `odd` 0 or 1. What is constant in `chunk` stays so.
template <int kDim> QKV_DEVICE unsigned char *chunk_of(unsigned char *tile, int row, int chunk, int odd) {
  return tile + row * (kDim * 2) + chunk / 8 * 128 + ((chunk % 8 ^ odd ^ (row & 7)) << 4);
}
template <int kDim> QKV_DEVICE unsigned char *chunk_of(unsigned char *tile, int row, int chunk) {
  return tile + row * (kDim * 2) + ((chunk ^ (row & 7)) << 4);
}
// Chunk of eight keys in a channel's row of packed V.
template <int kKeys> QKV_DEVICE unsigned char *chunk_of_channel(unsigned char *tile, int channel, int chunk) {
  static_assert(kKeys == 64, "eight rows meet all banks");
  return tile + channel * (kKeys * 2) + ((chunk ^ (channel & 7)) << 4);
}

// ---- tiles of K and V

// The table's entry for this thread's token of the tile at `first`: loaded one tile ahead of its use. -1 if the piece
// has no such token, or no thread.
template <int kKeys> QKV_DEVICE int32_t block_entry(const AttentionParams &params, const Piece &piece, int32_t first) {
  int32_t position = first + thread_index();
  if (thread_index() >= kKeys || position < piece.begin || position >= piece.end) return -1;
  return block_of(params, piece.seq, position >> params.paging.block_shift);
}

// Says where the tokens of a tile lie, and what their dynamic scales are. Warps that have tokens.
template <int kDim>
QKV_DEVICE void describe_tile(const AttentionParams &params, const Piece &piece, int32_t first, int32_t block, int stage,
                              PrefillShared<kDim> &shared) {
  if (warp_index() >= PrefillShared<kDim>::kKeys / kWarp) return;
  const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
  int thread = thread_index();
  int slot = (first + thread) & (params.paging.block_size() - 1);
  int64_t index = block >= 0 ? dynamic_scale_index(params.paging, block, piece.kv_head, slot) : 0;
  shared.blocks[stage][thread] = block;
  if (slots_are_contiguous(v)) {
    int32_t of_run = block;
    QKV_UNROLL
    for (int mask = 1; mask < 8; mask *= 2) of_run = larger_of(of_run, shuffle_xor(of_run, mask));
    if (thread % 8 == 0) shared.blocks_of_runs[stage][thread / 8] = of_run;
  }
  uint32_t present = ballot(block >= 0);
  if (lane_index() == 0) shared.present[stage][warp_index()] = present;
  if (k.dynamic != nullptr) shared.k_dynamic[stage][thread] = block >= 0 ? k.dynamic[index] : 0.0f;
  if (v.dynamic != nullptr) {
    float scale = block >= 0 ? v.dynamic[index] : 0.0f, top = scale;
    shared.v_dynamic[stage][thread] = scale;
    QKV_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) top = maximum(top, shuffle_xor(top, mask));
    if (lane_index() == 0) shared.v_dynamic_max[stage][warp_index()] = top;
  }
}

// Starts copying a tile, 16 bytes a thread and step; holes become zeros.
template <int kDim>
QKV_DEVICE void copy_tile(const AttentionParams &params, const quantkv_half &half, const Piece &piece, int32_t first,
                          const int32_t *blocks, bool is_raw, unsigned char *to) {
  constexpr int kKeys = kPrefillKeys<kDim>;
  const int chunks = is_raw ? kDim / 16 : kDim / 8, elements = is_raw ? 16 : 8;
  for (int i = thread_index(); i < kKeys * chunks; i += kPrefillThreads) {
    int key = i / chunks, chunk = i % chunks, channel = chunk * elements;
    if (channel >= half.head_dim) continue;
    int32_t block = blocks[key];
    int slot = (first + key) & (params.paging.block_size() - 1);
    const unsigned char *from = static_cast<const unsigned char *>(half.codes);
    if (block >= 0) {
      int64_t element = row_index(half.map, block, piece.kv_head, slot) + channel_index(half, channel);
      from += is_raw ? element : 2 * element;
    }
    copy_async_16(is_raw ? to + i * 16 : chunk_of<kDim>(to, key, chunk), from, block >= 0);
  }
}

// The way of packed V: a step is `kRun` keys of a channel, 16 bytes. A warp has eight channels at a time, which may lie side by side.
template <int kKeys, int kRun> struct PackedStep {
  int channel, run;
  QKV_DEVICE explicit PackedStep(int i) : channel(i % 8 + i / (8 * (kKeys / kRun)) * 8), run(i / 8 % (kKeys / kRun)) {}
  // Of the run's keys, a bit each.
  QKV_DEVICE uint32_t present(const uint32_t *bits) const { return bits[run * kRun / kWarp] >> run * kRun % kWarp & ((1u << kRun) - 1); }
};

// copy_tile() of packed V: codes, kRun is 16, in the order of steps; or 16-bit elements to their chunks.
template <int kDim, int kRun>
QKV_DEVICE void copy_packed_tile(const AttentionParams &params, const Piece &piece, int32_t first, const int32_t *blocks, unsigned char *to) {
  constexpr int kKeys = kPrefillKeys<kDim>, kBytes = 16 / kRun;
  const quantkv_half &half = params.op.cache.v;
  for (int i = thread_index(); i < kDim * kKeys / kRun; i += kPrefillThreads) {
    const PackedStep<kKeys, kRun> step(i);
    if (step.channel >= half.head_dim) continue;
    const int32_t block = larger_of(blocks[step.run * kRun / 8], blocks[step.run * kRun / 8 + kRun / 8 - 1]);
    const int32_t slot = (first + step.run * kRun) & (params.paging.block_size() - 1);
    const unsigned char *from = static_cast<const unsigned char *>(half.codes);
    if (block >= 0) from += element_index(half, block, piece.kv_head, slot, step.channel) * kBytes;
    copy_async_16(kRun == 16 ? to + i * 16 : chunk_of_channel<kKeys>(to, step.channel, step.run), from, block >= 0);
  }
}

// The codes of that to a tile of f16. What is not `present` may be anything.
template <int kDim>
QKV_DEVICE void decode_packed_tile(const quantkv_half &half, const unsigned char *raw, const uint32_t *present, unsigned char *to) {
  constexpr int kKeys = kPrefillKeys<kDim>;
  dispatch_format(format_of(half), [&](auto tag) {
    constexpr Format F = decltype(tag)::value;
    if constexpr (is_quantized(F)) {
      QKV_UNROLL
      for (int n = 0; n < kKeys * kDim / 16 / kPrefillThreads; n++) {
        const int i = n * kPrefillThreads + thread_index();
        const PackedStep<kKeys, 16> step(i);
        Words<4> codes = *reinterpret_cast<const Words<4> *>(raw + i * 16);
        const uint32_t bits = step.present(present);
        if (bits != 0xffff) {
          QKV_UNROLL
          for (int j = 0; j < 4; j++) codes.w[j] &= ((bits >> 4 * j & 0xf) * 0x00204081u & 0x01010101u) * 0xffu;
        }
        QKV_UNROLL
        for (int half_run = 0; half_run < 2; half_run++) {
          Words<4> words;
          decode4_to_f16<F>(codes.w[2 * half_run], words.w[0], words.w[1]);
          decode4_to_f16<F>(codes.w[2 * half_run + 1], words.w[2], words.w[3]);
          *reinterpret_cast<Words<4> *>(chunk_of_channel<kKeys>(to, step.channel, 2 * step.run + half_run)) = words;
        }
      }
    }
  });
}

// Makes 16-bit elements of packed V that are not `present` zeros.
template <int kDim> QKV_DEVICE void drop_absent(const uint32_t *present, unsigned char *tile) {
  constexpr int kKeys = kPrefillKeys<kDim>;
  for (int i = thread_index(); i < kDim * kKeys / 8; i += kPrefillThreads) {
    const PackedStep<kKeys, 8> step(i);
    const uint32_t bits = step.present(present);
    Words<4> *const chunk = reinterpret_cast<Words<4> *>(chunk_of_channel<kKeys>(tile, step.channel, step.run));
    QKV_UNROLL
    for (int j = 0; j < 4; j++) chunk->w[j] &= (bits >> 2 * j & 1) * 0xffffu | (bits >> (2 * j + 1) & 1) * 0xffff0000u;
  }
}

// Raw codes [kKeys, kDim] to a tile of f16.
template <int kDim> QKV_DEVICE void decode_tile(const quantkv_half &half, const unsigned char *raw, unsigned char *to) {
  constexpr int kKeys = kPrefillKeys<kDim>;
  dispatch_format(format_of(half), [&](auto tag) {
    constexpr Format F = decltype(tag)::value;
    if constexpr (is_quantized(F)) {
      QKV_UNROLL
      for (int step = 0; step < kKeys * kDim / 16 / kPrefillThreads; step++) {
        int i = step * kPrefillThreads + thread_index(), key = i / (kDim / 16), chunk = i % (kDim / 16);
        Words<4> codes = *reinterpret_cast<const Words<4> *>(raw + i * 16);
        QKV_UNROLL
        for (int half_chunk = 0; half_chunk < 2; half_chunk++) {
          Words<4> words;
          decode4_to_f16<F>(codes.w[2 * half_chunk], words.w[0], words.w[1]);
          decode4_to_f16<F>(codes.w[2 * half_chunk + 1], words.w[2], words.w[3]);
          *reinterpret_cast<Words<4> *>(chunk_of<kDim>(to, key, 2 * chunk, half_chunk)) = words;
        }
      }
    }
  });
}

// ---- products

// s[n] = rows of this warp x keys 8n .. 8n + 8.
template <class T, int kDim>
QKV_DEVICE void multiply_queries(PrefillShared<kDim> &shared, unsigned char *keys, int k_head_dim,
                                 float (&s)[kPrefillKeys<kDim> / 8][4]) {
  constexpr int kTiles = kPrefillKeys<kDim> / 8;
  const int lane = lane_index();
  QKV_UNROLL
  for (int n = 0; n < kTiles; n++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
  }
  QKV_UNROLL
  for (int step = 0; step < kDim / 16; step++) {
    if (step * 16 >= k_head_dim) break;
    uint32_t q[4];
    load_matrix_x4(q, chunk_of<kDim>(shared.query, warp_index() * 16 + lane % 16, 2 * step, lane / 16));
    QKV_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t k[4];
      load_matrix_x4(k, chunk_of<kDim>(keys, 8 * n + lane % 8 + lane / 16 * 8, 2 * step, lane / 8 % 2));
      Products<T>::mma(s[n], q, k[0], k[1]);
      Products<T>::mma(s[n + 1], q, k[2], k[3]);
    }
  }
}

// o[c] += weights x channels 8c .. 8c + 8. V is [keys, kDim], or kPacked.
template <class T, int kDim, bool kPacked>
QKV_DEVICE void multiply_values(unsigned char *values, int v_head_dim, const float (&p)[kPrefillKeys<kDim> / 8][4],
                                float (&o)[kDim / 8][4]) {
  const int lane = lane_index();
  QKV_UNROLL
  for (int step = 0; step < kPrefillKeys<kDim> / 16; step++) {
    const float(&low)[4] = p[2 * step], (&high)[4] = p[2 * step + 1];
    uint32_t weights[4] = {Products<T>::pack(low[0], low[1]), Products<T>::pack(low[2], low[3]),
                           Products<T>::pack(high[0], high[1]), Products<T>::pack(high[2], high[3])};
    QKV_UNROLL
    for (int c = 0; c < kDim / 8; c += 2) {
      if (c * 8 >= v_head_dim) break;
      uint32_t v[4];
      if constexpr (kPacked) {
        load_matrix_x4(v, chunk_of_channel<kPrefillKeys<kDim>>(values, 8 * c + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      } else {
        load_matrix_x4_transposed(v, chunk_of<kDim>(values, 16 * step + lane % 16, c, lane / 16));
      }
      Products<T>::mma(o[c], weights, v[0], v[1]);
      Products<T>::mma(o[c + 1], weights, v[2], v[3]);
    }
  }
}

// ---- softmax

// Scores to weights relative to the new max; the accumulators follow.
template <int kKeys, int kTiles>
QKV_DEVICE void weigh_tile(PrefillRows &rows, float rescale_unit, float (&s)[kKeys / 8][4], float (&o)[kTiles][4]) {
  float rescale[2];
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    float top = rows.max[half];
    QKV_UNROLL
    for (int n = 0; n < kKeys / 8; n++) top = maximum(top, maximum(s[n][2 * half], s[n][2 * half + 1]));
    top = maximum(top, shuffle_xor(top, 1));
    top = maximum(top, shuffle_xor(top, 2));
    float weight = softmax_rescale(rows.max[half], top), reference = softmax_reference(top), total = 0.0f;
    QKV_UNROLL
    for (int n = 0; n < kKeys / 8; n++) {
      QKV_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        s[n][i] = exp2_approx(s[n][i] - reference);
        total += s[n][i];
      }
    }
    rows.max[half] = top;
    rows.sum[half] = rows.sum[half] * weight + total;
    rescale[half] = weight * rescale_unit;
  }
  if (any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
    QKV_UNROLL
    for (int c = 0; c < kTiles; c++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) o[c][i] *= rescale[i / 2];
    }
  }
}

// ---- a piece

// Whether some row of the piece does not see some token of the tile.
template <int kKeys>
QKV_DEVICE bool needs_mask(const AttentionParams &params, const Piece &piece, int32_t first, const uint32_t *present) {
  uint32_t all = present[0];
  QKV_UNROLL
  for (int i = 1; i < kKeys / kWarp; i++) all &= present[i];
  int32_t last_position = piece.first_position + piece.num_queries - 1;
  return all != 0xffffffffu || first + kKeys - 1 > piece.first_position ||
         first < visible_to(params, last_position).first;
}

template <class T, int kDim>
QKV_DEVICE void attend_prefill(const AttentionParams &params, const WorkList &list, const Piece &piece,
                               PrefillShared<kDim> &shared) {
  constexpr int kKeys = kPrefillKeys<kDim>;
  const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
  // Both halves are 8-bit, or both are not.
  const bool is_raw = FormatOf<T>::value == Format::F16 && is_quantized(format_of(k));
  unsigned char *k_copy = is_raw ? shared.tiles[1] : shared.tiles[0];
  unsigned char *v_copy = is_raw ? shared.tiles[1] + kKeys * kDim : shared.tiles[1];
  unsigned char *k_tile = shared.tiles[0], *v_tile = is_raw ? shared.tiles[0] : shared.tiles[1];
  const bool is_packed = kPrefillUnpacks<kDim> && slots_are_contiguous(v);
  const auto copy_values = [&](int32_t first, int stage) {
    if (!is_packed) copy_tile<kDim>(params, v, piece, first, shared.blocks[stage], is_raw, v_copy);
    else if constexpr (kPrefillUnpacks<kDim>) {
      if (is_raw) copy_packed_tile<kDim, 16>(params, piece, first, shared.blocks_of_runs[stage], v_copy);
      else copy_packed_tile<kDim, 8>(params, piece, first, shared.blocks_of_runs[stage], v_copy);
    }
    copy_async_commit();
  };

  int32_t first = piece.begin / kKeys * kKeys;
  int32_t block = block_entry<kKeys>(params, piece, first);
  sync_threads(); // the piece before is done with shared memory
  describe_tile(params, piece, first, block, 0, shared);
  block = block_entry<kKeys>(params, piece, first + kKeys);
  const auto query_chunk = [&](int row, int chunk) { return chunk_of<kDim>(shared.query, row, chunk); };
  const auto store_query = [&](int row, int chunk, const Words<4> &words) {
    *reinterpret_cast<Words<4> *>(query_chunk(row, chunk)) = words;
  };
  const float k_scale = load_prefill_queries<T, kDim>(params, piece, store_query, shared.query_factors);
  sync_threads();
  copy_tile<kDim>(params, k, piece, first, shared.blocks[0], is_raw, k_copy);
  copy_async_commit();
  copy_values(first, 0);

  PrefillRows rows = start_prefill_rows(params, piece, k_scale, shared.query_factors);
  float o[kDim / 8][4];
  QKV_UNROLL
  for (int c = 0; c < kDim / 8; c++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) o[c][i] = 0.0f;
  }

  int stage = 0;
  for (; first < piece.end; first += kKeys, stage ^= 1) {
    const int32_t next = first + kKeys;
    describe_tile(params, piece, next, block, stage ^ 1, shared);
    block = block_entry<kKeys>(params, piece, next + kKeys);

    // K of this tile is here, V is on its way.
    copy_async_wait<1>();
    sync_threads();
    if (is_raw) {
      decode_tile<kDim>(k, k_copy, k_tile);
      sync_threads();
      copy_tile<kDim>(params, k, piece, next, shared.blocks[stage ^ 1], is_raw, k_copy);
      copy_async_commit();
    }
    float s[kKeys / 8][4];
    multiply_queries<T>(shared, k_tile, k.head_dim, s);
    if (!is_raw) {
      sync_threads();
      copy_tile<kDim>(params, k, piece, next, shared.blocks[stage ^ 1], is_raw, k_copy);
      copy_async_commit();
    }
    bool is_masked = needs_mask<kKeys>(params, piece, first, shared.present[stage]);
    if (k.dynamic != nullptr) scale_products<kKeys>(shared.k_dynamic[stage], s);
    score_products<kKeys>(params, rows, first, s);
    if (is_masked) {
      mask_tile<kKeys>(rows, first, s);
      mask_holes<kKeys>(shared.present[stage], s);
    }
    float rescale_unit = v.dynamic == nullptr ? 1.0f : grow_unit(rows, shared.v_dynamic_max[stage]);
    weigh_tile<kKeys>(rows, rescale_unit, s, o);
    if (v.dynamic != nullptr) scale_weights<kKeys>(rows, shared.v_dynamic[stage], s);

    // V of this tile is here, K of the next one is on its way.
    copy_async_wait<1>();
    sync_threads();
    if (is_raw) {
      if (!is_packed) decode_tile<kDim>(v, v_copy, v_tile);
      else if constexpr (kPrefillUnpacks<kDim>) decode_packed_tile<kDim>(v, v_copy, shared.present[stage], v_tile);
      sync_threads();
      copy_values(next, stage ^ 1);
    } else if (is_packed && is_masked) {
      if constexpr (kPrefillUnpacks<kDim>) drop_absent<kDim>(shared.present[stage], v_tile);
      sync_threads();
    }
    if (!is_packed) multiply_values<T, kDim, false>(v_tile, v.head_dim, s, o);
    else if constexpr (kPrefillUnpacks<kDim>) multiply_values<T, kDim, true>(v_tile, v.head_dim, s, o);
    if (!is_raw) {
      sync_threads();
      copy_values(next, stage ^ 1);
    }
  }
  copy_async_wait<0>();

  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    rows.sum[half] += shuffle_xor(rows.sum[half], 1);
    rows.sum[half] += shuffle_xor(rows.sum[half], 2);
  }
  if (piece.slot >= 0) {
    store_prefill_partial<kDim>(params, list, piece, rows, o);
  } else {
    store_prefill_output<kDim>(params, piece, rows, o, query_chunk);
  }
}

#endif // QKV_HAS_TENSOR_CORES

// T: the type of the products. kDim: 64, 128 or 256, not below either head dim.
template <class T, int kDim>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kPrefillThreads, kPrefillBlocks) attend_prefill_kernel(
    QKV_GRID_CONSTANT const AttentionParams params, QKV_GRID_CONSTANT const WorkList list) {
#if QKV_HAS_TENSOR_CORES
  QKV_DYNAMIC_SHARED(memory);
  PrefillShared<kDim> &shared = *reinterpret_cast<PrefillShared<kDim> *>(memory);
  wait_for_previous_kernel();
  QKV_SHARED(SharedWork, work, 1);
  for (bool is_first = true; work->next(params, list, is_first); is_first = false) {
    attend_prefill<T>(params, list, work->piece, shared);
  }
#endif
}

} // namespace quantkv
