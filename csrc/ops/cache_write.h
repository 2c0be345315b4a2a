// cache_write: quantize keys and values and scatter them to their slots, K and V in one launch.
//
//   for t:  slot = slot_mapping[t]; negative: padding; past the cache: skipped, QUANTKV_FAULT_SLOT
//     for h, d:  codes[block, h, offset, d] = encode(x[t, h, d] / scale(h, d))
//
// A row is a (token, half, head): row r of a token is K head r, then V head r - heads. With dynamic scales the row's
// own scale comes from max |x / static| over its lanes and is stored beside the block.
//
//   cache_write_vectors   rows in vectors of 8 channels, see rows.h: several tokens' loads are under way at once, and
//                         the slot is looked up beside them, not before
//   cache_write_elements  a warp a row, an element a lane: any stride, alignment, chunk and head dim
#pragma once
#include "../core/rows.h"

namespace quantkv {

struct CacheWriteParams {
  quantkv_cache_write op;
  Paging paging;
  RowShare share;
};

// max |x| of 8 channels, NaN ignored.
template <Format A> QKV_DEVICE float vector_absmax(const Vector<A> &v) {
  float x[kVector], absmax = 0.0f;
  unpack_vector<A>(v, x);
  QKV_UNROLL
  for (int i = 0; i < kVector; i++) absmax = maximum(absmax, float_of(bits_of(x[i]) & 0x7fffffffu));
  return absmax;
}

// What a thread keeps of its row, all in bytes: the rest is looked up again where it is rarely needed.
template <int kVectors> struct RowToWrite {
  const char *source; // of the lane's first vector of token 0
  char *codes;        // of the same in (block 0, slot 0)
  int64_t token_bytes, block_bytes, slot_bytes;
  int64_t next_codes; // from the lane's first vector to its second
  int32_t vectors;    // the lane has, 0 .. kVectors

  QKV_DEVICE RowToWrite(const quantkv_half &half, const quantkv_rows &rows, Format activation, int head, int lane,
                        int lanes) {
    const int size = bytes_of(half), channel = lane * kVector, next = channel + lanes * kVector;
    const int64_t at = channel_index(half, channel);
    source = static_cast<const char *>(rows.data) + (row_index(rows, 0, head) + channel) * bytes_of(activation);
    codes = static_cast<char *>(half.codes) + (row_index(half.map, 0, head, 0) + at) * size;
    token_bytes = rows.token_stride * bytes_of(activation);
    block_bytes = half.map.block_stride * size;
    slot_bytes = half.map.slot_stride * size;
    vectors = channel < half.head_dim;
    next_codes = 0;
    if (kVectors > 1 && next < half.head_dim) {
      next_codes = (channel_index(half, next) - at) * size;
      vectors = 2;
    }
  }

  QKV_DEVICE char *at(int64_t block, int offset, int j) const {
    return codes + block * block_bytes + offset * slot_bytes + j * next_codes;
  }
};

// Which scales a launch has. Where both halves differ, the larger one; dynamic scales over static ones by channel are
// left to cache_write_elements.
enum class Scales { One, Channel, Dynamic };

// Blocks of a multiprocessor that the registers are shared by: as many as need no spills.
template <Scales kScales, int kVectors>
constexpr int kBlocksForRegisters =
    (kScales == Scales::One ? 4 : kScales == Scales::Channel && kVectors == 2 ? 2 : 3) - QKV_NEEDS_MORE_REGISTERS;

// kTokens: tokens a thread has in flight; kVectors: vectors of a row it holds of each. The grid covers all rows.
template <Format A, Scales kScales, int kTokens, int kVectors>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, (kBlocksForRegisters<kScales, kVectors>)) cache_write_vectors(const CacheWriteParams p) {
  using T = Stored<A>;
  wait_for_previous_kernel();
  const RowPlace place(p.share);
  const int lanes = p.share.lanes(), row = place.row;
  const bool is_key = row < p.paging.num_kv_heads, is_row = row < p.share.rows;
  const int head = is_row ? (is_key ? row : row - p.paging.num_kv_heads) : 0;
  const Format format = static_cast<Format>(is_key ? p.op.cache.k.format : p.op.cache.v.format);
  const RowToWrite<kVectors> to(choose_half(p.op.cache, is_key), choose_rows(p.op.key, p.op.value, is_key), A, head,
                                place.lane, lanes);
  auto token_of = [&](int i) { return place.first_token + i * p.share.side; };
  auto channel_of = [&](int j) { return (place.lane + j * lanes) * kVector; };
  auto source_of = [&](int64_t token, int j) {
    return to.source + token * to.token_bytes + j * lanes * kVector * bytes_of(A);
  };

  // All loads first.
  Vector<A> x[kTokens][kVectors];
  int64_t slots[kTokens];
  QKV_UNROLL
  for (int i = 0; i < kTokens; i++) {
    const int64_t token = token_of(i);
    const bool here = is_row && i < p.share.steps && token < p.op.num_tokens;
    slots[i] = here ? p.op.slot_mapping[token] : -1;
    QKV_UNROLL
    for (int j = 0; j < kVectors; j++) {
      x[i][j] = zero_vector<A>();
      if (here && j < to.vectors) x[i][j] = stream_vector<A>(source_of(token, j));
    }
  }
  RowScale fixed = {1.0f, nullptr, 0, 0.0f};
  if (is_quantized(format)) fixed = static_row_scale(choose_half(p.op.cache, is_key).scale, head);
  EasyScales<kScales == Scales::Channel> easy[kScales == Scales::Channel ? kVectors : 1];
  if constexpr (kScales == Scales::Channel) {
    QKV_UNROLL
    for (int j = 0; j < kVectors; j++) {
      QKV_UNROLL
      for (int i = 0; i < kVector; i++) easy[j].set(i, j < to.vectors ? fixed.at(channel_of(j) + i) : 1.0f);
    }
  } else {
    easy[0].set(0, fixed.one);
  }
  float *const dynamic = is_key ? p.op.cache.k.dynamic : p.op.cache.v.dynamic;
  Paging paging = p.paging;
  if (row != 0 || place.lane != 0) paging.faults = nullptr; // one report a token

  float dynamics[kTokens];
  uint32_t left = 0; // a bit for each vector that the fast path leaves
  QKV_UNROLL
  for (int i = 0; i < kTokens; i++) {
    int64_t block = 0;
    int offset = 0;
    const bool inside = checked_slot(paging, slots[i], block, offset);
    if constexpr (kScales == Scales::Dynamic) {
      float absmax = 0.0f;
      QKV_UNROLL
      for (int j = 0; j < kVectors; j++) absmax = maximum(absmax, vector_absmax(x[i][j]));
      for (int mask = lanes / 2; mask > 0; mask /= 2) absmax = maximum(absmax, shuffle_xor(absmax, mask));
      // Order survives a division by the one static scale: max |x / s| = max |x| / s.
      dynamics[i] = dynamic_scale(divide(absmax, fixed.one), format);
      if (dynamic != nullptr) {
        easy[0].set(0, combined_scale(fixed.one, dynamics[i]));
        if (inside && place.lane == 0) dynamic[dynamic_scale_index(paging, block, head, offset)] = dynamics[i];
      }
    }
    QKV_UNROLL
    for (int j = 0; j < kVectors; j++) {
      if (!inside || j >= to.vectors) continue;
      const auto &scales = easy[kScales == Scales::Channel ? j : 0];
      if (!store_fast(format, to.at(block, offset, j), x[i][j], scales)) left |= 1u << (i * kVectors + j);
    }
  }

  // One element at a time, read again: code and registers for what is rare are not multiplied.
  QKV_NO_UNROLL
  for (int k = 0; left != 0; k++, left >>= 1) {
    if ((left & 1) == 0) continue;
    const int i = k / kVectors, j = k % kVectors;
    int64_t block = 0;
    int offset = 0;
    if (!checked_slot(paging, p.op.slot_mapping[token_of(i)], block, offset)) continue;
    RowScale scale = fixed;
    if (kScales == Scales::Dynamic && dynamic != nullptr) {
      float own = dynamics[0];
      QKV_UNROLL
      for (int n = 1; n < kTokens; n++) own = n == i ? dynamics[n] : own;
      scale = with_dynamic(fixed, own);
    }
    const T *source = reinterpret_cast<const T *>(source_of(token_of(i), j));
    store_elements(format, to.at(block, offset, j), source, 0, kVector, 1, scale, channel_of(j));
  }
}

