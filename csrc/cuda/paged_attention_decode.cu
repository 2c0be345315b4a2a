// Which calls the decode kernel takes, whatever the format; see paged_attention_decode.h.
#include "paged_attention_decode.h"

namespace quantkv {

#define QKV_DECLARE_DECODE(F, O)                                                                                        \
  template <> DecodeConfig decode_config_of<F, O>(const quantkv_paged_attention &, const Device &, int32_t);           \
  template <> int launch_decode_of<F, O>(const AttentionParams &, const WorkList &, const Device &, void *);
QKV_DECLARE_DECODE(Format::E4M3, Order::Rows)
QKV_DECLARE_DECODE(Format::E5M2, Order::Rows)
QKV_DECLARE_DECODE(Format::F16, Order::Rows)
QKV_DECLARE_DECODE(Format::BF16, Order::Rows)
QKV_DECLARE_DECODE(Format::E4M3, Order::Packed)
QKV_DECLARE_DECODE(Format::E5M2, Order::Packed)
QKV_DECLARE_DECODE(Format::F16, Order::Packed)
QKV_DECLARE_DECODE(Format::BF16, Order::Packed)
#undef QKV_DECLARE_DECODE

// Blocks, heads and the first element on 16 bytes; blocks and offsets inside one fit 31 bits. `row_end`: how far the channels of a row reach.
static bool half_is_loadable(const quantkv_cache &cache, const quantkv_half &half, int64_t row_end) {
  const quantkv_address_map &map = half.map;
  const int64_t bytes = bytes_of(half);
  if (reinterpret_cast<uintptr_t>(half.codes) % 16 != 0) return false;
  if (map.block_stride * bytes % 16 != 0 || map.head_stride * bytes % 16 != 0) return false;
  const int64_t limit = 0x7fffffff / bytes;
  if (map.block_stride > limit) return false;
  return map.head_stride <= limit / cache.num_kv_heads - row_end && map.slot_stride <= limit / cache.block_size / 2;
}

// Rows contiguous and aligned.
static bool row_is_loadable(const quantkv_cache &cache, const quantkv_half &half) {
  return row_is_contiguous(half) && half.map.slot_stride * bytes_of(half) % 16 == 0 && half_is_loadable(cache, half, half.head_dim);
}

// Runs of `chunk` channels, of all slots side by side.
static bool packed_is_loadable(const quantkv_cache &cache, const quantkv_half &half, int64_t chunk) {
  const quantkv_address_map &map = half.map;
  if (map.chunk != chunk || map.slot_stride != chunk || map.chunk_stride * bytes_of(half) % 8 != 0) return false;
  const int64_t limit = 0x7fffffff / 4, chunks = ceil_div(half.head_dim, chunk);
  return map.chunk_stride <= limit / chunks && half_is_loadable(cache, half, chunks * map.chunk_stride);
}

static bool is_loadable(const quantkv_paged_attention &op) {
  const quantkv_cache &cache = op.cache;
  return op.activation != QUANTKV_F32 && cache.num_blocks > 0 && cache.k.format == cache.v.format && cache.k.head_dim == cache.v.head_dim;
}

bool decode_can_load(const quantkv_paged_attention &op) {
  const quantkv_cache &cache = op.cache;
  return is_loadable(op) && row_is_loadable(cache, cache.k) && row_is_loadable(cache, cache.v);
}

// The same of packed rows.
static bool decode_can_unpack(const quantkv_paged_attention &op) {
  const quantkv_cache &cache = op.cache;
  return is_loadable(op) && packed_is_loadable(cache, cache.k, kPackedRun / bytes_of(cache.k)) && packed_is_loadable(cache, cache.v, 1);
}

// Calls visit.template run<F, O>() for the format of K and V.
template <Order O, class Visit> static int visit_format(const quantkv_paged_attention &op, Visit visit) {
  switch (static_cast<Format>(op.cache.k.format)) {
  case Format::E4M3: return visit.template run<Format::E4M3, O>();
  case Format::E5M2: return visit.template run<Format::E5M2, O>();
  case Format::F16: return visit.template run<Format::F16, O>();
  case Format::BF16: return op.activation == QUANTKV_BF16 ? visit.template run<Format::BF16, O>() : QUANTKV_UNSUPPORTED;
  default: return QUANTKV_UNSUPPORTED;
  }
}

namespace {

struct FindConfig {
  const quantkv_paged_attention &op;
  const Device &device;
  int32_t rows;
  DecodeConfig &config;

  template <Format F, Order O> int run() {
    config = decode_config_of<F, O>(op, device, rows);
    return QUANTKV_OK;
  }
};

struct LaunchFormat {
  const AttentionParams &params;
  const WorkList &list;
  const Device &device;
  void *stream;

  template <Format F, Order O> int run() { return launch_decode_of<F, O>(params, list, device, stream); }
};

} // namespace

DecodeConfig decode_config(const quantkv_paged_attention &op, const Device &device, int32_t rows) {
  DecodeConfig config = {0, 0};
  if (device.compute_capability < 80) return config;
  if (decode_can_load(op)) visit_format<Order::Rows>(op, FindConfig{op, device, rows, config});
  else if (decode_can_unpack(op)) visit_format<Order::Packed>(op, FindConfig{op, device, rows, config});
  return config;
}

int launch_decode(const AttentionParams &params, const WorkList &list, const Device &device, void *stream) {
  const LaunchFormat launch = {params, list, device, stream};
  return decode_can_load(params.op) ? visit_format<Order::Rows>(params.op, launch) : visit_format<Order::Packed>(params.op, launch);
}

} // namespace quantkv
