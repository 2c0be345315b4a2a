// The attention kernel of sm_90a for many query rows: what it can do, and its launch.
#include "../hopper/paged_attention_prefill.h"
#include "../launch/paged_attention_kernels.h"

namespace quantkv {
namespace {

template <class T, bool kIsCodes, bool kDynamic, int kDim>
int launch_dim(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return QKV_LAUNCH_OVERLAPPED((attend_prefill_hopper<T, kIsCodes, kDim, kDynamic>), (Grid{list.workers, 1, 1}), kHopperThreads,
                               sizeof(HopperShared<kDim, kDynamic>), stream, params, list);
}

template <class T, bool kIsCodes, bool kDynamic = false>
int launch_of(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return params.op.cache.k.head_dim == 64 ? launch_dim<T, kIsCodes, kDynamic, 64>(params, list, stream)
                                          : launch_dim<T, kIsCodes, kDynamic, 128>(params, list, stream);
}

bool is_dynamic(const quantkv_cache &cache) { return cache.k.dynamic != nullptr || cache.v.dynamic != nullptr; }

} // namespace

KernelShape prefill_hopper_shape(const quantkv_paged_attention &op, const Device &device) {
  const quantkv_cache &cache = op.cache;
  const bool can = kHasHopperKernels && device.compute_capability == 90 && cache.k.head_dim == cache.v.head_dim &&
                   (cache.k.head_dim == 64 || cache.k.head_dim == 128) &&
                   (!is_dynamic(cache) || (is_quantized(format_of(cache.k)) && is_quantized(format_of(cache.v)))) &&
                   op.soft_cap == 0.0f && op.alibi_slopes == nullptr;
  static_assert(kPrefillHopperShape.tile == kHopperKeys && kPrefillHopperShape.max_rows == kHopperRows, "the kernel's");
  return can ? kPrefillHopperShape : KernelShape{};
}

int launch_prefill_hopper(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const Format format = format_of(params.op.cache.k);
  if (format == Format::BF16) return launch_of<bf16, false>(params, list, stream);
  if (is_dynamic(params.op.cache)) return launch_of<f16, true, true>(params, list, stream);
  return is_quantized(format) ? launch_of<f16, true>(params, list, stream) : launch_of<f16, false>(params, list, stream);
}

} // namespace quantkv
