// Greedy sampling: the index of each row's largest logit, the lowest of equals; NaN is passed over. -1 where nothing is
// above -inf. A block a row: each thread keeps the best of its elements, then threads are compared.
#pragma once
#include "elements.h"

namespace quantkv {
namespace decoder {

constexpr int kArgmaxThreads = 512;

struct ArgmaxParams {
  const float *logits; // [rows, vocab]
  int32_t *ids;        // [rows]
  int64_t vocab;       // below 2^31
  bool packed;         // rows in whole words of 16 bytes
};

struct Best {
  float value;
  int32_t index; // -1: nothing yet
};

QKV_DEVICE Best better(Best a, Best b) {
  const bool take_b = b.index >= 0 && (a.index < 0 || b.value > a.value || (b.value == a.value && b.index < a.index));
  return Best{take_b ? b.value : a.value, take_b ? b.index : a.index}; // not `? b : a`: that is a choice of addresses
}

QKV_DEVICE Best best_of_warp(Best best) {
  QKV_UNROLL for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Best other = {shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)};
    best = better(best, other);
  }
  return best;
}

QKV_KERNEL void QKV_LAUNCH_BOUNDS(kArgmaxThreads, 1) argmax_kernel(ArgmaxParams p) {
  QKV_SHARED(float, values, kArgmaxThreads / kWarp);
  QKV_SHARED(int32_t, indices, kArgmaxThreads / kWarp);
  const float *logits = p.logits + block_index_x() * p.vocab;
  Best best = {float_of(0xff800000u), -1}; // -inf; what is not above it is not taken
  if (p.packed) {
    for (int64_t i = thread_index() * 4; i < p.vocab; i += kArgmaxThreads * 4) {
      const Words<4> words = *reinterpret_cast<const Words<4> *>(logits + i);
      QKV_UNROLL for (int j = 0; j < 4; ++j) {
        const float x = float_of(words.w[j]);
        if (x > best.value) best = Best{x, static_cast<int32_t>(i + j)};
      }
    }
  } else {
    for (int64_t i = thread_index(); i < p.vocab; i += kArgmaxThreads) {
      if (logits[i] > best.value) best = Best{logits[i], static_cast<int32_t>(i)};
    }
  }
  best = best_of_warp(best);
  if (lane_index() == 0) {
    values[warp_index()] = best.value;
    indices[warp_index()] = best.index;
  }
  sync_threads();
  if (warp_index() != 0) return;
  const int lane = lane_index();
  Best mine = {0.0f, -1};
  if (lane < kArgmaxThreads / kWarp) mine = Best{values[lane], indices[lane]};
  best = best_of_warp(mine);
  if (lane == 0) p.ids[block_index_x()] = best.index;
}

} // namespace decoder
} // namespace quantkv
