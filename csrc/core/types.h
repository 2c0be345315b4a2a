// Number types as plain bits, and small fixed vectors of 32-bit words.
//
// No vendor type is used, so that one source compiles with nvcc, a freestanding amdgcn clang and any host
// compiler. Arithmetic is done in f32; conversions are in prim.h (hardware) and fp8.h (portable).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace quantkv {

// IEEE 754 half precision, by its bits.
struct f16 {
  uint16_t bits;
};

// The upper half of an f32, by its bits.
struct bf16 {
  uint16_t bits;
};

// Words that one lane loads or stores at once.
template <int N> struct alignas(N == 4 ? 16 : N == 2 ? 8 : 4) Words {
  uint32_t w[N];
};

// The value of `quantkv_format` (quantkv.h) for a storage type, and what kernels ask of it.
enum class Format : int32_t { F32 = 0, F16 = 1, BF16 = 2, E4M3 = 3, E5M2 = 4, E4M3Fnuz = 5 };

constexpr int kFormats = 6;

// Whether static and dynamic scales apply.
QKV_HOST_DEVICE constexpr bool is_quantized(Format format) { return format >= Format::E4M3; }

QKV_HOST_DEVICE constexpr int bytes_of(Format format) {
  return format == Format::F32 ? 4 : format == Format::F16 || format == Format::BF16 ? 2 : 1;
}

template <class T> struct FormatOf;
template <> struct FormatOf<float> {
  static constexpr Format value = Format::F32;
};
template <> struct FormatOf<f16> {
  static constexpr Format value = Format::F16;
};
template <> struct FormatOf<bf16> {
  static constexpr Format value = Format::BF16;
};

} // namespace quantkv
