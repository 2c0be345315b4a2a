// Which calls the decode kernel takes, whatever the format; see paged_attention_decode.h.
#include "paged_attention_decode.h"

namespace quantkv {

template <> DecodeConfig decode_config_of<Format::E4M3>(const quantkv_paged_attention &, const Device &, int32_t);
template <> DecodeConfig decode_config_of<Format::E5M2>(const quantkv_paged_attention &, const Device &, int32_t);
template <> DecodeConfig decode_config_of<Format::F16>(const quantkv_paged_attention &, const Device &, int32_t);
template <> DecodeConfig decode_config_of<Format::BF16>(const quantkv_paged_attention &, const Device &, int32_t);
template <> int launch_decode_of<Format::E4M3>(const AttentionParams &, const WorkList &, const Device &, void *);
template <> int launch_decode_of<Format::E5M2>(const AttentionParams &, const WorkList &, const Device &, void *);
template <> int launch_decode_of<Format::F16>(const AttentionParams &, const WorkList &, const Device &, void *);
template <> int launch_decode_of<Format::BF16>(const AttentionParams &, const WorkList &, const Device &, void *);

// Rows contiguous and, like blocks and heads, on 16 bytes; blocks and offsets inside one fit 31 bits.
static bool half_is_loadable(const quantkv_cache &cache, const quantkv_half &half) {
  const quantkv_address_map &map = half.map;
  const int64_t bytes = bytes_of(half);
  if (!row_is_contiguous(half) || reinterpret_cast<uintptr_t>(half.codes) % 16 != 0) return false;
  if (map.block_stride * bytes % 16 != 0 || map.head_stride * bytes % 16 != 0 || map.slot_stride * bytes % 16 != 0) return false;
  const int64_t limit = 0x7fffffff / bytes;
  if (map.block_stride > limit) return false;
  return map.head_stride <= limit / cache.num_kv_heads - half.head_dim && map.slot_stride <= limit / cache.block_size / 2;
}

bool decode_can_load(const quantkv_paged_attention &op) {
  const quantkv_cache &cache = op.cache;
  if (op.activation == QUANTKV_F32 || cache.num_blocks == 0) return false;
  if (cache.k.format != cache.v.format || cache.k.head_dim != cache.v.head_dim) return false;
  return half_is_loadable(cache, cache.k) && half_is_loadable(cache, cache.v);
}

DecodeConfig decode_config(const quantkv_paged_attention &op, const Device &device, int32_t rows) {
  const DecodeConfig none = {0, 0};
  if (device.compute_capability < 80 || !decode_can_load(op)) return none;
  switch (static_cast<Format>(op.cache.k.format)) {
  case Format::E4M3: return decode_config_of<Format::E4M3>(op, device, rows);
  case Format::E5M2: return decode_config_of<Format::E5M2>(op, device, rows);
  case Format::F16: return decode_config_of<Format::F16>(op, device, rows);
  case Format::BF16: return op.activation == QUANTKV_BF16 ? decode_config_of<Format::BF16>(op, device, rows) : none;
  default: return none;
  }
}

int launch_decode(const AttentionParams &params, const WorkList &list, const Device &device, void *stream) {
  switch (static_cast<Format>(params.op.cache.k.format)) {
  case Format::E4M3: return launch_decode_of<Format::E4M3>(params, list, device, stream);
  case Format::E5M2: return launch_decode_of<Format::E5M2>(params, list, device, stream);
  case Format::F16: return launch_decode_of<Format::F16>(params, list, device, stream);
  case Format::BF16: return launch_decode_of<Format::BF16>(params, list, device, stream);
  default: return QUANTKV_UNSUPPORTED;
  }
}

} // namespace quantkv
