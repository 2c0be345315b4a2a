// Launches of absmax and update_scales.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#include "../ops/absmax.h"

namespace quantkv {
namespace {

// Blocks that share the tokens: enough to fill a device, few enough that their atomics do not count.
constexpr int64_t kMaxAbsmaxBlocks = 1024;

template <class T> int launch_absmax(AbsmaxParams &p, void *stream) {
  constexpr Format A = FormatOf<T>::value;
  constexpr int tokens = A == Format::F32 ? 2 : 4;
  const quantkv_absmax &op = p.op;
  if (!rows_have_vectors(op.input, op.activation, op.head_dim)) {
    const int64_t blocks = ceil_div(op.num_tokens, kRowThreads / kWarp);
    const Grid grid = {blocks < kMaxAbsmaxBlocks ? blocks : kMaxAbsmaxBlocks, op.num_heads, 1};
    return QKV_LAUNCH_OVERLAPPED((absmax_elements<T>), grid, kRowThreads, 0, stream, p);
  }
  const int width = op.head_dim / kVector < kWarp ? op.head_dim / kVector : kWarp;
  p.share = share_rows(op.num_tokens, op.num_heads, width, 1, 1);
  p.share.steps = tokens;
  Grid grid = grid_of(p.share, op.num_tokens);
  const int64_t most = ceil_div(kMaxAbsmaxBlocks, grid.y);
  if (grid.x > most) grid.x = most;
  return QKV_LAUNCH_OVERLAPPED((absmax_vectors<A, tokens>), grid, kRowThreads, 0, stream, p);
}

int check(const quantkv_absmax &op) {
  QKV_CHECK(check_heads(op.num_heads));
  QKV_CHECK(valid_if(op.head_dim > 0));
  QKV_CHECK(check_rows(op.input, op.activation, op.num_tokens, op.num_heads, op.head_dim));
  const bool fits = extent(op.num_heads, op.head_stride, op.head_dim, op.channel_stride, 0) >= 0;
  return valid_if(fits && op.running != nullptr && is_aligned(op.running, 4));
}

} // namespace
} // namespace quantkv

int QKV_ENTRY(absmax)(const quantkv_absmax *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check(*op));
  if (op->num_tokens == 0) return QUANTKV_OK;
  AbsmaxParams p = {*op, {}};
  p.op.input = used_strides(op->input, op->num_tokens, op->num_heads);
  if (op->num_heads == 1) p.op.head_stride = 0;
  if (op->head_dim == 1) p.op.channel_stride = 0;
  switch (op->activation) {
  case QUANTKV_F32: return launch_absmax<float>(p, stream);
  case QUANTKV_F16: return launch_absmax<f16>(p, stream);
  default: return launch_absmax<bf16>(p, stream);
  }
}

int QKV_ENTRY(update_scales)(const quantkv_update_scales *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr || op->len < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->len == 0) return QUANTKV_OK;
  const bool pointers = op->absmax != nullptr && op->scales != nullptr;
  QKV_CHECK(valid_if(pointers && is_aligned(op->absmax, 4) && is_aligned(op->scales, 4)));
  QKV_CHECK(valid_if(op->divisor >= 1.0f && op->divisor <= kLargest));
  const int64_t blocks = ceil_div(op->len, kRowThreads), most = 1 << 16;
  const Grid grid = {blocks < most ? blocks : most, 1, 1};
  return QKV_LAUNCH_OVERLAPPED((update_scales), grid, kRowThreads, 0, stream, *op);
}
