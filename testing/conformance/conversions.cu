// f32 to f16 and bf16 over all 2^32 words, and back over all 2^16; packed pairs; f16 products.
#include "harness.h"
#include "reference.h"

#include <cmath>

namespace conformance {
namespace {

// NaN of f16 and bf16 is a class: any payload.
QKV_HOST_DEVICE bool is_nan16(uint32_t code, uint32_t infinity) { return (code & 0x7fff) > infinity; }

struct ToF16 {
  static QKV_DEVICE uint32_t got(uint32_t word) { return to_f16(float_of(word)).bits; }
  static QKV_DEVICE uint32_t want(uint32_t word) { return round_to(small_f16(), word); }
  static QKV_DEVICE bool same(uint32_t a, uint32_t b) { return a == b || (is_nan16(a, 0x7c00) && is_nan16(b, 0x7c00)); }
};
struct ToBf16 {
  static QKV_DEVICE uint32_t got(uint32_t word) { return to_bf16(float_of(word)).bits; }
  static QKV_DEVICE uint32_t want(uint32_t word) { return round_to(small_bf16(), word); }
  static QKV_DEVICE bool same(uint32_t a, uint32_t b) { return a == b || (is_nan16(a, 0x7f80) && is_nan16(b, 0x7f80)); }
};
// Pairs: the word and a scrambled one, so that a swap of halves is seen.
QKV_HOST_DEVICE uint32_t other(uint32_t word) { return word * 2654435761u + 12345u; }
struct PackF16 {
  static QKV_DEVICE uint32_t got(uint32_t word) { return pack_f16(float_of(word), float_of(other(word))); }
  static QKV_DEVICE uint32_t want(uint32_t word) {
    return round_to(small_f16(), word) | round_to(small_f16(), other(word)) << 16;
  }
  static QKV_DEVICE bool same(uint32_t a, uint32_t b) {
    return ToF16::same(a & 0xffff, b & 0xffff) && ToF16::same(a >> 16, b >> 16);
  }
};
struct PackBf16 {
  static QKV_DEVICE uint32_t got(uint32_t word) { return pack_bf16(float_of(word), float_of(other(word))); }
  static QKV_DEVICE uint32_t want(uint32_t word) {
    return round_to(small_bf16(), word) | round_to(small_bf16(), other(word)) << 16;
  }
  static QKV_DEVICE bool same(uint32_t a, uint32_t b) {
    return ToBf16::same(a & 0xffff, b & 0xffff) && ToBf16::same(a >> 16, b >> 16);
  }
};

struct FromF16 {
  static QKV_DEVICE float apply(uint16_t bits) { return to_f32(f16{bits}); }
};
struct FromBf16 {
  static QKV_DEVICE float apply(uint16_t bits) { return to_f32(bf16{bits}); }
};

template <class Op> void widen(Report &report, const char *name, SmallFloat format, uint32_t infinity) {
  std::vector<uint16_t> codes(65536);
  for (size_t i = 0; i < codes.size(); i++) codes[i] = static_cast<uint16_t>(i);
  std::vector<float> got = map<Op, float>(codes);
  uint64_t wrong = 0;
  std::string first;
  for (uint32_t code = 0; code < 65536; code++) {
    uint32_t magnitude = code & 0x7fff;
    float want = magnitude > infinity    ? as_float(0x7fc00000)
                 : magnitude == infinity ? as_float(0x7f800000 | (code & 0x8000) << 16)
                                         : static_cast<float>(value_of(format, code));
    bool good = std::isnan(want) ? std::isnan(got[code]) : as_bits(got[code]) == as_bits(want);
    if (!good && wrong++ == 0) first = hex(code) + " gives " + hex(as_bits(got[code]));
  }
  report.line(name, codes.size(), wrong, first);
}

// A product of two f16 has 22 significant bits: exact in f32, so rounding that is rounding once.
struct Product {
  static QKV_HOST_DEVICE uint32_t second(uint32_t word) { return other(word); }
  static QKV_DEVICE uint32_t got(uint32_t word) { return multiply_f16x2(word, second(word)); }
  static QKV_DEVICE uint32_t want(uint32_t word) { return half(word, second(word)) | half(word >> 16, second(word) >> 16) << 16; }
  static QKV_DEVICE uint32_t half(uint32_t a, uint32_t b) {
    float x = to_f32(f16{static_cast<uint16_t>(a)}), y = to_f32(f16{static_cast<uint16_t>(b)});
    return round_to(small_f16(), bits_of(multiply(x, y)));
  }
  static QKV_DEVICE bool same(uint32_t a, uint32_t b) { return PackF16::same(a, b); }
};

} // namespace

void test_conversions(Report &report, uint64_t step) {
  widen<FromF16>(report, "to_f32(f16)", small_f16(), 0x7c00);
  widen<FromBf16>(report, "to_f32(bf16)", small_bf16(), 0x7f80);
  sweep<ToF16>(report, "to_f16", step);
  sweep<ToBf16>(report, "to_bf16", step);
  sweep<PackF16>(report, "pack_f16", step);
  sweep<PackBf16>(report, "pack_bf16", step);
  sweep<Product>(report, "multiply_f16x2", step);
}

} // namespace conformance
