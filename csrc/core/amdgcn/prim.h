// The instructions of csrc/core/prim.h for AMD's GPUs: clang's builtins, and arithmetic where there is no instruction.
//
//                 gfx90a     gfx942       gfx950     gfx11      gfx12
//   FP8           software   E4M3 FNUZ    OCP        software   OCP          by instruction; all else in software
//   matrix cores  prim_matrix.h; QKV_HAS_TENSOR_CORES, which is about CUDA's 16 x 8 x 16 product of a warp, is 0
//
// v_cvt_pk_fp8_f32 and v_cvt_pk_bf8_f32 round but do not saturate: what they get is clamped first, NaN kept.
#pragma once
#include "platform.h"

namespace quantkv {

using half2_bits = _Float16 __attribute__((ext_vector_type(2)));
using float2_bits = float __attribute__((ext_vector_type(2)));

QKV_DEVICE int forget(int x) {
  asm volatile("" : "+v"(x));
  return x;
}
template <class T> QKV_DEVICE T keep(T x) { return x; }
QKV_DEVICE int reread_thread_index() { return thread_index(); }

// ---- bits and floats

QKV_DEVICE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
QKV_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// clang divides correctly rounded unless it is told otherwise, and contracts only inside an expression
// (-ffp-contract=on).
QKV_DEVICE float divide(float x, float y) { return x / y; }
QKV_DEVICE float multiply(float x, float y) { return x * y; }
QKV_DEVICE float fused_multiply_add(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

QKV_DEVICE float exp2_approx(float x) { return __builtin_amdgcn_exp2f(x); }
QKV_DEVICE float reciprocal_approx(float x) { return divide(1.0f, x); }
// The instruction takes subnormals for zero.
QKV_DEVICE float log2_approx(float x) {
  const bool small = x < 1.17549435e-38f; // 2^-126
  const float y = __builtin_amdgcn_logf(small ? x * 16777216.0f : x);
  return small ? y - 24.0f : y;
}
QKV_DEVICE float maximum(float x, float y) { return __builtin_fmaxf(x, y); }

QKV_DEVICE float to_f32(f16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
QKV_DEVICE float to_f32(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
QKV_DEVICE float to_f32(float x) { return x; }

// clang up to 22 makes one v_fma_mixlo_f16 of a product and its conversion, with +0 for the addend: -0 becomes +0
// (llvm-project pull request 214544). So the conversion must not see where its argument comes from.
QKV_DEVICE _Float16 narrow_to_f16(float x) {
  asm("" : "+v"(x));
  return static_cast<_Float16>(x);
}

QKV_DEVICE f16 to_f16(float x) { return f16{__builtin_bit_cast(uint16_t, narrow_to_f16(x))}; }
QKV_DEVICE bf16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

QKV_DEVICE uint32_t pack_f16(float low, float high) {
  return __builtin_bit_cast(uint32_t, half2_bits{narrow_to_f16(low), narrow_to_f16(high)});
}
QKV_DEVICE uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

// The selectors are constants below 0x8888: no byte's sign is asked for, and the bytes below are one constant.
QKV_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint32_t bytes = (selector & 0xfu) | (selector & 0xf0u) << 4 | (selector & 0xf00u) << 8 | (selector & 0xf000u) << 12;
  return __builtin_amdgcn_perm(b, a, bytes);
}

// ---- FP8 by instruction
//
// QKV_FP8_BY_F32 is the format with three mantissa bits that the device's instructions convert from and to f32, not
// defined where there are none. QKV_HAS_FP8_CONVERSION: that is OCP's, and E5M2 has instructions too.
#if defined(__gfx942__)
#define QKV_FP8_BY_F32 Format::E4M3Fnuz
#define QKV_HAS_FP8_CONVERSION 0
#elif defined(__gfx950__) || defined(__gfx1200__) || defined(__gfx1201__)
#define QKV_FP8_BY_F32 Format::E4M3
#define QKV_HAS_FP8_CONVERSION 1
#else
#define QKV_HAS_FP8_CONVERSION 0
#endif

#if defined(QKV_FP8_BY_F32)
// NaN stays NaN: a comparison with it is false.
QKV_DEVICE float clamp_for_encoding(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// The sign of a NaN's code goes. FNUZ has one NaN anyway.
QKV_DEVICE uint32_t with_canonical_nans(uint32_t codes, const float (&x)[4]) {
  QKV_UNROLL
  for (int i = 0; i < 4; i++) {
    if ((bits_of(x[i]) & 0x7fffffffu) > 0x7f800000u) codes = (codes & ~(0xffu << 8 * i)) | 0x7fu << 8 * i;
  }
  return codes;
}

// Four f32 to a word of codes, x[0] in the lowest byte.
QKV_DEVICE uint32_t encode_by_f32(const float (&x)[4]) {
  constexpr bool kFnuz = QKV_FP8_BY_F32 == Format::E4M3Fnuz;
  float c[4];
  QKV_UNROLL
  for (int i = 0; i < 4; i++) c[i] = clamp_for_encoding(x[i], kFnuz ? 240.0f : 448.0f);
  const int low = __builtin_amdgcn_cvt_pk_fp8_f32(c[0], c[1], 0, false);
  const uint32_t codes = static_cast<uint32_t>(__builtin_amdgcn_cvt_pk_fp8_f32(c[2], c[3], low, true));
  return kFnuz ? codes : with_canonical_nans(codes, x);
}
QKV_DEVICE void decode_by_f32(uint32_t codes, float (&x)[4]) {
  const float2_bits low = __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), false);
  const float2_bits high = __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), true);
  x[0] = low.x;
  x[1] = low.y;
  x[2] = high.x;
  x[3] = high.y;
}
#endif

