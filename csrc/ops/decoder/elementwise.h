// What acts on each element alone: silu_mul and add. A thread has eight elements of whole packs, or one.
#pragma once
#include "elements.h"
#include "functions.h"

namespace quantkv {
namespace decoder {

constexpr int kElementwiseThreads = 256;

struct BinaryParams {
  void *x;       // [len], in and out
  const void *y; // [len]
  int64_t len;
  bool packed; // len and both addresses in whole packs
};

struct SiluMul {
  QKV_DEVICE static float apply(float x, float y) { return divide(x, 1.0f + exponential(-x)) * y; }
};

struct Add {
  QKV_DEVICE static float apply(float x, float y) { return x + y; }
};

template <class A, class Op> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kElementwiseThreads, 1) binary_kernel(BinaryParams p) {
  A *x = static_cast<A *>(p.x);
  const A *y = static_cast<const A *>(p.y);
  const int64_t index = block_index_x() * static_cast<int64_t>(kElementwiseThreads) + thread_index();
  if (!p.packed) {
    if (index < p.len) x[index] = narrow<A>(Op::apply(to_f32(x[index]), to_f32(y[index])));
    return;
  }
  const int64_t first = index * kPack;
  if (first >= p.len) return;
  float a[kPack], b[kPack];
  load_pack(x + first, a);
  load_pack(y + first, b);
  QKV_UNROLL for (int i = 0; i < kPack; ++i) a[i] = Op::apply(a[i], b[i]);
  store_pack(x + first, a);
}

} // namespace decoder
} // namespace quantkv
