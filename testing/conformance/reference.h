// Rounding to a small float from its definition, in integers: the value is m * 2^k with a 24-bit m; count how many
// quanta of the target fit, look at the remainder, tie to even. No bias tricks, no float arithmetic: what it is compared
// with shares nothing with it.
#pragma once
#include "core/platform.h"

namespace conformance {

struct SmallFloat {
  int mantissa_bits;
  int min_exponent; // of normal numbers
  uint32_t max_code; // largest finite magnitude
  uint32_t overflow; // the code of what rounds above it: max_code (saturating) or infinity
  uint32_t infinity; // the code of an infinite input
  uint32_t nan;      // canonical; compared as a class where `nan_is_class`
  uint32_t sign_bit;
  bool has_negative_zero;
};

QKV_HOST_DEVICE constexpr SmallFloat small_f16() { return {10, -14, 0x7bff, 0x7c00, 0x7c00, 0x7fff, 0x8000, true}; }
QKV_HOST_DEVICE constexpr SmallFloat small_bf16() { return {7, -126, 0x7f7f, 0x7f80, 0x7f80, 0x7fff, 0x8000, true}; }
QKV_HOST_DEVICE constexpr SmallFloat small_e4m3() { return {3, -6, 0x7e, 0x7e, 0x7e, 0x7f, 0x80, true}; }
QKV_HOST_DEVICE constexpr SmallFloat small_e5m2() { return {2, -14, 0x7b, 0x7b, 0x7b, 0x7f, 0x80, true}; }
QKV_HOST_DEVICE constexpr SmallFloat small_e4m3fnuz() { return {3, -7, 0x7f, 0x7f, 0x7f, 0x80, 0x80, false}; }

// The code of the f32 with these bits. NaN: the canonical code, no sign.
QKV_HOST_DEVICE uint32_t round_to(SmallFloat format, uint32_t bits) {
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t sign = (bits >> 31) != 0 ? format.sign_bit : 0;
  if (magnitude > 0x7f800000u) return format.nan;
  if (magnitude == 0x7f800000u) return sign | format.infinity;
  int field = static_cast<int>(magnitude >> 23);
  int exponent = field == 0 ? -126 : field - 127;
  uint64_t significand = (magnitude & 0x7fffffu) | (field == 0 ? 0u : 0x800000u); // value = significand * 2^(exponent-23)
  int level = exponent > format.min_exponent ? exponent : format.min_exponent;    // binade, subnormals in the lowest
  int shift = level - format.mantissa_bits - (exponent - 23);                      // quantum = 2^shift units of significand
  uint64_t quanta = 0;
  if (shift <= 40) {
    quanta = significand >> shift;
    uint64_t rest = significand - (quanta << shift), half = 1ull << (shift - 1);
    if (rest > half || (rest == half && (quanta & 1) != 0)) quanta++;
  }
  uint64_t code = (static_cast<uint64_t>(level - format.min_exponent) << format.mantissa_bits) + quanta;
  if (code > format.max_code) code = format.overflow;
  if (code == 0 && !format.has_negative_zero) return 0;
  return sign | static_cast<uint32_t>(code);
}

// The f32 bits of a finite code, exactly: quanta times a power of two, the power by repeated doubling or halving.
QKV_HOST_DEVICE double value_of(SmallFloat format, uint32_t code) {
  uint32_t magnitude = code & (format.sign_bit - 1);
  int level = static_cast<int>(magnitude >> format.mantissa_bits);
  uint32_t fraction = magnitude & ((1u << format.mantissa_bits) - 1);
  double quanta = level == 0 ? fraction : fraction + (1u << format.mantissa_bits);
  int exponent = format.min_exponent + (level == 0 ? 0 : level - 1) - format.mantissa_bits;
  for (; exponent > 0; exponent--) quanta *= 2;
  for (; exponent < 0; exponent++) quanta /= 2;
  return (code & format.sign_bit) != 0 ? -quanta : quanta;
}

} // namespace conformance