#if QKV_HAS_FP8_CONVERSION
QKV_DEVICE uint32_t encode_e5m2x4(const float (&x)[4]) {
  float c[4];
  QKV_UNROLL
  for (int i = 0; i < 4; i++) c[i] = clamp_for_encoding(x[i], 57344.0f);
  const int low = __builtin_amdgcn_cvt_pk_bf8_f32(c[0], c[1], 0, false);
  return with_canonical_nans(static_cast<uint32_t>(__builtin_amdgcn_cvt_pk_bf8_f32(c[2], c[3], low, true)), x);
}
QKV_DEVICE uint16_t encode_e5m2x2(float low, float high) {
  const float x[4] = {low, high, 0.0f, 0.0f};
  return static_cast<uint16_t>(encode_e5m2x4(x));
}
#endif

QKV_DEVICE uint32_t multiply_f16x2(uint32_t x, uint32_t y) {
  return __builtin_bit_cast(uint32_t, __builtin_bit_cast(half2_bits, x) * __builtin_bit_cast(half2_bits, y));
}

#define QKV_HAS_TENSOR_CORES 0

// ---- memory

namespace amdgcn {
template <int N> using Vector = uint32_t __attribute__((ext_vector_type(N)));
}
template <int N> QKV_DEVICE Words<N> load_stream(const Words<N> *p) {
  if constexpr (N == 1) {
    return Words<1>{{__builtin_nontemporal_load(p->w)}};
  } else {
    return __builtin_bit_cast(Words<N>, __builtin_nontemporal_load(reinterpret_cast<const amdgcn::Vector<N> *>(p)));
  }
}

QKV_DEVICE void store_stream(Words<4> *p, const Words<4> &words) {
  __builtin_nontemporal_store(__builtin_bit_cast(amdgcn::Vector<4>, words), reinterpret_cast<amdgcn::Vector<4> *>(p));
}

// The copy is done at once.
QKV_DEVICE void copy_async_16(void *shared, const void *global, bool valid) {
  Words<4> words = {};
  if (valid) words = *static_cast<const Words<4> *>(global);
  *static_cast<Words<4> *>(shared) = words;
}
QKV_DEVICE void copy_async_commit() {}
template <int N> QKV_DEVICE void copy_async_wait() {}

// Kernels of a stream run one after another.
QKV_DEVICE void wait_for_previous_kernel() {}
QKV_DEVICE void allow_next_kernel() {}

} // namespace quantkv
