// From f32 to a stored element and back, for every storage format: the arithmetic of docs/numerics.md, bit for
// bit that of src/codec.
//
//   encode<F>(x), encode4<F>(x)      codes: nearest, ties to even, saturating; one canonical NaN
//   decode<F>(code), decode4<F>(..)  values, exact;  decode4_to_f16<F>: as pairs of f16, exact too
//   load_element, store_element      one element of any format in memory, with its scale
//   dispatch_format, dispatch_activation   a run-time format as a compile-time one
//
// A word holds four codes, the first in the lowest byte. Instructions are used where the device has them (NVIDIA's go
// by f16, QKV_HAS_FP8_CONVERSION; AMD's by f32, QKV_FP8_BY_F32); the arithmetic on bits is the same algorithm as
// src/codec/fp8.rs.
//
// An 8-bit float with M mantissa bits and exponent bias B has value 2^(e-B) * (1 + m/2^M) for exponent field
// e > 0, and 2^(1-B) * m/2^M for e = 0.
#pragma once
#include "prim.h"

namespace quantkv {

// The numbers of an 8-bit format.
template <Format F> struct Fp8;
template <> struct Fp8<Format::E4M3> {
  static constexpr int kMantissaBits = 3, kBias = 7;
  static constexpr uint32_t kMaxCode = 0x7e, kNanCode = 0x7f;
  static constexpr bool kNegativeZero = true; // else 0x80 is the only NaN
};
template <> struct Fp8<Format::E5M2> {
  static constexpr int kMantissaBits = 2, kBias = 15;
  static constexpr uint32_t kMaxCode = 0x7b, kNanCode = 0x7f;
  static constexpr bool kNegativeZero = true;
};
template <> struct Fp8<Format::E4M3Fnuz> {
  static constexpr int kMantissaBits = 3, kBias = 8;
  static constexpr uint32_t kMaxCode = 0x7f, kNanCode = 0x80;
  static constexpr bool kNegativeZero = false;
};

// The largest finite value of an 8-bit format.
QKV_HOST_DEVICE constexpr float max_finite(Format format) {
  return format == Format::E4M3 ? 448.0f : format == Format::E5M2 ? 57344.0f : 240.0f;
}

QKV_DEVICE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// ---- codes from f32

// Normal results: drop 23-M mantissa bits by "add half minus one plus the kept bit" and rebias; a carry out of the
// mantissa lands in the exponent, as it should. Subnormal results: adding a power of two whose unit in the last
// place is the subnormals' spacing makes the f32 adder round.
template <Format F> QKV_DEVICE uint32_t encode_by_bits(float x) {
  using Number = Fp8<F>;
  constexpr uint32_t shift = 23 - Number::kMantissaBits;
  constexpr uint32_t smallest_normal = uint32_t(127 + 1 - Number::kBias) << 23;
  constexpr uint32_t magic = uint32_t(127 + 1 - Number::kBias + shift) << 23;
  constexpr uint32_t rebias = uint32_t(127 - Number::kBias) << Number::kMantissaBits;
  uint32_t bits = bits_of(x);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Number::kNanCode;
  uint32_t rounded = magnitude + ((1u << (shift - 1)) - 1) + ((magnitude >> shift) & 1);
  uint32_t normal = (rounded >> shift) - rebias;
  uint32_t subnormal = bits_of(float_of(magnitude) + float_of(magic)) - magic;
  uint32_t code = magnitude >= smallest_normal ? normal : subnormal;
  if (code > Number::kMaxCode) code = Number::kMaxCode;
  if (!Number::kNegativeZero && code == 0) return 0;
  return code | ((bits >> 24) & 0x80u);
}

// Two codes, `low` in the lower byte.
template <Format F> QKV_DEVICE uint32_t encode2(float low, float high) {
#if defined(QKV_FP8_BY_F32)
  if constexpr (F == QKV_FP8_BY_F32) {
    const float x[4] = {low, high, 0.0f, 0.0f};
    return encode_by_f32(x) & 0xffffu;
  }
#elif QKV_HAS_FP8_CONVERSION
  if constexpr (F == Format::E4M3) return encode_e4m3x2(low, high);
#endif
#if QKV_HAS_FP8_CONVERSION
  if constexpr (F == Format::E5M2) return encode_e5m2x2(low, high);
#endif
  return encode_by_bits<F>(low) | encode_by_bits<F>(high) << 8;
}

template <Format F> QKV_DEVICE uint32_t encode(float x) { return encode2<F>(x, 0.0f) & 0xffu; }

// Four codes, x[0] in the lowest byte.
template <Format F> QKV_DEVICE uint32_t encode4(const float (&x)[4]) {
#if defined(QKV_FP8_BY_F32)
  if constexpr (F == QKV_FP8_BY_F32) return encode_by_f32(x);
#elif QKV_HAS_FP8_CONVERSION
  if constexpr (F == Format::E4M3) return encode_e4m3x4(x);
#endif
#if QKV_HAS_FP8_CONVERSION
  if constexpr (F == Format::E5M2) return encode_e5m2x4(x);
#endif
  return encode2<F>(x[0], x[1]) | encode2<F>(x[2], x[3]) << 16;
}

// ---- f32 and f16 from codes

// Four codes to two words of f16 pairs, exact: every value of the three formats is an f16.
//
// E5M2 is the upper byte of an f16. The E4M3 kinds, put at the place of an f16's lower exponent bits, are too
// small by 2^(15-B), subnormals included, which a product restores; their NaN is put in afterwards.
template <Format F> QKV_DEVICE void decode4_to_f16(uint32_t codes, uint32_t &low, uint32_t &high) {
  if constexpr (F == Format::E5M2) {
    low = byte_permute(codes, 0, 0x1404);
    high = byte_permute(codes, 0, 0x3424);
    return;
  }
#if defined(QKV_FP8_BY_F32)
  if constexpr (F == QKV_FP8_BY_F32) {
    float x[4];
    decode_by_f32(codes, x);
    low = pack_f16(x[0], x[1]);
    high = pack_f16(x[2], x[3]);
    return;
  }
#elif QKV_HAS_FP8_CONVERSION
  if constexpr (F == Format::E4M3) {
    decode_e4m3x4(codes, low, high);
    return;
  }
#endif
  if constexpr (F != Format::E5M2) {
    constexpr uint32_t lanes = 0x00010001u;
    constexpr uint32_t factor = uint32_t(15 + 15 - Fp8<F>::kBias) << 10; // 2^(15-B) as f16
    uint32_t words[2] = {byte_permute(codes, 0, 0x1404), byte_permute(codes, 0, 0x3424)};
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      uint32_t sign = words[i] & (0x8000u * lanes);
      uint32_t magnitude = (words[i] >> 1) & (0x3f80u * lanes);
      uint32_t value = multiply_f16x2(sign | magnitude, factor * lanes);
      if constexpr (Fp8<F>::kNegativeZero) {
        uint32_t nan = (magnitude + 0x0080u * lanes) & (0x4000u * lanes); // only 0x3f80 carries into bit 14
        value |= (nan << 1) - (nan >> 5);                                 // 0x7e00 where it did
      } else {
        uint32_t not_zero = (magnitude + 0x3f80u * lanes) & (0x4000u * lanes);
        uint32_t nan = sign & ~(not_zero << 1);
        value |= nan - (nan >> 6);
      }
      words[i] = value;
    }
    low = words[0];
    high = words[1];
  }
}

