// Products of matrices by a whole wave: MFMA on CDNA, WMMA on RDNA. C[16, 16] += A[16, 16] B[16, 16] of f16 or bf16 with
// f32 sums.
//
// A lane has kTerms terms of row lane % 16 of A and of column lane % 16 of B, from first_term() on, and kSums sums of
// column lane % 16 of C, of the rows row_of(i). What it multiplies lies side by side where a row of A, or a column of B,
// does.
//
//            lanes   kTerms   first_term()      kSums   row_of(i)
//   gfx9     64      4        4 * (lane / 16)   4       4 * (lane / 16) + i
//   gfx11    32      16       0                 8       2 * i + lane / 16         both halves of the wave give the same
//   gfx12    32      8        8 * (lane / 16)   8       8 * (lane / 16) + i
//
// Every lane of the wave takes part: of both warps, where a wave has two.
#pragma once
#include "../prim.h"

namespace quantkv {
namespace matrix {

#if defined(__GFX9__)
constexpr int kTerms = 4, kSums = 4;
#elif defined(__GFX11__)
constexpr int kTerms = 16, kSums = 8;
#else
constexpr int kTerms = 8, kSums = 8;
#endif
constexpr int kWords = kTerms / 2;

// The wave in the block, in a scalar register: branches on it are not taken lane by lane.
QKV_DEVICE int wave_index() { return __builtin_amdgcn_readfirstlane(thread_index() / kWave); }
QKV_DEVICE int lane() { return amdgcn::wave_lane(); }
QKV_DEVICE int first_term() { return kTerms == 16 ? 0 : lane() / 16 * kTerms; }
QKV_DEVICE int row_of(int i) { return kTerms == 16 ? 2 * i + lane() / 16 : lane() / 16 * kSums + i; }

template <class Element> using Terms = Element __attribute__((ext_vector_type(kTerms)));
using Sums = float __attribute__((ext_vector_type(kSums)));

QKV_DEVICE Sums product(f16, Terms<_Float16> a, Terms<_Float16> b, Sums c) {
#if defined(__GFX9__)
  return __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, c, 0, 0, 0);
#elif defined(__GFX11__)
  return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c);
#elif defined(__GFX12__)
  return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(a, b, c);
#else
  return c; // the host's pass
#endif
}
QKV_DEVICE Sums product(bf16, Terms<short> a, Terms<short> b, Sums c) {
#if defined(__GFX9__)
  return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, c, 0, 0, 0);
#elif defined(__GFX11__)
  return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(a, b, c);
#elif defined(__GFX12__)
  return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(a, b, c);
#else
  return c;
#endif
}

template <class T> struct ElementOf {
  using type = short;
};
template <> struct ElementOf<f16> {
  using type = _Float16;
};

// c += a b. T: f16 or bf16; words hold the terms in order, the first in the lower half.
template <class T> QKV_DEVICE void multiply(float (&c)[kSums], const uint32_t (&a)[kWords], const uint32_t (&b)[kWords]) {
  using Vector = Terms<typename ElementOf<T>::type>;
  Words<kWords> left, right;
  Sums sums;
  QKV_UNROLL
  for (int i = 0; i < kWords; i++) left.w[i] = a[i], right.w[i] = b[i];
  QKV_UNROLL
  for (int i = 0; i < kSums; i++) sums[i] = c[i];
  sums = product(T{}, __builtin_bit_cast(Vector, left), __builtin_bit_cast(Vector, right), sums);
  QKV_UNROLL
  for (int i = 0; i < kSums; i++) c[i] = sums[i];
}

} // namespace matrix
} // namespace quantkv
