// Single instructions behind names: the only inline PTX of the library (AMD's are in amdgcn/). Each function has a host twin in
// testing/simt/prim.h and a conformance test that runs on hardware.
//
// Fragments of the 16 x 8 x 16 product (mma_16816_*), lane = 4*g + t:
//   a[0] A[g][2t..2t+1]   a[1] A[g+8][2t..]   a[2] A[g][2t+8..]   a[3] A[g+8][2t+8..]     rows x k
//   b[0] B[2t..2t+1][g]   b[1] B[2t+8..][g]                                               k x columns
//   c[0] C[g][2t]  c[1] C[g][2t+1]  c[2] C[g+8][2t]  c[3] C[g+8][2t+1]
// The element of lower index is in the lower half of a word.
#pragma once
#include "platform.h"

#if defined(QUANTKV_SIMT)

#include "simt/prim.h" // testing/simt

#elif defined(__HIP__)

#include "amdgcn/prim.h"

#else

namespace quantkv {

// The same value, of which the compiler knows nothing: what follows from it is computed again where it is used, not
// kept in a register from before.
QKV_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// x in a register from here on: the compiler does not compute it again where it is used. For what a loop needs.
template <class T> QKV_DEVICE T keep(T x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a register or two");
  if constexpr (sizeof(T) == 8) {
    asm("" : "+l"(x));
  } else {
    asm("" : "+r"(x));
  }
  return x;
}

// thread_index(), read again from where the hardware has it: where it is not worth a register until then.
QKV_DEVICE int reread_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// ---- bits and floats

QKV_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
QKV_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// The quotient rounded to nearest even, subnormals kept, whatever the compiler's flags.
QKV_DEVICE float divide(float x, float y) { return __fdiv_rn(x, y); }
// Never contracted to a fused multiply-add.
QKV_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
QKV_DEVICE float fused_multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }

// 2^x to about 2 ulp; results below 2^-126 are flushed to zero. -inf gives 0.
QKV_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to about 1 ulp; subnormals are taken for zero, and flushed to it.
QKV_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) to about 2 ulp; 0 gives -inf.
QKV_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one; of a number and a NaN the number.
QKV_DEVICE float maximum(float x, float y) { return fmaxf(x, y); }

// f16 and bf16: exact to f32; from f32 by round to nearest even, infinities kept, NaN stays NaN.
QKV_DEVICE float to_f32(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
QKV_DEVICE float to_f32(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
QKV_DEVICE float to_f32(float x) { return x; }

QKV_DEVICE f16 to_f16(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
QKV_DEVICE bf16 to_bf16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#else
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

// Two f32 to a word of two f16 or bf16, `low` in the lower half.
QKV_DEVICE uint32_t pack_f16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return to_f16(low).bits | static_cast<uint32_t>(to_f16(high).bits) << 16;
#else
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}
QKV_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
#else
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

// Bytes of {b, a} (a is bytes 0-3) chosen by the nibbles of `selector`.
QKV_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// ---- FP8 by instruction, sm_89 and up. Where they are missing, fp8.h's arithmetic is used instead.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define QKV_HAS_FP8_CONVERSION 1
#else
#define QKV_HAS_FP8_CONVERSION 0
#endif

#if QKV_HAS_FP8_CONVERSION
// Two f32 to two codes, `low` in the lower byte: nearest even, saturating; NaN gives 0x7F.
QKV_DEVICE uint16_t encode_e4m3x2(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
QKV_DEVICE uint16_t encode_e5m2x2(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
// Four f32 to a word of codes, x[0] in the lowest byte. One asm block: no code is zero-extended on the way.
QKV_DEVICE uint32_t encode_e4m3x4(const float (&x)[4]) {
  uint32_t codes;
  asm("{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h}; }"
      : "=r"(codes)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
  return codes;
}
QKV_DEVICE uint32_t encode_e5m2x4(const float (&x)[4]) {
  uint32_t codes;
  asm("{ .reg .b16 l, h; cvt.rn.satfinite.e5m2x2.f32 l, %2, %1; cvt.rn.satfinite.e5m2x2.f32 h, %4, %3; mov.b32 %0, {l, h}; }"
      : "=r"(codes)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
  return codes;
}
// Four codes to two words of f16 pairs, exact. One asm block: the second half is then a selector of the
// instruction, not a shift.
QKV_DEVICE void decode_e4m3x4(uint32_t codes, uint32_t &low, uint32_t &high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
QKV_DEVICE void decode_e5m2x4(uint32_t codes, uint32_t &low, uint32_t &high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e5m2x2 %0, l; cvt.rn.f16x2.e5m2x2 %1, h; }"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
#endif

// Multiplies two f16 by two f16.
QKV_DEVICE uint32_t multiply_f16x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// ---- tensor cores, sm_80 and up

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define QKV_HAS_TENSOR_CORES 1
#else
#define QKV_HAS_TENSOR_CORES 0
#endif

#if QKV_HAS_TENSOR_CORES
// c += a b, sums in f32.
QKV_DEVICE void mma_16816_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QKV_DEVICE void mma_16816_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Transposes the 8 x 8 matrix of 16-bit elements whose row g lies in lanes 4g..4g+3, two elements each. (sm_75)
QKV_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l%8 of matrix l/8
// (16 bytes, aligned) and gets, of matrix i, elements [l/4][2(l%4)..] in r[i], transposed: [2(l%4)..][l/4]. (sm_75)
QKV_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void *row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
QKV_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void *row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- memory

// Reads that go by once (KV): past L1. Aligned to their size.
QKV_DEVICE Words<4> load_stream(const Words<4> *p) {
  Words<4> r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p));
#else
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p));
#endif
  return r;
}
QKV_DEVICE Words<2> load_stream(const Words<2> *p) {
  Words<2> r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
#else
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
#endif
  return r;
}
QKV_DEVICE Words<1> load_stream(const Words<1> *p) {
  Words<1> r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r.w[0]) : "l"(p));
#else
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r.w[0]) : "l"(p));
#endif
  return r;
}

