// The tensor-core attention kernel for many query rows: what it can do, and its launch.
#include "../ops/paged_attention_prefill.h"
#include "../launch/paged_attention_kernels.h"

namespace quantkv {
namespace {

template <class T, int kDim> int launch_of(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return QKV_LAUNCH_OVERLAPPED((attend_prefill_kernel<T, kDim>), (Grid{list.workers, 1, 1}), kPrefillThreads,
                               sizeof(PrefillShared<kDim>), stream, params, list);
}

// Both halves alike: 8-bit or f16, for f16 products; or bf16 with bf16 queries.
bool formats_are_possible(const quantkv_cache &cache, int32_t activation) {
  const Format k = format_of(cache.k), v = format_of(cache.v);
  if (activation == QUANTKV_F32) return false;
  if (is_quantized(k)) return is_quantized(v);
  return k == v && (k == Format::F16 || (k == Format::BF16 && activation == QUANTKV_BF16));
}

// Whether rows of 16-bit elements can be read 16 bytes at a time.
bool rows_are_aligned(const quantkv_rows &rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && (rows.token_stride | rows.head_stride) % 8 == 0;
}

// Whether 16 bytes from a multiple of 16 bytes on lie together and aligned, in every row.
bool half_is_aligned(const quantkv_half &half) {
  const quantkv_address_map &map = half.map;
  int64_t strides = map.block_stride | map.head_stride | map.slot_stride;
  if (!row_is_contiguous(half)) strides |= map.chunk | map.chunk_stride;
  return reinterpret_cast<uintptr_t>(half.codes) % 16 == 0 && strides * bytes_of(half) % 16 == 0;
}

// Whether 16 bytes of V from a multiple of 16 on are aligned and in one block: channels of a row or, where V is packed, slots.
bool values_are_aligned(const quantkv_cache &cache) {
  if (!slots_are_contiguous(cache.v)) return half_is_aligned(cache.v);
  const quantkv_address_map &map = cache.v.map;
  const int64_t strides = map.block_stride | map.head_stride | map.chunk_stride | cache.block_size;
  return padded_prefill_dim(cache) <= 128 && reinterpret_cast<uintptr_t>(cache.v.codes) % 16 == 0 && strides * bytes_of(cache.v) % 16 == 0;
}
static_assert(kPrefillUnpacks<128> && !kPrefillUnpacks<256>, "the kernel's");

} // namespace

int padded_prefill_dim(const quantkv_cache &cache) {
  const int dim = cache.k.head_dim > cache.v.head_dim ? cache.k.head_dim : cache.v.head_dim;
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

KernelShape prefill_shape(const quantkv_cache &cache, int32_t activation, const Device &device) {
  const KernelShape none = {0, 0, 0, 0};
  if (device.compute_capability < 80 || !formats_are_possible(cache, activation)) return none;
  if (cache.k.head_dim > 256 || cache.v.head_dim > 256) return none;
  if (cache.k.head_dim % 16 != 0 || cache.v.head_dim % 16 != 0) return none;
  return KernelShape{padded_prefill_dim(cache) <= 128 ? kPrefillKeys<128> : kPrefillKeys<256>, kPrefillRows, kPrefillBlocks, 4};
}

bool prefill_can_load(const quantkv_paged_attention &op) {
  const quantkv_cache &cache = op.cache;
  return half_is_aligned(cache.k) && values_are_aligned(cache) && rows_are_aligned(op.query) && rows_are_aligned(op.output);
}

int launch_prefill(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const bool is_bf16 = format_of(params.op.cache.k) == Format::BF16;
  switch (padded_prefill_dim(params.op.cache)) {
  case 64: return is_bf16 ? launch_of<bf16, 64>(params, list, stream) : launch_of<f16, 64>(params, list, stream);
  case 128: return is_bf16 ? launch_of<bf16, 128>(params, list, stream) : launch_of<f16, 128>(params, list, stream);
  default: return is_bf16 ? launch_of<bf16, 256>(params, list, stream) : launch_of<f16, 256>(params, list, stream);
  }
}

} // namespace quantkv
