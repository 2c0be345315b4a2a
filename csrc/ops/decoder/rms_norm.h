// out[r] = weight * (x[r] / sqrt(mean(x[r]^2) + eps)), statistics in f32.
//
// A group of threads has a row: a warp for the short rows of a per-head norm, a block for the residual stream. Every
// thread reads its elements twice, the second time from L1, and writes only those it has read: `out` may be `x`.
#pragma once
#include "elements.h"
#include "functions.h"

namespace quantkv {
namespace decoder {

constexpr int kNormThreads = 256;
// Rows up to this width get a warp each.
constexpr int64_t kNormWarpWidth = 512;

struct RmsNormParams {
  const void *x;      // [rows, width]
  const void *weight; // [width]
  void *out;          // [rows, width]
  int64_t rows;
  int64_t width;
  float eps;
  bool packed; // rows and weight in whole packs
};

// `Threads` a row: kWarp or kNormThreads. Every row is one group's, whole.
template <class A, int Threads> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kNormThreads, 1) rms_norm_kernel(RmsNormParams p) {
  QKV_SHARED(float, partial, kNormThreads / kWarp);
  const int64_t row = block_index_x() * static_cast<int64_t>(kNormThreads / Threads) + thread_index() / Threads;
  const int lane = thread_index() % Threads;
  const bool valid = row < p.rows;
  const A *x = static_cast<const A *>(p.x) + (valid ? row : 0) * p.width;
  const A *weight = static_cast<const A *>(p.weight);
  A *out = static_cast<A *>(p.out) + (valid ? row : 0) * p.width;

  float squares = 0;
  float v[kPack], w[kPack];
  if (p.packed) {
    for (int64_t i = lane * kPack; i < p.width; i += Threads * kPack) {
      load_pack(x + i, v);
      QKV_UNROLL for (int j = 0; j < kPack; ++j) squares = fused_multiply_add(v[j], v[j], squares);
    }
  } else {
    for (int64_t i = lane; i < p.width; i += Threads) squares = fused_multiply_add(to_f32(x[i]), to_f32(x[i]), squares);
  }
  squares = warp_sum(squares);
  if (Threads > kWarp) {
    if (lane_index() == 0) partial[warp_index()] = squares;
    sync_threads();
    squares = 0;
    QKV_UNROLL for (int i = 0; i < kNormThreads / kWarp; ++i) squares += partial[i];
  }
  if (!valid) return;

  const float scale = inverse_sqrt(divide(squares, static_cast<float>(p.width)) + p.eps);
  if (p.packed) {
    for (int64_t i = lane * kPack; i < p.width; i += Threads * kPack) {
      load_pack(x + i, v);
      load_pack(weight + i, w);
      QKV_UNROLL for (int j = 0; j < kPack; ++j) v[j] = w[j] * (v[j] * scale);
      store_pack(out + i, v);
    }
  } else {
    for (int64_t i = lane; i < p.width; i += Threads) out[i] = narrow<A>(to_f32(weight[i]) * (to_f32(x[i]) * scale));
  }
}

} // namespace decoder
} // namespace quantkv