template <class T> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) cache_write_elements(const CacheWriteParams p) {
  wait_for_previous_kernel();
  const int64_t warps = static_cast<int64_t>(grid_size_x()) * (kRowThreads / kWarp);
  const int64_t rows = p.op.num_tokens * p.share.rows;
  for (int64_t i = static_cast<int64_t>(block_index_x()) * (kRowThreads / kWarp) + warp_index(); i < rows; i += warps) {
    const int64_t token = i / p.share.rows;
    const int row = static_cast<int>(i - token * p.share.rows);
    const bool is_key = row < p.paging.num_kv_heads;
    const int head = is_key ? row : row - p.paging.num_kv_heads;
    Paging paging = p.paging;
    if (row != 0 || lane_index() != 0) paging.faults = nullptr;
    int64_t block = 0;
    int offset = 0;
    if (!checked_slot(paging, p.op.slot_mapping[token], block, offset)) continue; // the same for the warp

    const quantkv_half half = choose_half(p.op.cache, is_key);
    const quantkv_rows from = choose_rows(p.op.key, p.op.value, is_key);
    const Format format = format_of(half);
    const T *x = static_cast<const T *>(from.data) + row_index(from, token, head);
    RowScale scale = {1.0f, nullptr, 0, 0.0f};
    if (is_quantized(format)) scale = static_row_scale(half.scale, head);
    if (is_quantized(format) && half.dynamic != nullptr) {
      float absmax = 0.0f;
      for (int d = lane_index(); d < half.head_dim; d += kWarp) {
        const float scaled = divide(to_f32(x[d]), scale.at(d));
        absmax = maximum(absmax, float_of(bits_of(scaled) & 0x7fffffffu));
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) absmax = maximum(absmax, shuffle_xor(absmax, mask));
      const float own = dynamic_scale(absmax, format);
      if (lane_index() == 0) half.dynamic[dynamic_scale_index(paging, block, head, offset)] = own;
      scale = with_dynamic(scale, own);
    }
    dispatch_format(format, [&](auto tag) {
      constexpr Format F = decltype(tag)::value;
      QKV_NO_UNROLL
      for (int d = lane_index(); d < half.head_dim; d += kWarp) {
        store_element<F>(half.codes, element_index(half, block, head, offset, d), x[d], scale.at(d));
      }
    });
  }
}

} // namespace quantkv
