// The attention kernel of sm_90a for many query rows: what it can do, and its launch.
#include "../hopper/paged_attention_prefill.h"
#include "../launch/paged_attention_kernels.h"

namespace quantkv {
namespace {

template <class T, bool kIsCodes, bool kDynamic, Order O, int kDim>
int launch_dim(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return QKV_LAUNCH_OVERLAPPED((attend_prefill_hopper<T, kIsCodes, kDim, kDynamic, O>), (Grid{list.workers, 1, 1}), kHopperThreads,
                               sizeof(HopperShared<kDim, kDynamic, O>), stream, params, list);
}

template <class T, bool kIsCodes, bool kDynamic = false, Order O = Order::Rows>
int launch_of(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  switch (padded_prefill_dim(params.op.cache)) {
  case 64: return launch_dim<T, kIsCodes, kDynamic, O, 64>(params, list, stream);
  case 128: return launch_dim<T, kIsCodes, kDynamic, O, 128>(params, list, stream);
  default:
    if constexpr (kDynamic || O == Order::Packed) return QUANTKV_UNSUPPORTED;
    else return launch_dim<T, kIsCodes, kDynamic, O, 256>(params, list, stream);
  }
}

template <int kDim> KernelShape shape_of() {
  constexpr KernelShape shape = kPrefillHopperShape<kDim>;
  static_assert(shape.tile == kHopperKeys<kDim> && shape.max_rows == kHopperRows, "the kernel's");
  return shape;
}

// The channels of a row of the cache lie within 31 bits of bytes.
bool row_is_short(const quantkv_half &half) { return channel_index(half, half.head_dim - 1) <= 0x7fffffff / bytes_of(half) - 1; }

} // namespace

KernelShape prefill_hopper_shape(const quantkv_paged_attention &op, const Device &device) {
  const quantkv_cache &cache = op.cache;
  if (slots_are_contiguous(cache.v) && !is_quantized(format_of(cache.v))) return KernelShape{};
  if (!kHasHopperKernels || device.compute_capability != 90 || !row_is_short(cache.k) || !row_is_short(cache.v)) return KernelShape{};
  switch (padded_prefill_dim(cache)) {
  case 64: return shape_of<64>();
  case 128: return shape_of<128>();
  default: return has_dynamic_scales(cache) ? KernelShape{} : shape_of<256>(); // whose registers are all in use
  }
}

int launch_prefill_hopper(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const Format format = format_of(params.op.cache.k);
  if (format == Format::BF16) return launch_of<bf16, false>(params, list, stream);
  const bool packed = slots_are_contiguous(params.op.cache.v);
  if (has_dynamic_scales(params.op.cache)) {
    return packed ? launch_of<f16, true, true, Order::Packed>(params, list, stream) : launch_of<f16, true, true>(params, list, stream);
  }
  if (packed) return launch_of<f16, true, false, Order::Packed>(params, list, stream);
  return is_quantized(format) ? launch_of<f16, true>(params, list, stream) : launch_of<f16, false>(params, list, stream);
}

} // namespace quantkv
