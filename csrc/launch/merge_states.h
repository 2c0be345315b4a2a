// Launches of merge_states.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#include "../ops/merge_states.h"

namespace quantkv {
namespace {

template <class T> int launch_merge(const quantkv_merge_states &op, void *stream) {
  constexpr Format A = FormatOf<T>::value;
  MergeParams p = {op, {}};
  const bool vectors =
      rows_have_vectors(op.a, op.activation, op.head_dim) && is_aligned(op.b, 16) && is_aligned(op.output, 16);
  if (!vectors) {
    const int64_t blocks = ceil_div(op.num_tokens * op.num_heads, kRowThreads / kWarp), most = 1 << 20;
    const Grid grid = {blocks < most ? blocks : most, 1, 1};
    return QKV_LAUNCH_OVERLAPPED((merge_elements<T>), grid, kRowThreads, 0, stream, p);
  }
  const int width = op.head_dim / kVector < kWarp ? op.head_dim / kVector : kWarp;
  p.share = share_rows(op.num_tokens, op.num_heads, width, 1, 1);
  return QKV_LAUNCH_OVERLAPPED((merge_vectors<A>), grid_of(p.share, op.num_tokens), kRowThreads, 0, stream, p);
}

int check(const quantkv_merge_states &op) {
  QKV_CHECK(check_heads(op.num_heads));
  QKV_CHECK(valid_if(op.head_dim > 0));
  QKV_CHECK(check_rows(op.a, op.activation, op.num_tokens, op.num_heads, op.head_dim));
  if (op.num_tokens == 0) return QUANTKV_OK;
  const int64_t size = bytes_of(static_cast<Format>(op.activation));
  const bool rows = op.b != nullptr && is_aligned(op.b, size) && op.output != nullptr && is_aligned(op.output, size);
  const bool lse = op.a_lse != nullptr && is_aligned(op.a_lse, 4) && op.b_lse != nullptr && is_aligned(op.b_lse, 4);
  return valid_if(rows && lse && is_aligned(op.lse, 4) && product_plus(op.num_tokens, op.num_heads, 0) >= 0);
}

} // namespace
} // namespace quantkv

int QKV_ENTRY(merge_states)(const quantkv_merge_states *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check(*op));
  // Tokens that one grid covers; see kMaxTokensPerGrid.
  quantkv_merge_states part = *op;
  part.a = used_strides(op->a, op->num_tokens, op->num_heads);
  const int64_t row_bytes = part.a.token_stride * bytes_of(static_cast<Format>(op->activation));
  for (int64_t done = 0; done < op->num_tokens; done += kMaxTokensPerGrid) {
    const int64_t left = op->num_tokens - done, states = done * op->num_heads;
    part.num_tokens = left < kMaxTokensPerGrid ? left : kMaxTokensPerGrid;
    part.a.data = static_cast<char *>(op->a.data) + done * row_bytes;
    part.b = static_cast<const char *>(op->b) + done * row_bytes;
    part.output = static_cast<char *>(op->output) + done * row_bytes;
    part.a_lse = op->a_lse + states;
    part.b_lse = op->b_lse + states;
    part.lse = op->lse == nullptr ? nullptr : op->lse + states;
    switch (op->activation) {
    case QUANTKV_F32: QKV_CHECK(launch_merge<float>(part, stream)); break;
    case QUANTKV_F16: QKV_CHECK(launch_merge<f16>(part, stream)); break;
    default: QKV_CHECK(launch_merge<bf16>(part, stream)); break;
    }
  }
  return QUANTKV_OK;
}
