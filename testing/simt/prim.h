// Host twin of csrc/core/prim.h: what each instruction computes, written out.
//
// Differs from hardware where hardware is free or undocumented: sums of mma are plain f32 from k = 0 on; exp2_approx
// and log2_approx are as exact as the C library. Asynchronous copies are done as late as allowed, in
// copy_async_wait(). Addresses are checked: alignment, and shared or global as the instruction wants.
//
// The build may define QUANTKV_SIMT_ARCH as 75 or 80: kernels then take the paths of older devices.
#pragma once
#include "device_model.h"
#include "platform.h"

#include <bit>
#include <math.h>

#define QKV_HAS_FP8_CONVERSION (QUANTKV_SIMT_ARCH >= 89)
#define QKV_HAS_TENSOR_CORES (QUANTKV_SIMT_ARCH >= 80)

namespace quantkv {

// ---- bits and floats (the build has -ffp-contract=off)

inline int forget(int x) { return x; }
template <class T> T keep(T x) { return x; }
inline int reread_thread_index() { return thread_index(); }

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

inline float divide(float x, float y) { return x / y; }
inline float multiply(float x, float y) { return x * y; }
inline float fused_multiply_add(float x, float y, float z) { return fmaf(x, y, z); }

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal_approx(float x) {
  const float y = 1.0f / (fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x);
  return fabsf(y) < 0x1p-126f ? copysignf(0.0f, y) : y;
}
inline float log2_approx(float x) { return log2f(x); }
inline float maximum(float x, float y) { return fmaxf(x, y); }

namespace simt {

// A power of two; by its bits, as what follows is most of the emulator's time.
inline float power_f32(int exponent) { return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23); }
inline double power_f64(int exponent) { return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52); }

// The non-negative value of a small float: `mantissa` bits below an exponent of bias `bias`; no special codes.
inline float decode_magnitude(uint32_t code, int mantissa, int bias) {
  const int exponent = static_cast<int>(code >> mantissa);
  const uint32_t fraction = code & ((1u << mantissa) - 1);
  if (exponent == 0) return static_cast<float>(fraction) * power_f32(1 - bias - mantissa);
  return static_cast<float>(fraction + (1u << mantissa)) * power_f32(exponent - bias - mantissa);
}

// The code nearest to a finite magnitude, ties to even; grows past the format's largest where the value does.
inline uint32_t encode_magnitude(float magnitude, int mantissa, int bias) {
  const int smallest = 1 - bias; // exponent of the normal numbers' first binade; below it the step stays the same
  int exponent = static_cast<int>(bits_of(magnitude) >> 23) - 127;
  if (exponent < smallest) exponent = smallest;
  // In units of the step there: up to 2^(mantissa + 1), which is the first code of the next binade. The large number
  // leaves no bits below one, and so rounds.
  const double steps = static_cast<double>(magnitude) * power_f64(mantissa - exponent);
  const double rounded = (steps + 0x1p52) - 0x1p52;
  return (static_cast<uint32_t>(exponent - smallest) << mantissa) + static_cast<uint32_t>(rounded);
}

inline uint32_t sign_of(float x) { return bits_of(x) >> 31; }

inline uint8_t encode_fp8(float x, int mantissa, int bias, uint32_t largest) {
  if (isnan(x)) return 0x7f;
  uint32_t code = isinf(x) ? largest : encode_magnitude(fabsf(x), mantissa, bias);
  if (code > largest) code = largest;
  return static_cast<uint8_t>(sign_of(x) << 7 | code);
}

inline uint32_t word_of(uint32_t low, uint32_t high) { return low | high << 16; }

} // namespace simt

