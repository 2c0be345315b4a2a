// The attention kernel of sm_90a for many query rows: what it can do, and its launch.
#include "../hopper/paged_attention_prefill.h"
#include "../launch/paged_attention_kernels.h"

namespace quantkv {
namespace {

template <class T, bool kIsCodes>
int launch_of(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const Grid grid = {list.workers, 1, 1};
  if (params.op.cache.k.head_dim == 64) {
    return QKV_LAUNCH_OVERLAPPED((attend_prefill_hopper<T, kIsCodes, 64>), grid, kHopperThreads, kHopperSharedBytes<64>,
                                 stream, params, list);
  }
  return QKV_LAUNCH_OVERLAPPED((attend_prefill_hopper<T, kIsCodes, 128>), grid, kHopperThreads, kHopperSharedBytes<128>,
                               stream, params, list);
}

} // namespace

KernelShape prefill_hopper_shape(const quantkv_paged_attention &op, const Device &device) {
  const quantkv_cache &cache = op.cache;
  const bool can = kHasHopperKernels && device.compute_capability == 90 && cache.k.head_dim == cache.v.head_dim &&
                   (cache.k.head_dim == 64 || cache.k.head_dim == 128) && cache.k.dynamic == nullptr &&
                   cache.v.dynamic == nullptr &&
                   op.soft_cap == 0.0f && op.alibi_slopes == nullptr;
    static_assert(kPrefillHopperShape.tile == kHopperKeys && kPrefillHopperShape.max_rows == kHopperRows, "the kernel's");
  return can ? kPrefillHopperShape : KernelShape{};
}

int launch_prefill_hopper(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const Format format = format_of(params.op.cache.k);
  if (format == Format::BF16) return launch_of<bf16, false>(params, list, stream);
  return is_quantized(format) ? launch_of<f16, true>(params, list, stream) : launch_of<f16, false>(params, list, stream);
}

} // namespace quantkv
