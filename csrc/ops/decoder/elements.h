// Eight elements at a time, in f32: how the decoder's kernels read and write activations and weights.
//
// A row whose width is a multiple of 8 and whose first byte is aligned to 16 is read in whole words of 16 bytes; any
// other row one element at a time. Which of the two depends on shapes and addresses alone, never on the number of rows.
#pragma once
#include "../../core/fp8.h"

namespace quantkv {
namespace decoder {

constexpr int kPack = 8;

QKV_DEVICE uint32_t narrow_pair(f16, float low, float high) { return pack_f16(low, high); }
QKV_DEVICE uint32_t narrow_pair(bf16, float low, float high) { return pack_bf16(low, high); }

template <class T> QKV_DEVICE void widen_words(const Words<4> &words, float (&x)[kPack]) {
  QKV_UNROLL for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_f32(T{static_cast<uint16_t>(words.w[i] & 0xffffu)});
    x[2 * i + 1] = to_f32(T{static_cast<uint16_t>(words.w[i] >> 16)});
  }
}

// x = p[0..8], p aligned to 16 bytes.
template <class T> QKV_DEVICE void load_pack(const T *p, float (&x)[kPack]) {
  widen_words<T>(*reinterpret_cast<const Words<4> *>(p), x);
}
template <> QKV_DEVICE void load_pack<float>(const float *p, float (&x)[kPack]) {
  QKV_UNROLL for (int half = 0; half < 2; ++half) {
    Words<4> words = reinterpret_cast<const Words<4> *>(p)[half];
    QKV_UNROLL for (int i = 0; i < 4; ++i) x[4 * half + i] = float_of(words.w[i]);
  }
}

// The same for weights, which go by once.
template <class T> QKV_DEVICE void load_weights(const T *p, float (&x)[kPack]) {
  widen_words<T>(load_stream(reinterpret_cast<const Words<4> *>(p)), x);
}
template <> QKV_DEVICE void load_weights<float>(const float *p, float (&x)[kPack]) {
  QKV_UNROLL for (int half = 0; half < 2; ++half) {
    Words<4> words = load_stream(reinterpret_cast<const Words<4> *>(p) + half);
    QKV_UNROLL for (int i = 0; i < 4; ++i) x[4 * half + i] = float_of(words.w[i]);
  }
}

// p[0..8] = x, p aligned to 16 bytes.
template <class T> QKV_DEVICE void store_pack(T *p, const float (&x)[kPack]) {
  Words<4> words;
  QKV_UNROLL for (int i = 0; i < 4; ++i) words.w[i] = narrow_pair(T{}, x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<Words<4> *>(p) = words;
}
template <> QKV_DEVICE void store_pack<float>(float *p, const float (&x)[kPack]) {
  QKV_UNROLL for (int half = 0; half < 2; ++half) {
    Words<4> words;
    QKV_UNROLL for (int i = 0; i < 4; ++i) words.w[i] = bits_of(x[4 * half + i]);
    reinterpret_cast<Words<4> *>(p)[half] = words;
  }
}

// The sum over the lanes of a warp, in every lane; one fixed order.
QKV_DEVICE float warp_sum(float x) {
  QKV_UNROLL for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

} // namespace decoder
} // namespace quantkv