// A NaN becomes the canonical one of the target, as the conversion instructions have it.
inline float to_f32(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude > 0x7c00u) return float_of(0x7fffffffu);
  const float y = magnitude == 0x7c00u ? INFINITY : simt::decode_magnitude(magnitude, 10, 15);
  return x.bits >> 15 ? -y : y;
}
inline float to_f32(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_f32(float x) { return x; }

inline f16 to_f16(float x) {
  constexpr uint32_t infinity = 0x7c00;
  if (isnan(x)) return f16{0x7fff};
  uint32_t code = isinf(x) ? infinity : simt::encode_magnitude(fabsf(x), 10, 15);
  if (code > infinity) code = infinity;
  return f16{static_cast<uint16_t>(simt::sign_of(x) << 15 | code)};
}
inline bf16 to_bf16(float x) {
  if (isnan(x)) return bf16{0x7fff};
  const uint32_t bits = bits_of(x);
  return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline uint32_t pack_f16(float low, float high) { return simt::word_of(to_f16(low).bits, to_f16(high).bits); }
inline uint32_t pack_bf16(float low, float high) { return simt::word_of(to_bf16(low).bits, to_bf16(high).bits); }

// Nibble i of the selector chooses byte i of the result; its top bit replicates the sign of the byte chosen.
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// ---- FP8

#if QKV_HAS_FP8_CONVERSION
inline uint16_t encode_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(simt::encode_fp8(low, 3, 7, 0x7e) | simt::encode_fp8(high, 3, 7, 0x7e) << 8);
}
inline uint32_t encode_e4m3x4(const float (&x)[4]) {
  return encode_e4m3x2(x[0], x[1]) | static_cast<uint32_t>(encode_e4m3x2(x[2], x[3])) << 16;
}
inline uint16_t encode_e5m2x2(float low, float high) {
  return static_cast<uint16_t>(simt::encode_fp8(low, 2, 15, 0x7b) | simt::encode_fp8(high, 2, 15, 0x7b) << 8);
}
inline uint32_t encode_e5m2x4(const float (&x)[4]) {
  return encode_e5m2x2(x[0], x[1]) | static_cast<uint32_t>(encode_e5m2x2(x[2], x[3])) << 16;
}

namespace simt {
inline uint32_t f16_of_e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  if (magnitude == 0x7f) return 0x7fff;
  return (code & 0x80) << 8 | to_f16(decode_magnitude(magnitude, 3, 7)).bits;
}
// E5M2 is the upper byte of an f16.
inline uint32_t f16_of_e5m2(uint32_t code) { return (code & 0x7f) > 0x7c ? 0x7fff : code << 8; }
} // namespace simt

inline void decode_e4m3x4(uint32_t codes, uint32_t &low, uint32_t &high) {
  low = simt::word_of(simt::f16_of_e4m3(codes & 0xff), simt::f16_of_e4m3(codes >> 8 & 0xff));
  high = simt::word_of(simt::f16_of_e4m3(codes >> 16 & 0xff), simt::f16_of_e4m3(codes >> 24));
}
inline void decode_e5m2x4(uint32_t codes, uint32_t &low, uint32_t &high) {
  low = simt::word_of(simt::f16_of_e5m2(codes & 0xff), simt::f16_of_e5m2(codes >> 8 & 0xff));
  high = simt::word_of(simt::f16_of_e5m2(codes >> 16 & 0xff), simt::f16_of_e5m2(codes >> 24));
}
#endif

// Each half of a word as f32.
namespace simt {
inline float f16_half(uint32_t word, int half) { return to_f32(f16{static_cast<uint16_t>(word >> 16 * half)}); }
inline float bf16_half(uint32_t word, int half) { return to_f32(bf16{static_cast<uint16_t>(word >> 16 * half)}); }
} // namespace simt

// A row of 16 times eight columns of a matrix whose rows lie `stride` apart; each sum from k = 0 on.
namespace simt {
inline void multiply_row(float *sums, const float (&row)[16], const float *matrix, int stride) {
  typedef float Eight __attribute__((vector_size(32)));
  Eight sum = {};
  for (int k = 0; k < 16; k++) {
    Eight columns;
    memcpy(&columns, matrix + k * stride, sizeof columns);
    sum += row[k] * columns;
  }
  memcpy(sums, &sum, sizeof sum);
}
} // namespace simt

