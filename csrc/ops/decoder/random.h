// Random weights, made where they are needed: element i from (seed, i) alone, the same bits on every device.
//
//   hash   = splitmix64(seed + i)                           64 bits
//   sum    = its four 16-bit words added                    0 .. 4 * 65535, mean 131070
//   out[i] = (sum - 131070) * (deviation / 37837.227)       one f32 product, then the storage type
//
// Four uniform words added are close to normal, have no tail beyond 3.5 deviations, and need integers alone.
#pragma once
#include "elements.h"

namespace quantkv {
namespace decoder {

constexpr int kRandomThreads = 256;
// Standard deviation of the sum: sqrt(4 * (2^32 - 1) / 12).
constexpr float kRandomSumDeviation = 37837.227f;

struct RandomParams {
  void *out; // [len]
  int64_t len;
  uint64_t seed;
  float factor; // deviation / kRandomSumDeviation
};

QKV_DEVICE int32_t centred_random(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  const uint32_t low = static_cast<uint32_t>(z), high = static_cast<uint32_t>(z >> 32);
  return static_cast<int32_t>((low & 0xffffu) + (low >> 16) + (high & 0xffffu) + (high >> 16)) - 131070;
}

template <class T> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRandomThreads, 1) random_kernel(RandomParams p) {
  const int64_t first = (block_index_x() * static_cast<int64_t>(kRandomThreads) + thread_index()) * kPack;
  for (int64_t i = first; i < first + kPack && i < p.len; ++i) {
    const float x = static_cast<float>(centred_random(p.seed, static_cast<uint64_t>(i)));
    static_cast<T *>(p.out)[i] = narrow<T>(multiply(x, p.factor));
  }
}

} // namespace decoder
} // namespace quantkv
