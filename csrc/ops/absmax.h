// absmax and update_scales: from data to static scales.
//
//   running[h*head_stride + d*channel_stride] = max(itself, |x[t, h, d]|)      NaN ignored, infinities as f32::MAX
//   scales[i] = max(absmax[i] / divisor, 2^-126), or 1 where absmax[i] is not above 0
//
// A maximum is the same in any order, so blocks share the tokens, keep maxima of their channels in registers and
// meet in atomics.
#pragma once
#include "../core/rows.h"

namespace quantkv {

struct AbsmaxParams {
  quantkv_absmax op;
  RowShare share;
};


QKV_DEVICE void raise(float *running, float absmax) {
  atomic_max_nonnegative(running, absmax > kLargest ? kLargest : absmax);
}

// The maximum of this warp's lanes that share a row, in the first of them.
QKV_DEVICE float row_maximum(float absmax, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) absmax = maximum(absmax, shuffle_xor(absmax, mask));
  return absmax;
}

// Rows in vectors of 8 channels, kTokens tokens of a thread in flight; grid.x blocks stride over the tokens.
template <Format A, int kTokens>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) absmax_vectors(const AbsmaxParams p) {
  wait_for_previous_kernel();
  const quantkv_absmax &op = p.op;
  const RowPlace place(p.share);
  const int head = place.row, step = p.share.side;
  const bool is_row = place.row < p.share.rows;
  const int64_t stride = static_cast<int64_t>(grid_size_x()) * p.share.tokens_per_block();
  const bool by_channel = op.channel_stride != 0;

  float of_row = 0.0f;
  // The same number of passes in every lane: the shuffle below needs them all.
  for (int first = 0; first < op.head_dim; first += p.share.lanes() * kVector) {
    const int channel = first + place.lane * kVector;
    float absmax[kVector] = {};
    if (is_row && channel < op.head_dim) {
      const char *source =
          static_cast<const char *>(op.input.data) + (row_index(op.input, 0, head) + channel) * bytes_of(A);
      for (int64_t t = place.first_token; t < op.num_tokens; t += stride) {
        Vector<A> x[kTokens];
        QKV_UNROLL
        for (int i = 0; i < kTokens; i++) {
          const int64_t token = t + i * step;
          x[i] = zero_vector<A>();
          if (token < op.num_tokens) x[i] = stream_vector<A>(source + token * op.input.token_stride * bytes_of(A));
        }
        QKV_UNROLL
        for (int i = 0; i < kTokens; i++) {
          float values[kVector];
          unpack_vector<A>(x[i], values);
          QKV_UNROLL
          for (int n = 0; n < kVector; n++) absmax[n] = maximum(absmax[n], magnitude(values[n]));
        }
      }
    }
    QKV_UNROLL
    for (int n = 0; n < kVector; n++) {
      if (by_channel && is_row && channel < op.head_dim) {
        raise(op.running + head * op.head_stride + (channel + n) * op.channel_stride, absmax[n]);
      }
      of_row = maximum(of_row, absmax[n]);
    }
  }
  if (by_channel) return;
  // One maximum for the tensor: the rows of the warp meet before they go to memory.
  const int lanes = op.head_stride == 0 ? kWarp : p.share.lanes();
  of_row = row_maximum(of_row, lanes);
  if (lane_index() % lanes == 0 && (is_row || op.head_stride == 0)) {
    raise(op.running + (op.head_stride == 0 ? 0 : head * op.head_stride), of_row);
  }
}

// A warp a (token, head), an element a lane: any stride, alignment and head dim.
template <class T> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) absmax_elements(const AbsmaxParams p) {
  wait_for_previous_kernel();
  const quantkv_absmax &op = p.op;
  constexpr int warps = kRowThreads / kWarp;
  // A warp keeps its head: so it can keep a maximum.
  const int head = block_index_y();
  float of_row = 0.0f;
  for (int channel = lane_index(); channel < op.head_dim; channel += kWarp) {
    float absmax = 0.0f;
    for (int64_t token = static_cast<int64_t>(block_index_x()) * warps + warp_index(); token < op.num_tokens;
         token += static_cast<int64_t>(grid_size_x()) * warps) {
      const T *row = static_cast<const T *>(op.input.data) + row_index(op.input, token, head);
      absmax = maximum(absmax, magnitude(to_f32(row[channel])));
    }
    if (op.channel_stride != 0) raise(op.running + head * op.head_stride + channel * op.channel_stride, absmax);
    of_row = maximum(of_row, absmax);
  }
  if (op.channel_stride != 0) return;
  of_row = row_maximum(of_row, kWarp);
  if (lane_index() == 0) raise(op.running + head * op.head_stride, of_row);
}

QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) update_scales(const quantkv_update_scales op) {
  wait_for_previous_kernel();
  const int64_t threads = static_cast<int64_t>(grid_size_x()) * kRowThreads;
  for (int64_t i = static_cast<int64_t>(block_index_x()) * kRowThreads + thread_index(); i < op.len; i += threads) {
    const float absmax = op.absmax[i];
    float scale = 1.0f; // where nothing but zeros was seen; a NaN is not above zero either
    if (absmax > 0.0f) {
      scale = divide(absmax < kLargest ? absmax : kLargest, op.divisor);
      scale = scale > kSmallestNormal ? scale : kSmallestNormal;
    }
    op.scales[i] = scale;
  }
}

} // namespace quantkv
