// The codecs of core/fp8.h: every f32 to a code of each format (the hardware's way and the arithmetic one), every code
// back, and the narrowing of f32 with NaNs kept, against reference.h.
#include "harness.h"
#include "reference.h"

#include "core/fp8.h"
#include "core/rows.h"

#include <cmath>

namespace conformance {
namespace {

template <Format F> QKV_HOST_DEVICE constexpr SmallFloat small_of() {
  return F == Format::E4M3 ? small_e4m3() : F == Format::E5M2 ? small_e5m2() : small_e4m3fnuz();
}

// Scrambled words, so that the places in a pair or a quad are told apart.
QKV_HOST_DEVICE uint32_t other(uint32_t word, uint32_t i) { return i == 0 ? word : (word + i) * 2654435761u + 977u * i; }

template <Format F> struct Encode {
  static QKV_DEVICE uint32_t got(uint32_t word) { return encode<F>(float_of(word)); }
  static QKV_DEVICE uint32_t want(uint32_t word) { return round_to(small_of<F>(), word); }
  static QKV_DEVICE bool same(uint32_t a, uint32_t b) { return a == b; }
};
template <Format F> struct EncodeByBits : Encode<F> {
  static QKV_DEVICE uint32_t got(uint32_t word) { return encode_by_bits<F>(float_of(word)); }
};
template <Format F> struct EncodeFour : Encode<F> {
  static QKV_DEVICE uint32_t got(uint32_t word) {
    float x[4];
    for (uint32_t i = 0; i < 4; i++) x[i] = float_of(other(word, i));
    return encode4<F>(x);
  }
  static QKV_DEVICE uint32_t want(uint32_t word) {
    uint32_t codes = 0;
    for (uint32_t i = 0; i < 4; i++) codes |= round_to(small_of<F>(), other(word, i)) << (8 * i);
    return codes;
  }
};

// x / s by divide() and encode(), as cache_write does it, for a scale that is not a power of two.
template <Format F> struct EncodeScaled : Encode<F> {
  static constexpr float kScale = 0.0371f;
  static QKV_DEVICE uint32_t got(uint32_t word) { return to_stored<F>(float_of(word), kScale); }
  static QKV_DEVICE uint32_t want(uint32_t word) {
    // The quotient in f64, rounded once more to f32: harmless, 53 >= 2 * 24 + 2.
    float x = float_of(word);
    if ((word & 0x7fffffffu) > 0x7f800000u) return small_of<F>().nan;
    return round_to(small_of<F>(), bits_of(static_cast<float>(static_cast<double>(x) / static_cast<double>(kScale))));
  }
};

struct Halves {
  uint32_t low, high;
};
template <Format F> struct DecodeFour {
  static QKV_DEVICE Halves apply(uint32_t codes) {
    Halves h;
    decode4_to_f16<F>(codes, h.low, h.high);
    return h;
  }
};
template <Format F> struct DecodeOne {
  static QKV_DEVICE float apply(uint32_t code) { return decode<F>(code); }
};

template <Format F> bool is_nan_code(uint32_t code) {
  switch (F) {
  case Format::E4M3: return (code & 0x7f) == 0x7f;
  case Format::E5M2: return (code & 0x7f) > 0x7c;
  default: return code == 0x80;
  }
}

// The value of a code, E5M2's infinities included.
template <Format F> double decoded(uint32_t code) {
  if (is_nan_code<F>(code)) return NAN;
  if (F == Format::E5M2 && (code & 0x7f) == 0x7c) return code & 0x80 ? -INFINITY : INFINITY;
  return value_of(small_of<F>(), code);
}

double value_of_f16(uint32_t bits) {
  uint32_t magnitude = bits & 0x7fff;
  if (magnitude > 0x7c00) return NAN;
  if (magnitude == 0x7c00) return bits & 0x8000 ? -INFINITY : INFINITY;
  return value_of(small_f16(), bits);
}

bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <Format F> void decodes(Report &report, const std::string &name) {
  std::vector<uint32_t> one(256), four;
  for (uint32_t i = 0; i < 256; i++) one[i] = i;
  // Every pair of codes in each pair of places.
  for (uint32_t i = 0; i < 65536; i++) {
    four.push_back(i | i << 16);
    four.push_back((i & 0xff) | (i >> 8) << 16 | ((i * 167u) & 0xff) << 8 | ((i * 91u) & 0xff) << 24);
  }
  std::vector<float> got = map<DecodeOne<F>, float>(one);
  uint64_t wrong = 0;
  for (uint32_t i = 0; i < 256; i++) wrong += !same_value(got[i], decoded<F>(i));
  report.line("decode " + name, 256, wrong);
  std::vector<Halves> pairs = map<DecodeFour<F>, Halves>(four);
  wrong = 0;
  std::string first;
  for (size_t i = 0; i < four.size(); i++) {
    const uint32_t words[2] = {pairs[i].low, pairs[i].high};
    bool good = true;
    for (int k = 0; k < 4; k++) {
      good = good && same_value(value_of_f16(words[k / 2] >> (16 * (k % 2)) & 0xffff), decoded<F>(four[i] >> (8 * k) & 0xff));
    }
    if (!good && wrong++ == 0) first = hex(four[i]) + " gives " + hex(words[0]) + " " + hex(words[1]);
  }
  report.line("decode4_to_f16 " + name, four.size(), wrong, first);
}

// narrow keeps the sign and the upper payload bits of a NaN and makes it quiet.
struct NarrowF16 : Encode<Format::E4M3> {
  static QKV_DEVICE uint32_t got(uint32_t word) { return narrow<f16>(float_of(word)).bits; }
  static QKV_DEVICE uint32_t want(uint32_t word) {
    if ((word & 0x7fffffffu) > 0x7f800000u) return (word >> 31) << 15 | 0x7e00u | (word & 0x7fffffu) >> 13;
    return round_to(small_f16(), word);
  }
};
struct NarrowBf16 : Encode<Format::E4M3> {
  static QKV_DEVICE uint32_t got(uint32_t word) { return narrow<bf16>(float_of(word)).bits; }
  static QKV_DEVICE uint32_t want(uint32_t word) {
    if ((word & 0x7fffffffu) > 0x7f800000u) return word >> 16 | 0x40u;
    return round_to(small_bf16(), word);
  }
};

// The quotient by a reciprocal against the division: every significand of an f16 (a bf16's are among them) over every
// significand of a scale. Exponents only move the result, while nothing over- or underflows.
struct ShortQuotient : Encode<Format::E4M3> {
  static QKV_DEVICE uint32_t got(uint32_t word) {
    const float s = float_of(0x3f800000u | (word & 0x7fffffu));
    uint32_t right = 0;
    for (uint32_t last = 0; last < 2; last++) {
      const float x = float_of(0x3f800000u | (word >> 23 << 1 | last) << 13);
      right += bits_of(quotient<Format::F16>(x, s, easy_reciprocal(s))) == bits_of(divide(x, s));
    }
    return right;
  }
  static QKV_DEVICE uint32_t want(uint32_t) { return 2; }
};
// Any f32 over scales of any size that is allowed, and the nearest ones to a quotient half way between two codes. What
// is too small for any code need only stay small and keep its sign; a NaN need only appear where x or the quotient is
// far from finite.
struct LongQuotient : Encode<Format::E4M3> {
  static QKV_DEVICE uint32_t got(uint32_t word) {
    const uint32_t mixed = word * 2654435761u;
    const float s = float_of((64 + (mixed >> 23) % 126) << 23 | (mixed & 0x7fffffu));
    float x = float_of(word);
    if ((word & 3) == 0) x = float_of(bits_of(multiply(s, 16.5f + static_cast<float>(word >> 4 & 15))) + (word >> 8 & 7) - 3);
    const float exact = divide(x, s), q = quotient<Format::F32>(x, s, easy_reciprocal(s));
    const uint32_t magnitude = bits_of(exact) & 0x7fffffffu;
    if (is_nan(q)) return magnitude > 0x7e000000u;                  // 2^125
    if (magnitude >= 0x36800000u) return bits_of(q) == bits_of(exact); // 2^-18
    return ((bits_of(q) ^ bits_of(exact)) >> 31) == 0 && (bits_of(q) & 0x7fffffffu) < 0x37000000u;
  }
  static QKV_DEVICE uint32_t want(uint32_t) { return 1; }
};

template <Format F> void format(Report &report, const std::string &name, uint64_t step) {
  sweep<Encode<F>>(report, "encode " + name, step);
  sweep<EncodeByBits<F>>(report, "encode_by_bits " + name, step);
  sweep<EncodeFour<F>>(report, "encode4 " + name, step);
  sweep<EncodeScaled<F>>(report, "to_stored, scaled " + name, step);
  decodes<F>(report, name);
}

} // namespace

void test_fp8(Report &report, uint64_t step) {
  format<Format::E4M3>(report, "e4m3", step);
  format<Format::E5M2>(report, "e5m2", step);
  format<Format::E4M3Fnuz>(report, "e4m3fnuz", step);
  sweep<ShortQuotient>(report, "quotient, 11 bits", step);
  sweep<LongQuotient>(report, "quotient, 24 bits", step);
  sweep<NarrowF16>(report, "narrow f16", step);
  sweep<NarrowBf16>(report, "narrow bf16", step);
}

} // namespace conformance
