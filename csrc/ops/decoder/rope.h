// Rotary embedding: a table of cosines and sines for the positions of a step, made once, and the turning of each head.
#pragma once
#include "elements.h"
#include "functions.h"

namespace quantkv {
namespace decoder {

constexpr int kRopeThreads = 128;

struct RopeTableParams {
  const int32_t *positions; // [rows]
  const float *inv_freq;    // [half]
  float *cos;               // [rows, half]
  float *sin;               // [rows, half]
  int64_t rows;
  int64_t half;
  float scaling;
};

// A thread an angle.
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRopeThreads, 1) rope_table_kernel(RopeTableParams p) {
  const int64_t index = block_index_x() * static_cast<int64_t>(kRopeThreads) + thread_index();
  if (index >= p.rows * p.half) return;
  const int64_t row = index / p.half, i = index % p.half;
  float sine, cosine;
  sine_cosine(multiply(static_cast<float>(p.positions[row]), p.inv_freq[i]), sine, cosine);
  p.cos[index] = cosine * p.scaling;
  p.sin[index] = sine * p.scaling;
}

struct RopeParams {
  void *x;          // [rows, heads, 2 * half]
  const float *cos; // [rows, half]
  const float *sin; // [rows, half]
  int64_t rows;
  int64_t heads;
  int64_t half;
};

// A thread a pair of channels (i, i + half).
template <class A> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRopeThreads, 1) rope_kernel(RopeParams p) {
  const int64_t index = block_index_x() * static_cast<int64_t>(kRopeThreads) + thread_index();
  if (index >= p.rows * p.heads * p.half) return;
  const int64_t head = index / p.half, i = index % p.half, row = head / p.heads;
  A *x = static_cast<A *>(p.x) + head * 2 * p.half;
  const float cosine = p.cos[row * p.half + i], sine = p.sin[row * p.half + i];
  const float a = to_f32(x[i]), b = to_f32(x[i + p.half]);
  x[i] = narrow<A>(a * cosine - b * sine);
  x[i + p.half] = narrow<A>(b * cosine + a * sine);
}

} // namespace decoder
} // namespace quantkv