// The halves of a pair of f16 as f32.
QKV_DEVICE void unpack_f16(uint32_t pair, float &low, float &high) {
  low = to_f32(f16{static_cast<uint16_t>(pair)});
  high = to_f32(f16{static_cast<uint16_t>(pair >> 16)});
}
QKV_DEVICE void unpack_bf16(uint32_t pair, float &low, float &high) {
  low = float_of(pair << 16);
  high = float_of(pair & 0xffff0000u);
}

// Four codes to f32, exact.
template <Format F> QKV_DEVICE void decode4(uint32_t codes, float (&x)[4]) {
#if defined(QKV_FP8_BY_F32)
  if constexpr (F == QKV_FP8_BY_F32) return decode_by_f32(codes, x);
#endif
  uint32_t low, high;
  decode4_to_f16<F>(codes, low, high);
  unpack_f16(low, x[0], x[1]);
  unpack_f16(high, x[2], x[3]);
}

template <Format F> QKV_DEVICE float decode(uint32_t code) {
#if defined(QKV_FP8_BY_F32)
  if constexpr (F == QKV_FP8_BY_F32) {
    float x[4];
    decode_by_f32(code & 0xffu, x);
    return x[0];
  }
#endif
  uint32_t low, high;
  decode4_to_f16<F>(code & 0xffu, low, high);
  return to_f32(f16{static_cast<uint16_t>(low)});
}

// ---- between the unquantized types, NaN included
//
// The instructions give one NaN for all; here, as on the CPU, a NaN keeps its sign and its upper payload bits and
// becomes quiet. Where an FP8 code or a product is on the other side, to_f32, to_f16 and to_bf16 will do.

QKV_DEVICE bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

