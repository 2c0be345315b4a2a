// Launches of quantize and dequantize.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#include "../ops/convert.h"

namespace quantkv {
namespace {

template <class T, bool kQuantize> int launch_convert(const quantkv_convert &op, void *stream) {
  constexpr Format A = FormatOf<T>::value;
  ConvertParams p = {op, {}};
  const int64_t alignment = bytes_of(static_cast<Format>(op.format)) == 1 ? 8 : 16;
  if (!rows_have_vectors(op.rows, op.activation, op.head_dim) || !is_aligned(op.codes, alignment)) {
    const int64_t blocks = ceil_div(op.num_tokens * op.num_heads, kRowThreads / kWarp), most = 1 << 20;
    const Grid grid = {blocks < most ? blocks : most, 1, 1};
    return QKV_LAUNCH_OVERLAPPED((convert_elements<T, kQuantize>), grid, kRowThreads, 0, stream, p);
  }
  const int width = op.head_dim / kVector < kWarp ? op.head_dim / kVector : kWarp;
  p.share = share_rows(op.num_tokens, op.num_heads, width, 1, 2);
  const Grid grid = grid_of(p.share, op.num_tokens);
  if constexpr (kQuantize) {
    return QKV_LAUNCH_OVERLAPPED((quantize_vectors<A, 2>), grid, kRowThreads, 0, stream, p);
  } else {
    return QKV_LAUNCH_OVERLAPPED((dequantize_vectors<A, 2>), grid, kRowThreads, 0, stream, p);
  }
}

int check(const quantkv_convert &op) {
  if (!is_format(op.format)) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check_heads(op.num_heads));
  QKV_CHECK(valid_if(op.head_dim > 0));
  QKV_CHECK(check_rows(op.rows, op.activation, op.num_tokens, op.num_heads, op.head_dim));
  QKV_CHECK(check_scale(op.scale, op.format, op.num_heads, op.head_dim));
  const int64_t row = product_plus(op.num_heads, op.head_dim, 0);
  const bool codes = op.codes != nullptr && is_aligned(op.codes, bytes_of(static_cast<Format>(op.format)));
  return valid_if(op.num_tokens == 0 || (codes && product_plus(op.num_tokens, row, 0) >= 0));
}

template <bool kQuantize> int convert(const quantkv_convert *op, void *stream) {
  if (op == nullptr) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check(*op));
  quantkv_convert part = *op;
  part.rows = used_strides(op->rows, op->num_tokens, op->num_heads);
  part.scale = used_strides(op->scale, op->num_heads, op->head_dim);
  const int64_t row_bytes = part.rows.token_stride * bytes_of(static_cast<Format>(op->activation));
  const int64_t codes = static_cast<int64_t>(op->num_heads) * op->head_dim;
  const int64_t code_bytes = codes * bytes_of(static_cast<Format>(op->format));
  for (int64_t done = 0; done < op->num_tokens; done += kMaxTokensPerGrid) {
    const int64_t left = op->num_tokens - done;
    part.num_tokens = left < kMaxTokensPerGrid ? left : kMaxTokensPerGrid;
    part.rows.data = static_cast<char *>(op->rows.data) + done * row_bytes;
    part.codes = static_cast<char *>(op->codes) + done * code_bytes;
    switch (op->activation) {
    case QUANTKV_F32: QKV_CHECK((launch_convert<float, kQuantize>(part, stream))); break;
    case QUANTKV_F16: QKV_CHECK((launch_convert<f16, kQuantize>(part, stream))); break;
    default: QKV_CHECK((launch_convert<bf16, kQuantize>(part, stream))); break;
    }
  }
  return QUANTKV_OK;
}

} // namespace
} // namespace quantkv

int QKV_ENTRY(quantize)(const quantkv_convert *op, quantkv_stream stream) {
  return quantkv::convert<true>(op, stream);
}

int QKV_ENTRY(dequantize)(const quantkv_convert *op, quantkv_stream stream) {
  return quantkv::convert<false>(op, stream);
}