// A product of two f16 has 22 significant bits: exact in f32, rounded once.
inline uint32_t multiply_f16x2(uint32_t x, uint32_t y) {
  return pack_f16(simt::f16_half(x, 0) * simt::f16_half(y, 0), simt::f16_half(x, 1) * simt::f16_half(y, 1));
}

// ---- tensor cores

#if QKV_HAS_TENSOR_CORES
namespace simt {

struct MmaOperand {
  uint32_t a[4], b[2];
  float c[4];
};
struct MmaResult {
  float c[4];
};

// The fragments of the file comment of csrc/core/prim.h, gathered into matrices and dealt out again.
template <class Decode> void mma_16816(const Deposits &warp) {
  float a[16][16], b[16][8], sums[16][8]; // rows x k, k x columns, rows x columns
  for (int lane = 0; lane < kLanes; lane++) {
    const MmaOperand &mine = warp.operand<MmaOperand>(lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = Decode()(mine.a[i], half);
      for (int i = 0; i < 2; i++) b[2 * t + 8 * i + half][g] = Decode()(mine.b[i], half);
    }
  }
  for (int row = 0; row < 16; row++) multiply_row(sums[row], a[row], b[0], 8);
  for (int lane = 0; lane < kLanes; lane++) {
    const MmaOperand &mine = warp.operand<MmaOperand>(lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) warp.result<MmaResult>(lane).c[i] = mine.c[i] + sums[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template <class Decode>
void mma(const char *name, const Site &site, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode) {
  const MmaOperand operand = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const MmaResult result = collective<MmaResult>(name, site, operand, mma_16816<Decode>, true);
  memcpy(c, result.c, sizeof c);
}

} // namespace simt

inline void mma_16816_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          simt::Site site = simt::Site::current()) {
  simt::mma("mma_16816_f16", site, c, a, b0, b1, [](uint32_t word, int half) { return simt::f16_half(word, half); });
}
inline void mma_16816_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           simt::Site site = simt::Site::current()) {
  simt::mma("mma_16816_bf16", site, c, a, b0, b1, [](uint32_t word, int half) { return simt::bf16_half(word, half); });
}
#endif

// ---- matrices of 16-bit elements

inline uint32_t transpose_8x8(uint32_t pair, simt::Site site = simt::Site::current()) {
  return simt::collective<uint32_t>(
      "transpose_8x8", site, pair,
      [](const simt::Deposits &warp) {
        const auto element = [&](int row, int column) {
          return warp.operand<uint32_t>(4 * row + column / 2) >> 16 * (column % 2) & 0xffff;
        };
        for (int lane = 0; lane < kWarp; lane++) {
          const int g = lane / 4, t = lane % 4;
          warp.result<uint32_t>(lane) = simt::word_of(element(2 * t, g), element(2 * t + 1, g));
        }
      },
      true);
}

namespace simt {

struct Matrices {
  uint32_t r[4];
};

template <bool kTransposed> void load_matrices(const Deposits &warp) {
  const auto element = [&](int matrix, int row, int column) {
    uint16_t bits;
    memcpy(&bits, static_cast<const char *>(warp.operand<const void *>(8 * matrix + row)) + 2 * column, sizeof bits);
    return static_cast<uint32_t>(bits);
  };
  for (int lane = 0; lane < kLanes; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; m++) {
      warp.result<Matrices>(lane).r[m] = kTransposed ? word_of(element(m, 2 * t, g), element(m, 2 * t + 1, g))
                                                     : word_of(element(m, g, 2 * t), element(m, g, 2 * t + 1));
    }
  }
}

template <bool kTransposed> void load_matrix(const char *name, const Site &site, uint32_t (&r)[4], const void *row) {
  check_aligned(name, row, 16);
  check_shared(name, row, 16);
  const Matrices result = collective<Matrices>(name, site, row, load_matrices<kTransposed>, true);
  memcpy(r, result.r, sizeof r);
}

} // namespace simt

