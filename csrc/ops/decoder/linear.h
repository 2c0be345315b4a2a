// out = x . weight^T + bias for any shape, without tensor cores: the products where no matrix library is there.
//
//   a warp has one output and eight rows of x:
//     lanes go through the inputs eight at a time:  acc[row] += weight[o, 8] . x[row, 8]
//     the lanes' sums are added in one fixed tree, all eight rows together (9 shuffles instead of 40)
//
// Weights are read once for eight rows, which is what decoding needs; x comes from L1 and L2. The order of a row's sum
// depends on the number of inputs alone: a row gives the same bits alone and in any batch.
#pragma once
#include "elements.h"

namespace quantkv {
namespace decoder {

constexpr int kLinearRows = 8;
constexpr int kLinearWarps = 4;
constexpr int kLinearThreads = kLinearWarps * kWarp;

struct LinearParams {
  const void *x;      // [rows, inputs], of A
  const void *weight; // [outputs, inputs], of W
  const void *bias;   // [outputs], of A, or null
  void *out;          // [rows, outputs], of A, or f32
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  bool out_is_f32;
  bool packed; // rows of x and weight in whole packs
};

// acc[row] += this lane's share of weight . x[row] for `count` rows.
template <class A, class W>
QKV_DEVICE void multiply_rows(const A *x, const W *weight, int64_t inputs, bool packed, int count, float (&acc)[kLinearRows]) {
  if (!packed) {
    for (int64_t i = lane_index(); i < inputs; i += kWarp) {
      const float w = to_f32(weight[i]);
      QKV_UNROLL for (int r = 0; r < kLinearRows; ++r) {
        if (r < count) acc[r] = fused_multiply_add(to_f32(x[r * inputs + i]), w, acc[r]);
      }
    }
    return;
  }
  for (int64_t i = lane_index() * kPack; i < inputs; i += kWarp * kPack) {
    float w[kPack], v[kPack];
    load_weights(weight + i, w);
    QKV_UNROLL for (int r = 0; r < kLinearRows; ++r) {
      if (r < count) {
        load_pack(x + r * inputs + i, v);
        QKV_UNROLL for (int j = 0; j < kPack; ++j) acc[r] = fused_multiply_add(v[j], w[j], acc[r]);
      }
    }
  }
}

// Adds acc[r] over the lanes; lane l returns the sum of row l/4. At each of three steps a lane hands half of its rows
// to its partner and adds the partner's share of the other half. For every row the tree of additions is the same.
QKV_DEVICE float sum_rows(float (&acc)[kLinearRows]) {
  QKV_UNROLL for (int keep = kLinearRows / 2, mask = kWarp / 2; keep > 0; keep /= 2, mask /= 2) {
    const bool upper = (lane_index() & mask) != 0;
    QKV_UNROLL for (int i = 0; i < keep; ++i) {
      const float other = shuffle_xor(upper ? acc[i] : acc[i + keep], mask);
      acc[i] = (upper ? acc[i + keep] : acc[i]) + other;
    }
  }
  float sum = acc[0] + shuffle_xor(acc[0], 2);
  return sum + shuffle_xor(sum, 1);
}

template <class A, class W> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kLinearThreads, 3) linear_kernel(LinearParams p) {
  const int64_t o = block_index_x() * static_cast<int64_t>(kLinearWarps) + warp_index();
  if (o >= p.outputs) return;
  const W *weight = static_cast<const W *>(p.weight) + o * p.inputs;
  for (int64_t first = block_index_y() * static_cast<int64_t>(kLinearRows); first < p.rows;
       first += grid_size_y() * static_cast<int64_t>(kLinearRows)) {
    const int64_t left = p.rows - first;
    const int count = left < kLinearRows ? static_cast<int>(left) : kLinearRows;
    float acc[kLinearRows] = {};
    multiply_rows(static_cast<const A *>(p.x) + first * p.inputs, weight, p.inputs, p.packed, count, acc);
    float sum = sum_rows(acc);
    const int row = lane_index() / 4;
    if (lane_index() % 4 == 0 && row < count) {
      if (p.bias != nullptr) sum += to_f32(static_cast<const A *>(p.bias)[o]);
      const int64_t index = (first + row) * p.outputs + o;
      if (p.out_is_f32) {
        static_cast<float *>(p.out)[index] = sum;
      } else {
        static_cast<A *>(p.out)[index] = narrow<A>(sum);
      }
    }
  }
}

} // namespace decoder
} // namespace quantkv
