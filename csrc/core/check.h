// What launchers check before a launch: all that the host can see of a call. Host code.
//
// Every product that a kernel forms of indices in range must fit in 64 bits: sizes are bounded here, so that kernels
// need not look. Whether buffers are as long as their strides say is the caller's word.
#pragma once
#include "../quantkv.h"
#include "platform.h"

namespace quantkv {

constexpr int32_t kMaxHeadDim = 512;
constexpr int32_t kMaxHeads = 65535;      // rows of a token fit the second dimension of a grid
constexpr int64_t kMaxBlocks = 0x7fffffff; // what an i32 block table can name

// Leaves the function with a status that is not QUANTKV_OK.
#define QKV_CHECK(status)                                                                                              \
  do {                                                                                                                 \
    const int qkv_status = (status);                                                                                   \
    if (qkv_status != QUANTKV_OK) return qkv_status;                                                                   \
  } while (false)

inline int valid_if(bool condition) { return condition ? QUANTKV_OK : QUANTKV_INVALID_ARGUMENT; }

inline bool is_format(int32_t format) { return format >= 0 && format < kFormats; }
inline bool is_activation(int32_t format) { return format >= QUANTKV_F32 && format <= QUANTKV_BF16; }

inline bool is_aligned(const void *p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uint64_t>(bytes) == 0;
}

// a * b + c for numbers that are not negative; -1 if one is, or if it is more than memory can hold. Nothing times a
// stride is nothing, whatever the stride.
inline int64_t product_plus(int64_t a, int64_t b, int64_t c) {
  constexpr int64_t limit = INT64_C(1) << 60;
  if (a == 0) b = 0;
  if (a < 0 || b < 0 || c < 0 || a > limit || b > limit || c > limit) return -1;
  if (a != 0 && b > limit / a) return -1;
  const int64_t sum = a * b + c;
  return sum <= limit ? sum : -1;
}

// The offset of the last of count[i] steps of stride[i], in elements, plus `last`; -1 if it is not a size.
inline int64_t extent(int64_t count0, int64_t stride0, int64_t count1, int64_t stride1, int64_t last) {
  const int64_t inner = product_plus(count1 > 0 ? count1 - 1 : 0, stride1, last);
  return inner < 0 ? -1 : product_plus(count0 > 0 ? count0 - 1 : 0, stride0, inner);
}

// ---- strides that nothing is multiplied by may be anything: zero from here on, so that no product of them overflows

inline quantkv_rows used_strides(quantkv_rows rows, int64_t tokens, int32_t heads) {
  if (tokens <= 1) rows.token_stride = 0;
  if (heads <= 1) rows.head_stride = 0;
  return rows;
}
inline quantkv_scale used_strides(quantkv_scale scale, int32_t heads, int32_t dim) {
  if (heads <= 1) scale.head_stride = 0;
  if (dim <= 1) scale.channel_stride = 0;
  return scale;
}
inline quantkv_cache used_strides(quantkv_cache cache) {
  quantkv_half *const halves[] = {&cache.k, &cache.v};
  for (quantkv_half *half : halves) {
    half->scale = used_strides(half->scale, cache.num_kv_heads, half->head_dim);
    if (cache.num_blocks <= 1) half->map.block_stride = 0;
    if (cache.num_kv_heads <= 1) half->map.head_stride = 0;
    if (half->map.chunk >= half->head_dim) half->map.chunk_stride = 0;
  }
  return cache;
}

// ---- checks

inline int check_heads(int32_t heads) {
  if (heads > kMaxHeads) return QUANTKV_UNSUPPORTED;
  return valid_if(heads > 0);
}

// The static scales of [heads, dim] values of `format`.
inline int check_scale(const quantkv_scale &scale, int32_t format, int32_t heads, int32_t dim) {
  if (!is_quantized(static_cast<Format>(format))) return QUANTKV_OK;
  return valid_if(scale.values != nullptr && is_aligned(scale.values, 4) &&
                  extent(heads, scale.head_stride, dim, scale.channel_stride, 0) >= 0);
}

// Rows [tokens, heads, dim] of activations, or of any format. Their address may be null if there are no tokens.
inline int check_rows(const quantkv_rows &rows, int32_t format, int64_t tokens, int32_t heads, int64_t dim,
                      bool any_format = false) {
  if (!(any_format ? is_format(format) : is_activation(format)) || tokens < 0) return QUANTKV_INVALID_ARGUMENT;
  if (tokens == 0) return QUANTKV_OK;
  return valid_if(rows.data != nullptr && is_aligned(rows.data, bytes_of(static_cast<Format>(format))) &&
                  extent(tokens, rows.token_stride, heads, rows.head_stride, dim) >= 0);
}

inline int check_half(const quantkv_half &half, const quantkv_cache &cache, bool reads_scales) {
  if (!is_format(half.format)) return QUANTKV_INVALID_ARGUMENT;
  if (half.head_dim < 1 || half.head_dim > kMaxHeadDim) return QUANTKV_UNSUPPORTED;
  const Format format = static_cast<Format>(half.format);
  const quantkv_address_map &map = half.map;
  // Chunks and slots of a row, then heads and blocks of them.
  const int64_t chunks = map.chunk > 0 ? (half.head_dim + map.chunk - 1) / map.chunk : -1;
  const int64_t row = chunks < 0 ? -1 : extent(cache.block_size, map.slot_stride, chunks, map.chunk_stride, map.chunk);
  const int64_t all =
      row < 0 ? -1 : extent(cache.num_blocks, map.block_stride, cache.num_kv_heads, map.head_stride, row);
  if (half.codes == nullptr || !is_aligned(half.codes, bytes_of(format)) || all < 0) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(valid_if(half.dynamic == nullptr || (is_quantized(format) && is_aligned(half.dynamic, 4))));
  return reads_scales ? check_scale(half.scale, half.format, cache.num_kv_heads, half.head_dim) : QUANTKV_OK;
}

// Without `reads_scales` static scales may be missing.
inline int check_cache(const quantkv_cache &cache, bool reads_scales = true) {
  const int32_t size = cache.block_size;
  if (size < 8 || size > 256 || (size & (size - 1)) != 0) return QUANTKV_UNSUPPORTED;
  if (cache.num_blocks < 1 || !is_aligned(cache.faults, 4)) return QUANTKV_INVALID_ARGUMENT;
  if (cache.num_blocks > kMaxBlocks) return QUANTKV_UNSUPPORTED;
  QKV_CHECK(check_heads(cache.num_kv_heads));
  QKV_CHECK(check_half(cache.k, cache, reads_scales));
  return check_half(cache.v, cache, reads_scales);
}

// ---- whether rows can be read and written in vectors of 8 channels (rows.h)

inline bool rows_have_vectors(const quantkv_rows &rows, int32_t format, int64_t dim) {
  const int64_t size = bytes_of(static_cast<Format>(format)), alignment = size == 1 ? 8 : 16;
  return dim % 8 == 0 && is_aligned(rows.data, alignment) && rows.token_stride * size % alignment == 0 &&
         rows.head_stride * size % alignment == 0;
}

inline bool half_has_vectors(const quantkv_half &half) {
  const int64_t size = bytes_of(static_cast<Format>(half.format)), alignment = size == 1 ? 8 : 16;
  const quantkv_address_map &map = half.map;
  const bool is_whole = map.chunk >= half.head_dim || (map.chunk % 8 == 0 && map.chunk_stride * size % alignment == 0);
  return half.head_dim % 8 == 0 && is_whole && is_aligned(half.codes, alignment) &&
         map.block_stride * size % alignment == 0 && map.head_stride * size % alignment == 0 &&
         map.slot_stride * size % alignment == 0;
}

} // namespace quantkv