inline void load_matrix_x4(uint32_t (&r)[4], const void *row, simt::Site site = simt::Site::current()) {
  simt::load_matrix<false>("load_matrix_x4", site, r, row);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void *row, simt::Site site = simt::Site::current()) {
  simt::load_matrix<true>("load_matrix_x4_transposed", site, r, row);
}

// ---- memory

template <int N> Words<N> load_stream(const Words<N> *p) {
  simt::check_aligned("load_stream", p, sizeof *p);
  simt::check_global("load_stream", p, sizeof *p);
  return *p;
}

inline void store_stream(Words<4> *p, const Words<4> &words) {
  simt::check_aligned("store_stream", p, sizeof *p);
  simt::check_global("store_stream", p, sizeof *p);
  *p = words;
}

// No instruction would fault outside of memory, but no kernel should ask for it: with AddressSanitizer that is reported.
inline void prefetch_l2(const void *p) {
  simt::check_global("prefetch_l2", p, 1);
  (void)*static_cast<const volatile unsigned char *>(p);
}

inline int32_t load_unsettled(const int32_t *p) {
  simt::check_aligned("load_unsettled", p, sizeof *p);
  simt::check_global("load_unsettled", p, sizeof *p);
  return *p;
}

// Blocks run one after another: what is not there yet never will be.
constexpr int kMostLooks = 1;

template <int kCount> Words<kCount> load_relaxed(const Words<kCount> *p) {
  simt::check_aligned("load_relaxed", p, sizeof *p);
  simt::check_global("load_relaxed", p, sizeof *p);
  return *p;
}
template <int kCount> void store_relaxed(Words<kCount> *p, const Words<kCount> &words) {
  simt::check_aligned("store_relaxed", p, sizeof *p);
  simt::check_global("store_relaxed", p, sizeof *p);
  *p = words;
}

inline void copy_async_16(void *shared, const void *global, bool valid) {
  simt::check_aligned("copy_async_16, destination", shared, 16);
  simt::check_shared("copy_async_16, destination", shared, 16);
  if (valid) {
    simt::check_aligned("copy_async_16, source", global, 16);
    simt::check_global("copy_async_16, source", global, 16);
    // With AddressSanitizer, an address outside its buffer is reported here and not at the wait.
    const auto *bytes = static_cast<const volatile unsigned char *>(global);
    (void)bytes[0], (void)bytes[15];
  }
  simt::current->copies.push_back({shared, valid ? global : nullptr, 16});
}
inline void copy_async_4(void *shared, const void *global) {
  simt::check_aligned("copy_async_4, destination", shared, 4);
  simt::check_shared("copy_async_4, destination", shared, 4);
  simt::check_aligned("copy_async_4, source", global, 4);
  simt::check_global("copy_async_4, source", global, 4);
  (void)*static_cast<const volatile uint32_t *>(global);
  simt::current->copies.push_back({shared, global, 4});
}
inline void copy_async_commit() {
  simt::Lane &lane = *simt::current;
  size_t grouped = 0;
  for (size_t group : lane.groups) grouped += group;
  lane.groups.push_back(lane.copies.size() - grouped);
}
template <int N> void copy_async_wait() {
  simt::Lane &lane = *simt::current;
  while (lane.groups.size() > static_cast<size_t>(N)) {
    const size_t count = lane.groups.front();
    for (size_t i = 0; i < count; i++) {
      const simt::AsyncCopy &copy = lane.copies[i];
      copy.global ? memcpy(copy.shared, copy.global, copy.bytes) : memset(copy.shared, 0, copy.bytes);
    }
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<ptrdiff_t>(count));
    lane.groups.erase(lane.groups.begin());
  }
}

inline void wait_for_previous_kernel() { simt::waited_for_previous_kernel(); }
inline void allow_next_kernel() {}

} // namespace quantkv
