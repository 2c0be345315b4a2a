#define QKV_CODE_OBJECT quantkv_hip_code_paged_attention_matrix
// Attention by matrix cores on ROCm: which calls the kernel takes, and its launch. It stands where CUDA has a kernel for
// many query rows; there is none of its own for few.
#include "../amdgcn/paged_attention_matrix.h"
#include "../launch/paged_attention_kernels.h"

namespace quantkv {
namespace {

template <class T> int launch_of(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const Grid grid = {list.workers, 1, 1};
  const quantkv_cache &cache = params.op.cache;
  const int32_t dim = cache.k.head_dim > cache.v.head_dim ? cache.k.head_dim : cache.v.head_dim;
  if (dim <= 64) return QKV_LAUNCH((attend_matrix_kernel<T, 64>), grid, kMatrixThreads, 0, stream, params, list);
  if (dim <= 128) return QKV_LAUNCH((attend_matrix_kernel<T, 128>), grid, kMatrixThreads, 0, stream, params, list);
  return QKV_LAUNCH((attend_matrix_kernel<T, 256>), grid, kMatrixThreads, 0, stream, params, list);
}

} // namespace

DecodeConfig decode_config(const quantkv_paged_attention &, const Device &, int32_t) { return DecodeConfig{0, 0}; }
int launch_decode(const AttentionParams &, const WorkList &, const Device &, void *) { return QUANTKV_UNSUPPORTED; }
KernelShape decode_wide_shape(const quantkv_paged_attention &, const Device &, int64_t) { return KernelShape{}; }
int launch_decode_wide(const AttentionParams &, const WorkList &, quantkv_stream) { return QUANTKV_UNSUPPORTED; }

KernelShape prefill_shape(const quantkv_cache &cache, int32_t activation, const Device &) {
  const Format k = format_of(cache.k), v = format_of(cache.v);
  const bool formats = is_quantized(k) ? is_quantized(v) : k == v && k != Format::F32;
  // As on CUDA: a cache of bf16 has products of bf16, which activations of f16 would not fit.
  const bool activations = activation == QUANTKV_F16 || activation == QUANTKV_BF16;
  const bool fits = k != Format::BF16 || activation == QUANTKV_BF16;
  const bool dims = cache.k.head_dim <= 256 && cache.v.head_dim <= 256;
  const bool is_static = cache.k.dynamic == nullptr && cache.v.dynamic == nullptr;
  if (!formats || !activations || !fits || !dims || !is_static) return KernelShape{0, 0, 0, 0, 0};
  // Workers and rows are the portable kernel's: the workspace is.
  return KernelShape{kMatrixTokens, kMatrixRows, 2, 1, 0};
}
bool prefill_can_load(const quantkv_paged_attention &) { return true; }
int launch_prefill(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return format_of(params.op.cache.k) == Format::BF16 ? launch_of<bf16>(params, list, stream)
                                                      : launch_of<f16>(params, list, stream);
}

KernelShape prefill_hopper_shape(const quantkv_paged_attention &, const Device &) { return KernelShape{0, 0, 0, 0, 0}; }
int launch_prefill_hopper(const AttentionParams &, const WorkList &, quantkv_stream) { return QUANTKV_UNSUPPORTED; }

} // namespace quantkv