// To memory that this multiprocessor does not read again: it leaves no line in L1. (Copies of whole blocks are 2 to 6 % faster for it.)
QKV_DEVICE void store_stream(Words<4> *p, const Words<4> &words) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(words.w[0]), "r"(words.w[1]), "r"(words.w[2]),
               "r"(words.w[3])
               : "memory");
#else
  *p = words;
#endif
}

// Asks for the line of L2 that holds *p. Moves no data to the SM and changes nothing a thread can see: what the line
// holds when it is read counts, not what it held now. (sm_80 here: before, the hint costs more than it gives.)
QKV_DEVICE void prefetch_l2(const void *p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// A word that another kernel may be writing: whatever it is now, and nothing of it stays in L1.
QKV_DEVICE int32_t load_unsettled(const int32_t *p) {
  int32_t word;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(word) : "l"(p));
  return word;
}

// Words that blocks of a grid hand each other: as they are now, past L1, each word by itself. Aligned to their size. Who waits
// for one looks again, kMostLooks times at most, which is a second: a block that has begun will have written it by then.
constexpr int kMostLooks = 1 << 20;
QKV_DEVICE Words<4> load_relaxed(const Words<4> *p) {
  Words<4> r;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p)
               : "memory");
  return r;
}
QKV_DEVICE Words<2> load_relaxed(const Words<2> *p) {
  Words<2> r;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p) : "memory");
  return r;
}
QKV_DEVICE void store_relaxed(Words<4> *p, const Words<4> &words) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(words.w[0]), "r"(words.w[1]), "r"(words.w[2]), "r"(words.w[3])
               : "memory");
}
QKV_DEVICE void store_relaxed(Words<2> *p, const Words<2> &words) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(words.w[0]), "r"(words.w[1]) : "memory");
}

// 16 bytes from global to shared memory, in the background; zeros if not `valid`, and then nothing is read.
// Below sm_80 the copy is done at once.
QKV_DEVICE void copy_async_16(void *shared, const void *global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
#else
  Words<4> words = {};
  if (valid) words = *static_cast<const Words<4> *>(global);
  *static_cast<Words<4> *>(shared) = words;
#endif
}
// The same of 4 bytes, always read.
QKV_DEVICE void copy_async_4(void *shared, const void *global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
#else
  *static_cast<uint32_t *>(shared) = *static_cast<const uint32_t *>(global);
#endif
}
// Ends a group of copies.
QKV_DEVICE void copy_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most N of this thread's groups are under way. Others' data needs a barrier after it.
template <int N> QKV_DEVICE void copy_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Programmatic dependent launch (sm_90): waits for the kernel before this one and its writes; allows the next one
// to start. No effect for an ordinary launch, and on older devices.
QKV_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
QKV_DEVICE void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

} // namespace quantkv

#endif
