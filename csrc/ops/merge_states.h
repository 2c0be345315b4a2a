// merge_states: two partial attention outputs over disjoint keys, combined by their LSE (natural logarithm).
//
//   m = max(lse_a, lse_b)    wa = exp(lse_a - m), wb = exp(lse_b - m)
//   out = a * (wa / (wa + wb)) + b * (wb / (wa + wb))        lse = m + ln(wa + wb)
//
// An infinite LSE of either sign means "no keys": the other side is copied, and nothing of this one is read into the
// result; two of them give zeros and -inf. The output may be a or b, and its LSE theirs: elements are read and written
// by one thread, and the lanes of a row have read both LSE before one of them writes.
#pragma once
#include "../core/rows.h"
#include "../core/softmax.h"

namespace quantkv {

struct MergeParams {
  quantkv_merge_states op;
  RowShare share;
};

enum class MergeKind { Neither, OnlyA, OnlyB, Both };

struct Weights {
  MergeKind kind;
  float a, b; // sum to 1; of Both
  float lse;
};

QKV_DEVICE bool is_infinite(float x) { return (bits_of(x) & 0x7fffffffu) == 0x7f800000u; }

// e^x for x <= 0. Results too small to be normal come out too.
QKV_DEVICE float exp_of(float x) {
  const float y = x * kLog2E;
  return y < -120.0f ? multiply(exp2_approx(y + 64.0f), 5.42101086e-20f) : exp2_approx(y); // 2^-64
}

QKV_DEVICE Weights weigh(float a, float b) {
  const bool no_a = is_infinite(a), no_b = is_infinite(b);
  if (no_a && no_b) return {MergeKind::Neither, 0.0f, 0.0f, negative_infinity()};
  if (no_b) return {MergeKind::OnlyA, 1.0f, 0.0f, a};
  if (no_a) return {MergeKind::OnlyB, 0.0f, 1.0f, b};
  const float max = maximum(a, b), exp_a = exp_of(a - max), exp_b = exp_of(b - max), sum = exp_a + exp_b;
  return {MergeKind::Both, divide(exp_a, sum), divide(exp_b, sum), max + log2_approx(sum) * kLn2};
}

template <Format A> QKV_DEVICE void merge_vector(const quantkv_merge_states &op, int64_t at, const Weights &weights) {
  using T = Stored<A>;
  T *out = static_cast<T *>(op.output) + at;
  const T *a = static_cast<const T *>(op.a.data) + at, *b = static_cast<const T *>(op.b) + at;
  if (weights.kind != MergeKind::Both) {
    Vector<A> x = zero_vector<A>();
    if (weights.kind == MergeKind::OnlyA) x = load_vector<A>(a);
    if (weights.kind == MergeKind::OnlyB) x = load_vector<A>(b);
    store_vector(out, x);
    return;
  }
  const Vector<A> from_a = load_vector<A>(a), from_b = load_vector<A>(b);
  float x[kVector], y[kVector];
  unpack_vector<A>(from_a, x);
  unpack_vector<A>(from_b, y);
  QKV_UNROLL
  for (int i = 0; i < kVector; i++) x[i] = x[i] * weights.a + y[i] * weights.b;
  store_vector(out, pack_vector<A>(x));
}

// The grid covers all rows; lanes stride over the vectors of a row.
template <Format A> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) merge_vectors(const MergeParams p) {
  wait_for_previous_kernel();
  const quantkv_merge_states &op = p.op;
  const RowPlace place(p.share);
  const int head = place.row;
  const bool here = head < p.share.rows && place.first_token < op.num_tokens;
  const int64_t state = place.first_token * op.num_heads + head;
  Weights weights = {MergeKind::Neither, 0.0f, 0.0f, 0.0f};
  if (here) weights = weigh(op.a_lse[state], op.b_lse[state]);
  sync_warp();
  if (!here) return;
  for (int channel = place.lane * kVector; channel < op.head_dim; channel += p.share.lanes() * kVector) {
    merge_vector<A>(op, row_index(op.a, place.first_token, head) + channel, weights);
  }
  if (op.lse != nullptr && place.lane == 0) op.lse[state] = weights.lse;
}

// A warp a (token, head), an element a lane.
template <class T> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) merge_elements(const MergeParams p) {
  wait_for_previous_kernel();
  const quantkv_merge_states &op = p.op;
  const int64_t first = global_warp(), warps = global_warps();
  const int64_t states = op.num_tokens * op.num_heads;
  for (int64_t i = first; i < states; i += warps) {
    const int64_t token = i / op.num_heads;
    const int64_t row = row_index(op.a, token, static_cast<int>(i - token * op.num_heads));
    const Weights weights = weigh(op.a_lse[i], op.b_lse[i]);
    sync_warp();
    for (int d = lane_index(); d < op.head_dim; d += kWarp) {
      const T *a = static_cast<const T *>(op.a.data) + row + d, *b = static_cast<const T *>(op.b) + row + d;
      T y = {};
      if (weights.kind == MergeKind::OnlyA) y = *a;
      if (weights.kind == MergeKind::OnlyB) y = *b;
      if (weights.kind == MergeKind::Both) y = narrow<T>(to_f32(*a) * weights.a + to_f32(*b) * weights.b);
      static_cast<T *>(op.output)[row + d] = y;
    }
    if (op.lse != nullptr && lane_index() == 0) op.lse[i] = weights.lse;
  }
}

} // namespace quantkv
