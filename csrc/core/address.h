// Where things of a paged cache lie, and whether they lie there at all.
//
// The ABI's structs (quantkv_half, quantkv_cache) are kernel parameters as they are; the functions here are what
// kernels ask of them. Slots, block ids and lengths are data nobody has checked: each passes through one of the
// checked_* functions, which answers false and sets a fault rather than naming memory outside the cache. Every
// index is 64 bits wide before it is multiplied.
#pragma once
#include "../quantkv.h"
#include "fp8.h"

namespace quantkv {

constexpr float kSmallestNormal = 1.17549435e-38f; // 2^-126
constexpr float kLargest = 3.40282347e+38f;        // f32::MAX

// ---- elements

// Whether the channels of a row lie side by side.
QKV_HOST_DEVICE bool row_is_contiguous(const quantkv_half &half) { return half.map.chunk >= half.head_dim; }

// Whether it is the slots of each channel that do, as in vLLM's packed V.
QKV_HOST_DEVICE bool slots_are_contiguous(const quantkv_half &half) {
  return !row_is_contiguous(half) && half.map.chunk == 1 && half.map.slot_stride == 1;
}

// The index of the first channel of (block, head, slot), in elements.
QKV_HOST_DEVICE int64_t row_index(const quantkv_address_map &map, int64_t block, int head, int slot) {
  return block * map.block_stride + head * map.head_stride + slot * map.slot_stride;
}

// The distance of a channel from its row's first. A chunk that matters is no longer than a row: 32 bits divide it.
QKV_HOST_DEVICE int64_t channel_index(const quantkv_half &half, int channel) {
  if (row_is_contiguous(half)) return channel;
  uint32_t chunk = static_cast<uint32_t>(half.map.chunk), d = static_cast<uint32_t>(channel);
  return static_cast<int64_t>(d / chunk) * half.map.chunk_stride + d % chunk;
}

QKV_HOST_DEVICE int64_t element_index(const quantkv_half &half, int64_t block, int head, int slot, int channel) {
  return row_index(half.map, block, head, slot) + channel_index(half, channel);
}

// The index of the first channel of (token, head) of activations.
QKV_HOST_DEVICE int64_t row_index(const quantkv_rows &rows, int64_t token, int head) {
  return token * rows.token_stride + head * rows.head_stride;
}

QKV_HOST_DEVICE Format format_of(const quantkv_half &half) { return static_cast<Format>(half.format); }
QKV_HOST_DEVICE int bytes_of(const quantkv_half &half) { return bytes_of(format_of(half)); }

// ---- blocks and slots

// What turns a slot or a block id into a place. Made on the host, so that a division by the block size is a shift.
struct Paging {
  int64_t num_blocks;
  int32_t block_shift; // log2 of the block size
  int32_t num_kv_heads;
  uint32_t *faults;

  QKV_HOST_DEVICE int block_size() const { return 1 << block_shift; }
};

inline Paging paging_of(const quantkv_cache &cache) {
  int shift = 0;
  while ((1 << shift) < cache.block_size) shift++;
  return Paging{cache.num_blocks, shift, cache.num_kv_heads, cache.faults};
}

// Whether a block id lies in the cache.
QKV_DEVICE bool is_block(const Paging &paging, int64_t id) { return id >= 0 && id < paging.num_blocks; }

// The same; a fault if not.
QKV_DEVICE bool checked_block(const Paging &paging, int64_t id) {
  bool inside = is_block(paging, id);
  if (!inside) set_fault(paging.faults, QUANTKV_FAULT_BLOCK);
  return inside;
}

// The (block, offset) of a slot. False for padding (negative), and with a fault for a slot past the end.
QKV_DEVICE bool checked_slot(const Paging &paging, int64_t slot, int64_t &block, int &offset) {
  if (slot < 0) return false;
  block = slot >> paging.block_shift;
  offset = static_cast<int>(slot & (paging.block_size() - 1));
  bool inside = block < paging.num_blocks;
  if (!inside) set_fault(paging.faults, QUANTKV_FAULT_SLOT);
  return inside;
}

// ---- scales

// Of K, of V or of both: kernels that know them look both up, and one that is not there is 1.
QKV_HOST_DEVICE bool has_dynamic_scales(const quantkv_cache &cache) { return cache.k.dynamic != nullptr || cache.v.dynamic != nullptr; }

// The index of the dynamic scale of (block, head, slot) in [num_blocks, num_kv_heads, block_size].
QKV_HOST_DEVICE int64_t dynamic_scale_index(const Paging &paging, int64_t block, int head, int slot) {
  return ((block * paging.num_kv_heads + head) << paging.block_shift) + slot;
}

// The same of (head, slot in the cache).
QKV_HOST_DEVICE int64_t dynamic_scale_of_slot(const Paging &paging, int64_t slot, int head) {
  const int offset = static_cast<int>(slot & (paging.block_size() - 1));
  return dynamic_scale_index(paging, slot >> paging.block_shift, head, offset);
}

// The static scale of (head, channel).
QKV_DEVICE float static_scale(const quantkv_scale &scale, int head, int channel) {
  return scale.values[head * scale.head_stride + channel * scale.channel_stride];
}

// The dynamic scale of a row whose largest |x / static| is `absmax` (not NaN, not negative): the row's largest
// value meets the format's largest code. Never zero or infinite.
QKV_DEVICE float dynamic_scale(float absmax, Format format) {
  float scale = divide(absmax < kLargest ? absmax : kLargest, max_finite(format));
  return scale > kSmallestNormal ? scale : kSmallestNormal;
}

// The one scale where a static and a dynamic one meet: their f32 product, kept finite and normal.
QKV_DEVICE float combined_scale(float fixed, float dynamic) {
  float scale = multiply(fixed, dynamic);
  scale = scale < kSmallestNormal ? kSmallestNormal : scale;
  return scale > kLargest ? kLargest : scale;
}

} // namespace quantkv
