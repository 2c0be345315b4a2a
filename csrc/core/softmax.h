// Softmax that is fed piece by piece, in base 2.
//
// A state is (max, sum) of scores s = score * log2(e), and accumulators relative to the same max:
//   sum = Σ 2^(s_j - max)      acc_d = Σ 2^(s_j - max) v_jd
// No key yet: max = -inf, sum = 0, acc = 0. All exponentials take `softmax_reference(max)`, which is finite while no
// key has weight, so that (-inf) - (-inf) never happens. NaN scores leave the max alone and poison the sum.
#pragma once
#include "prim.h"

namespace quantkv {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

QKV_DEVICE float negative_infinity() { return float_of(0xff800000u); }

// Whether a state has no key yet. Keys of NaN scores leave the max as it is, but not the sum.
QKV_DEVICE bool saw_no_key(float max, float sum) { return max == negative_infinity() && sum == 0.0f; }

// What is subtracted from scores whose maximum is `max`.
QKV_DEVICE float softmax_reference(float max) { return max == negative_infinity() ? 0.0f : max; }

// How far scores may exceed what weights are relative to, before that follows them: weights up to 2^8 lose nothing in f16
// or bf16, and accumulators are seldom rescaled.
constexpr float kMostAbove = 8.0f;

// What weights relative to `old_max` are multiplied by to be relative to `new_max`.
QKV_DEVICE float softmax_rescale(float old_max, float new_max) {
  return exp2_approx(old_max - softmax_reference(new_max));
}

// tanh within a few 2^-24 of the truth, absolutely.
QKV_DEVICE float tanh_of(float x) { return 1.0f - divide(2.0f, 1.0f + exp2_approx(2.0f * kLog2E * x)); }
// The same in a quarter of the instructions, for kernels that wait for those and have the registers.
QKV_DEVICE float tanh_quick(float x) {
  return fused_multiply_add(-2.0f, reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2E * x)), 1.0f);
}

// What ends a row: acc_d * factor is its result, `lse` its LSE in natural units. factor is 0 if no key has weight;
// the result is then 0 whatever acc_d is.
struct SoftmaxEnd {
  float factor;
  float lse;
};

// `sink`: a logit that adds to the denominator only; -inf for none.
QKV_DEVICE SoftmaxEnd softmax_end(float max, float sum, float sink) {
  sink *= kLog2E;
  float top = maximum(max, sink), reference = softmax_reference(top);
  float weight = exp2_approx(max - reference);
  float total = sum * weight + exp2_approx(sink - reference);
  if (total == 0.0f) return {0.0f, negative_infinity()};
  return {divide(weight, total), (reference + log2_approx(total)) * kLn2};
}

QKV_DEVICE float softmax_result(float acc, SoftmaxEnd end) { return end.factor == 0.0f ? 0.0f : acc * end.factor; }

} // namespace quantkv
