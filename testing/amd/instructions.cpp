// Instructions that retargeted kernels call (retarget.rs) and that a lane carries out alone: arithmetic, and 8-bit floats.
#include "powers.h"

#include <algorithm>
#include <bit>
#include <math.h>
#include <stdint.h>

// The build says what the kernels were compiled for.
#if !defined(QUANTKV_AMD_FNUZ)
#error "define QUANTKV_AMD_FNUZ (whether FP8 instructions are FNUZ)"
#endif

namespace {

using float2 = float __attribute__((vector_size(8)));

// 8-bit floats as the device's instructions have them. E4M3 is FNUZ on gfx942: bias 8, 0x80 the only NaN.
struct Fp8 {
  int mantissa, bias;
  uint32_t largest;
  bool fnuz, infinity;
};
constexpr Fp8 kFp8 = QUANTKV_AMD_FNUZ ? Fp8{3, 8, 0x7f, true, false} : Fp8{3, 7, 0x7e, false, false};
constexpr Fp8 kBf8 = QUANTKV_AMD_FNUZ ? Fp8{2, 16, 0x7f, true, false} : Fp8{2, 15, 0x7b, false, true};

float decode(const Fp8 &format, uint32_t code) {
  const uint32_t magnitude = code & 0x7f, fraction = magnitude & ((1u << format.mantissa) - 1);
  if (format.fnuz ? code == 0x80 : magnitude > format.largest) return NAN;
  const int exponent = static_cast<int>(magnitude >> format.mantissa);
  const int step = (exponent == 0 ? 1 : exponent) - format.bias - format.mantissa;
  const float value = static_cast<float>(exponent == 0 ? fraction : fraction + (1u << format.mantissa)) * power_f32(step);
  return code & 0x80 ? -value : value;
}

// Nearest, ties to even. The instruction does not saturate: what is too large becomes infinity or NaN.
uint32_t encode(const Fp8 &format, float x) {
  const uint32_t sign = signbit(x) ? 0x80 : 0, nan = format.fnuz ? 0x80 : sign | 0x7f;
  if (isnan(x)) return nan;
  const uint32_t overflow = format.infinity ? sign | 0x7c : nan;
  if (isinf(x)) return overflow;
  const float magnitude = fabsf(x);
  const int smallest = 1 - format.bias;
  const int exponent = std::max(static_cast<int>(std::bit_cast<uint32_t>(magnitude) >> 23) - 127, smallest);
  // The large number leaves no bits below one, and so rounds.
  const double steps = (static_cast<double>(magnitude) * power_f64(format.mantissa - exponent) + 0x1p52) - 0x1p52;
  const uint32_t code = (static_cast<uint32_t>(exponent - smallest) << format.mantissa) + static_cast<uint32_t>(steps);
  if (code > format.largest) return overflow;
  return code == 0 && format.fnuz ? 0 : sign | code;
}

uint32_t encode_pair(const Fp8 &format, float low, float high, uint32_t old, bool upper) {
  const uint32_t pair = encode(format, low) | encode(format, high) << 8;
  return upper ? (old & 0xffff) | pair << 16 : (old & 0xffff0000u) | pair;
}

} // namespace

extern "C" {

// v_exp_f32 and v_log_f32 know no subnormals.
float amd_exp2_f32(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
float amd_log_f32(float x) { return fabsf(x) < 0x1p-126f ? -INFINITY : log2f(x); }
float amd_rcp_f32(float x) { return 1.0f / x; }
float amd_rsq_f32(float x) { return 1.0f / sqrtf(x); }
float amd_sqrt_f32(float x) { return sqrtf(x); }
float amd_fmed3_f32(float x, float y, float z) { return fmaxf(fminf(x, y), fminf(fmaxf(x, y), z)); }
// 0 to 3 choose bytes of the second operand, 4 to 7 of the first; 8 to 11 the signs of bytes 1, 3, 5 and 7; 12 is zero.
uint32_t amd_perm(uint32_t high, uint32_t low, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t chosen = selector >> 8 * i & 0xff;
    uint32_t byte = 0xff;
    if (chosen < 8) byte = static_cast<uint32_t>(bytes >> 8 * chosen) & 0xff;
    if (chosen >= 8 && chosen < 12) byte = bytes >> (16 * (chosen - 8) + 15) & 1 ? 0xff : 0;
    if (chosen == 12) byte = 0;
    result |= byte << 8 * i;
  }
  return result;
}
float2 amd_cvt_pk_f32_fp8(uint32_t codes, bool upper) {
  const uint32_t pair = upper ? codes >> 16 : codes;
  return float2{decode(kFp8, pair & 0xff), decode(kFp8, pair >> 8 & 0xff)};
}
uint32_t amd_cvt_pk_fp8_f32(float low, float high, uint32_t old, bool upper) { return encode_pair(kFp8, low, high, old, upper); }
uint32_t amd_cvt_pk_bf8_f32(float low, float high, uint32_t old, bool upper) { return encode_pair(kBf8, low, high, old, upper); }

} // extern "C"