QKV_DEVICE float widen(float x) { return x; }
QKV_DEVICE float widen(f16 x) {
  uint32_t bits = x.bits;
  if ((bits & 0x7fffu) > 0x7c00u) return float_of((bits & 0x8000u) << 16 | 0x7fc00000u | (bits & 0x3ffu) << 13);
  return to_f32(x);
}
QKV_DEVICE float widen(bf16 x) {
  bool nan = (x.bits & 0x7fffu) > 0x7f80u;
  return float_of((static_cast<uint32_t>(x.bits) | (nan ? 0x40u : 0u)) << 16);
}

template <class T> struct Narrow;
template <> struct Narrow<float> {
  static QKV_DEVICE float from(float x) { return x; }
};
template <> struct Narrow<f16> {
  static QKV_DEVICE f16 from(float x) {
    uint32_t bits = bits_of(x);
    if (is_nan(x)) return f16{static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x3ffu))};
    return to_f16(x);
  }
};
template <> struct Narrow<bf16> {
  static QKV_DEVICE bf16 from(float x) {
    if (is_nan(x)) return bf16{static_cast<uint16_t>(bits_of(x) >> 16 | 0x40u)};
    return to_bf16(x);
  }
};
// f32 to T: nearest even, overflow to infinity.
template <class T> QKV_DEVICE T narrow(float x) { return Narrow<T>::from(x); }

// ---- elements of any format

template <Format F> struct StoredAs {
  using type = uint8_t;
};
template <> struct StoredAs<Format::F32> {
  using type = float;
};
template <> struct StoredAs<Format::F16> {
  using type = f16;
};
template <> struct StoredAs<Format::BF16> {
  using type = bf16;
};
// What an element of a format is in memory.
template <Format F> using Stored = typename StoredAs<F>::type;

// x in storage: encode(x / scale), or for an unquantized format x itself; the same type is a copy of bits.
template <Format F, class T> QKV_DEVICE Stored<F> to_stored(T x, float scale) {
  if constexpr (is_quantized(F)) {
    return static_cast<uint8_t>(encode<F>(divide(to_f32(x), scale)));
  } else if constexpr (FormatOf<T>::value == F) {
    return x;
  } else {
    return narrow<Stored<F>>(widen(x));
  }
}

// The value of a stored element: decode(code) * scale, or for an unquantized format the element itself.
template <class T, Format F> QKV_DEVICE T from_stored(Stored<F> stored, float scale) {
  if constexpr (is_quantized(F)) {
    return narrow<T>(multiply(decode<F>(stored), scale));
  } else if constexpr (FormatOf<T>::value == F) {
    return stored;
  } else {
    return narrow<T>(widen(stored));
  }
}

// Element `index` of memory that holds format F.
template <Format F> QKV_DEVICE float load_element(const void *base, int64_t index) {
  Stored<F> stored = static_cast<const Stored<F> *>(base)[index];
  if constexpr (is_quantized(F)) {
    return decode<F>(stored);
  } else {
    return widen(stored);
  }
}
template <class T, Format F> QKV_DEVICE T load_element_as(const void *base, int64_t index, float scale) {
  return from_stored<T, F>(static_cast<const Stored<F> *>(base)[index], scale);
}
template <Format F, class T> QKV_DEVICE void store_element(void *base, int64_t index, T x, float scale) {
  static_cast<Stored<F> *>(base)[index] = to_stored<F>(x, scale);
}

// ---- run-time formats
//
//   dispatch_format(format, [&](auto tag) { constexpr Format F = decltype(tag)::value; .. });
//   dispatch_activation(format, [&](auto tag) { using T = typename decltype(tag)::type; .. });
//
// The format is the same for the whole grid: a branch no warp diverges on.

template <Format F> struct FormatTag {
  static constexpr Format value = F;
};
template <class T> struct TypeTag {
  using type = T;
};

template <class Body> QKV_DEVICE void dispatch_format(Format format, Body body) {
  switch (format) {
  case Format::F32: body(FormatTag<Format::F32>{}); break;
  case Format::F16: body(FormatTag<Format::F16>{}); break;
  case Format::BF16: body(FormatTag<Format::BF16>{}); break;
  case Format::E4M3: body(FormatTag<Format::E4M3>{}); break;
  case Format::E5M2: body(FormatTag<Format::E5M2>{}); break;
  case Format::E4M3Fnuz: body(FormatTag<Format::E4M3Fnuz>{}); break;
  }
}
template <class Body> QKV_DEVICE void dispatch_activation(Format format, Body body) {
  switch (format) {
  case Format::F32: body(TypeTag<float>{}); break;
  case Format::F16: body(TypeTag<f16>{}); break;
  default: body(TypeTag<bf16>{}); break;
  }
}

} // namespace quantkv
