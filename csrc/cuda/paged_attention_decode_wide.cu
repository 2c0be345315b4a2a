// The decode kernel of sm_90a for more rows than ops/paged_attention_decode.h takes, or takes as well: what it can do, and its launch.
#include "../hopper/paged_attention_decode_wide.h"
#include "../launch/paged_attention_kernels.h"

namespace quantkv {
namespace {

template <Format F, int Rows, bool Dynamic> int launch_of(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  using Shape = WideShape<F, Rows, Dynamic>;
  static_assert(Shape::kBlocks == kDecodeWideBlocks<Rows, Dynamic> && Shape::kTokens == kDecodeWideTile, "the kernel's");
  return QKV_LAUNCH_IN_ORDER((paged_attention_decode_wide<F, Rows, Dynamic>), (Grid{list.workers, 1, 1}), Shape::kThreads,
                             sizeof(WideShared<Shape>), stream, params, list);
}

template <Format F, bool Dynamic> int launch_rows(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  if constexpr (!Dynamic) {
    if (list.rows <= 16) return launch_of<F, 16, Dynamic>(params, list, stream);
  }
  return list.rows <= 32 ? launch_of<F, 32, Dynamic>(params, list, stream) : launch_of<F, 64, Dynamic>(params, list, stream);
}

template <Format F> int launch_format(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return has_dynamic_scales(params.op.cache) ? launch_rows<F, true>(params, list, stream) : launch_rows<F, false>(params, list, stream);
}

} // namespace

KernelShape decode_wide_shape(const quantkv_paged_attention &op, const Device &device, int64_t rows) {
  const quantkv_cache &cache = op.cache;
  const Format format = format_of(cache.k);
  const bool can = kHasHopperKernels && device.compute_capability == 90 && rows <= 64 &&
                   (format == Format::E4M3 || format == Format::E5M2) && cache.k.head_dim == 128 && decode_can_load(op) && prefill_can_load(op);
  if (!can || rows <= 8) return KernelShape{};
  // Where sequences and KV heads are few, the prefill kernel, or of 16 rows the other decode kernel, is as fast: each is cut into many
  // pieces, whose rows are merged by the block of the first one.
  const bool dynamic = has_dynamic_scales(cache);
  const int64_t pairs = op.num_seqs * cache.num_kv_heads;
  if (rows <= 16) return pairs < 64 || dynamic ? KernelShape{} : kDecodeWideShape<16>;
  if (rows <= 32) return pairs < 8 ? KernelShape{} : dynamic ? kDecodeWideShape<32, true> : kDecodeWideShape<32>;
  return pairs < 32 ? KernelShape{} : kDecodeWideShape<64>;
}

int launch_decode_wide(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  return format_of(params.op.cache.k) == Format::E4M3 ? launch_format<Format::E4M3>(params, list, stream)
                                                      : launch_format<Format::E5M2>(params, list, stream);
}

} // namespace quantkv
