// Attention by matrix cores, on ROCm: there is none yet, so that the portable kernel takes every call.
#include "../launch/paged_attention_kernels.h"

namespace quantkv {

DecodeConfig decode_config(const quantkv_paged_attention &, const Device &, int32_t) { return DecodeConfig{0, 0}; }
int launch_decode(const AttentionParams &, const WorkList &, const Device &, void *) { return QUANTKV_UNSUPPORTED; }

KernelShape prefill_shape(const quantkv_cache &, int32_t, const Device &) { return KernelShape{0, 0, 0, 0, 0}; }
bool prefill_can_load(const quantkv_paged_attention &) { return false; }
int launch_prefill(const AttentionParams &, const WorkList &, quantkv_stream) { return QUANTKV_UNSUPPORTED; }

KernelShape prefill_hopper_shape(const quantkv_paged_attention &, const Device &) { return KernelShape{0, 0, 0, 0, 0}; }
int launch_prefill_hopper(const AttentionParams &, const WorkList &, quantkv_stream) { return QUANTKV_UNSUPPORTED; }

} // namespace quantkv
