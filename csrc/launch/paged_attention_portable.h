// The f32 attention kernel: its launch.
#pragma once
#include "../ops/paged_attention_portable.h"
#include "paged_attention_kernels.h"

namespace quantkv {

KernelShape portable_shape() { return KernelShape{kPortableTokens, kPortableRows, 2, 2}; }

int launch_portable(const AttentionParams &params, const WorkList &list, quantkv_stream stream) {
  const Grid grid = {list.workers, 1, 1};
  const size_t shared_bytes = portable_shared_bytes(params.op.cache.k.head_dim);
  if (params.op.cache.v.head_dim <= 2 * kPortableChannels) {
    return QKV_LAUNCH_OVERLAPPED((attend_portable_kernel<2>), grid, kPortableThreads, shared_bytes, stream, params, list);
  }
  return QKV_LAUNCH_OVERLAPPED((attend_portable_kernel<4>), grid, kPortableThreads, shared_bytes, stream, params, list);
}

} // namespace quantkv
