// Launchers of the reference decoder's small kernels: what the host can see is checked, then one kernel is enqueued.
#pragma once
#include "../quantkv_decoder.h"

#include "core/launch.h"
#include "ops/decoder/argmax.h"
#include "ops/decoder/elementwise.h"
#include "ops/decoder/linear.h"
#include "ops/decoder/random.h"
#include "ops/decoder/rms_norm.h"
#include "ops/decoder/rope.h"
#include "ops/decoder/select_rows.h"

using namespace quantkv;
using namespace quantkv::decoder;

namespace {

// body(TypeTag<T>{}) for the activation type of a run-time format.
template <class Body> int with_activation(int32_t format, Body body) {
  switch (format) {
  case QUANTKV_F32: return body(TypeTag<float>{});
  case QUANTKV_F16: return body(TypeTag<f16>{});
  case QUANTKV_BF16: return body(TypeTag<bf16>{});
  default: return QUANTKV_INVALID_ARGUMENT;
  }
}

constexpr int64_t kMaxSize = 0x7fffffff;

// Whether each of `count` sizes is in 1 .. 2^31 - 1, so that products of two of them fit in 64 bits.
template <class... Sizes> bool are_sizes(Sizes... sizes) {
  return ((sizes > 0 && sizes <= kMaxSize) && ...);
}

template <class... Pointers> bool are_given(Pointers... pointers) { return ((pointers != nullptr) && ...); }

// Whether rows of `width` elements at these addresses can be read as whole words of 16 bytes.
template <class... Pointers> bool is_packed(int64_t width, Pointers... pointers) {
  return width % kPack == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class W, class A> int select_rows(const SelectRowsParams &params, int64_t count, quantkv_stream stream) {
  return QKV_LAUNCH((select_rows_kernel<W, A>), (Grid{count, 1, 1}), kSelectThreads, 0, stream, params);
}

template <class Op> int binary(const quantkv_decoder_binary *op, quantkv_stream stream) {
  if (op == nullptr || op->len < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->len == 0) return QUANTKV_OK;
  if (!are_given(op->x, op->y)) return QUANTKV_INVALID_ARGUMENT;
  const BinaryParams params = {op->x, op->y, op->len, is_packed(op->len, op->x, op->y)};
  const int64_t blocks = ceil_div(params.packed ? op->len / kPack : op->len, kElementwiseThreads);
  if (blocks > kMaxGridX) return QUANTKV_INVALID_ARGUMENT;
  return with_activation(op->activation, [&](auto tag) {
    using A = typename decltype(tag)::type;
    return QKV_LAUNCH((binary_kernel<A, Op>), (Grid{blocks, 1, 1}), kElementwiseThreads, 0, stream, params);
  });
}

} // namespace

extern "C" {

QUANTKV_API int QKV_ENTRY(decoder_embed)(const quantkv_decoder_embed *op, quantkv_stream stream) {
  if (op == nullptr || op->rows < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->rows == 0) return QUANTKV_OK;
  if (!are_sizes(op->rows, op->vocab, op->width) || !are_given(op->table, op->ids, op->out)) return QUANTKV_INVALID_ARGUMENT;
  const bool packed = is_packed(op->width, op->table, op->out);
  const SelectRowsParams params = {op->table, op->ids, op->out, op->vocab, op->width, packed};
  return with_activation(op->weight, [&](auto weight) {
    return with_activation(op->activation, [&](auto activation) {
      return select_rows<typename decltype(weight)::type, typename decltype(activation)::type>(params, op->rows, stream);
    });
  });
}

QUANTKV_API int QKV_ENTRY(decoder_gather_rows)(const quantkv_decoder_gather_rows *op, quantkv_stream stream) {
  if (op == nullptr || op->count < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->count == 0) return QUANTKV_OK;
  if (!are_sizes(op->count, op->num_rows, op->width) || !are_given(op->x, op->rows, op->out)) return QUANTKV_INVALID_ARGUMENT;
  const bool packed = is_packed(op->width, op->x, op->out);
  const SelectRowsParams params = {op->x, op->rows, op->out, op->num_rows, op->width, packed};
  return with_activation(op->activation, [&](auto tag) {
    using A = typename decltype(tag)::type;
    return select_rows<A, A>(params, op->count, stream);
  });
}

QUANTKV_API int QKV_ENTRY(decoder_rms_norm)(const quantkv_decoder_rms_norm *op, quantkv_stream stream) {
  if (op == nullptr || op->rows < 0 || !(op->eps >= 0)) return QUANTKV_INVALID_ARGUMENT;
  if (op->rows == 0) return QUANTKV_OK;
  if (!are_sizes(op->rows, op->width) || !are_given(op->x, op->weight, op->out)) return QUANTKV_INVALID_ARGUMENT;
  const bool packed = is_packed(op->width, op->x, op->weight, op->out);
  const RmsNormParams params = {op->x, op->weight, op->out, op->rows, op->width, op->eps, packed};
  return with_activation(op->activation, [&](auto tag) {
    using A = typename decltype(tag)::type;
    if (op->width <= kNormWarpWidth) {
      const Grid grid = {ceil_div(op->rows, kNormThreads / kWarp), 1, 1};
      return QKV_LAUNCH((rms_norm_kernel<A, kWarp>), grid, kNormThreads, 0, stream, params);
    }
    return QKV_LAUNCH((rms_norm_kernel<A, kNormThreads>), (Grid{op->rows, 1, 1}), kNormThreads, 0, stream, params);
  });
}

QUANTKV_API int QKV_ENTRY(decoder_rope_table)(const quantkv_decoder_rope_table *op, quantkv_stream stream) {
  if (op == nullptr || op->rows < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->rows == 0) return QUANTKV_OK;
  if (!are_sizes(op->rows, op->half) || !are_given(op->positions, op->inv_freq, op->cos, op->sin)) {
    return QUANTKV_INVALID_ARGUMENT;
  }
  const int64_t blocks = ceil_div(op->rows * op->half, kRopeThreads);
  if (blocks > kMaxGridX) return QUANTKV_INVALID_ARGUMENT;
  const RopeTableParams params = {op->positions, op->inv_freq, op->cos, op->sin, op->rows, op->half, op->scaling};
  return QKV_LAUNCH((rope_table_kernel), (Grid{blocks, 1, 1}), kRopeThreads, 0, stream, params);
}

QUANTKV_API int QKV_ENTRY(decoder_rope)(const quantkv_decoder_rope *op, quantkv_stream stream) {
  if (op == nullptr || op->rows < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->rows == 0) return QUANTKV_OK;
  if (!are_sizes(op->rows, op->heads, op->head_dim) || op->head_dim % 2 != 0 || !are_given(op->x, op->cos, op->sin)) {
    return QUANTKV_INVALID_ARGUMENT;
  }
  const int64_t heads = op->rows * op->heads, half = op->head_dim / 2;
  if (heads > kMaxSize || ceil_div(heads * half, kRopeThreads) > kMaxGridX) return QUANTKV_INVALID_ARGUMENT;
  const Grid grid = {ceil_div(heads * half, kRopeThreads), 1, 1};
  const RopeParams params = {op->x, op->cos, op->sin, op->rows, op->heads, half};
  return with_activation(op->activation, [&](auto tag) {
    using A = typename decltype(tag)::type;
    return QKV_LAUNCH((rope_kernel<A>), grid, kRopeThreads, 0, stream, params);
  });
}

QUANTKV_API int QKV_ENTRY(decoder_silu_mul)(const quantkv_decoder_binary *op, quantkv_stream stream) {
  return binary<SiluMul>(op, stream);
}

QUANTKV_API int QKV_ENTRY(decoder_add)(const quantkv_decoder_binary *op, quantkv_stream stream) {
  return binary<Add>(op, stream);
}

QUANTKV_API int QKV_ENTRY(decoder_linear)(const quantkv_decoder_linear *op, quantkv_stream stream) {
  if (op == nullptr || op->rows < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->rows == 0) return QUANTKV_OK;
  const bool out_is_f32 = op->output == QUANTKV_F32;
  if (!are_sizes(op->rows, op->inputs, op->outputs) || !are_given(op->x, op->weight, op->out) ||
      !(out_is_f32 || op->output == op->activation)) {
    return QUANTKV_INVALID_ARGUMENT;
  }
  const bool packed = is_packed(op->inputs, op->x, op->weight);
  const LinearParams params = {op->x,      op->weight,  op->bias,   op->out, op->rows,
                               op->inputs, op->outputs, out_is_f32, packed};
  int64_t tiles = ceil_div(op->rows, kLinearRows);
  if (tiles > kMaxGridYZ) tiles = kMaxGridYZ; // the kernel loops
  const Grid grid = {ceil_div(op->outputs, kLinearWarps), tiles, 1};
  return with_activation(op->activation, [&](auto activation) {
    return with_activation(op->weight_format, [&](auto weight) {
      using A = typename decltype(activation)::type;
      using W = typename decltype(weight)::type;
      return QKV_LAUNCH((linear_kernel<A, W>), grid, kLinearThreads, 0, stream, params);
    });
  });
}

QUANTKV_API int QKV_ENTRY(decoder_argmax)(const quantkv_decoder_argmax *op, quantkv_stream stream) {
  if (op == nullptr || op->rows < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->rows == 0) return QUANTKV_OK;
  if (!are_sizes(op->rows, op->vocab) || !are_given(op->logits, op->ids)) return QUANTKV_INVALID_ARGUMENT;
  const ArgmaxParams params = {op->logits, op->ids, op->vocab, op->vocab % 4 == 0 && is_packed(0, op->logits)};
  return QKV_LAUNCH((argmax_kernel), (Grid{op->rows, 1, 1}), kArgmaxThreads, 0, stream, params);
}

QUANTKV_API int QKV_ENTRY(decoder_random)(const quantkv_decoder_random *op, quantkv_stream stream) {
  if (op == nullptr || op->len < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->len == 0) return QUANTKV_OK;
  const int64_t blocks = ceil_div(op->len, kRandomThreads * kPack);
  if (!are_given(op->out) || blocks > kMaxGridX) return QUANTKV_INVALID_ARGUMENT;
  const RandomParams params = {op->out, op->len, op->seed, op->deviation / kRandomSumDeviation};
  return with_activation(op->format, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return QKV_LAUNCH((random_kernel<T>), (Grid{blocks, 1, 1}), kRandomThreads, 0, stream, params);
  });
}

} // extern "C"
