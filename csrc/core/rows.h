// Rows of channels, eight at a time, and how threads share them: what the memory-bound operations have in common.
//
//   Vector<F>    8 consecutive elements of format F: 8 bytes (FP8), 16 (f16, bf16) or 32 (f32), loaded and stored
//                in pieces of 8 or 16 bytes, so aligned to vector_alignment(F)
//   RowScale     the scales of one row of a quantized half
//   RowShare     rows [tokens, rows] over blocks of kRowThreads: a power of two of lanes a row, several vectors a
//                lane and several tokens a thread; nothing is divided in a loop
//
//   thread of a block      group = thread / lanes, lane = thread % lanes; group = row * side + token
//   a block                `block_rows` rows of `side` tokens at a time; grid.y blocks share the rows of a token
#pragma once
#include "address.h"
#include "launch.h"

namespace quantkv {

constexpr int kVector = 8;

template <Format F> struct Vector {
  static constexpr int kWords = kVector * bytes_of(F) / 4;
  uint32_t w[kWords];
};

QKV_HOST_DEVICE constexpr int vector_alignment(Format format) { return is_quantized(format) ? 8 : 16; }

// ---- one half of a call's two. Its fields are chosen one by one: to take a kernel parameter's address would copy it.

QKV_DEVICE quantkv_half choose_half(const quantkv_cache &cache, bool is_key) {
  const quantkv_half &k = cache.k, &v = cache.v;
  quantkv_half half;
  half.codes = is_key ? k.codes : v.codes;
  half.dynamic = is_key ? k.dynamic : v.dynamic;
  half.scale.values = is_key ? k.scale.values : v.scale.values;
  half.scale.head_stride = is_key ? k.scale.head_stride : v.scale.head_stride;
  half.scale.channel_stride = is_key ? k.scale.channel_stride : v.scale.channel_stride;
  half.map.block_stride = is_key ? k.map.block_stride : v.map.block_stride;
  half.map.head_stride = is_key ? k.map.head_stride : v.map.head_stride;
  half.map.slot_stride = is_key ? k.map.slot_stride : v.map.slot_stride;
  half.map.chunk = is_key ? k.map.chunk : v.map.chunk;
  half.map.chunk_stride = is_key ? k.map.chunk_stride : v.map.chunk_stride;
  half.format = is_key ? k.format : v.format;
  half.head_dim = is_key ? k.head_dim : v.head_dim;
  return half;
}
QKV_DEVICE quantkv_rows choose_rows(const quantkv_rows &key, const quantkv_rows &value, bool is_key) {
  quantkv_rows rows;
  rows.data = is_key ? key.data : value.data;
  rows.token_stride = is_key ? key.token_stride : value.token_stride;
  rows.head_stride = is_key ? key.head_stride : value.head_stride;
  return rows;
}

// ---- loads and stores; `p` is aligned to vector_alignment(F)

template <Format F> QKV_DEVICE Vector<F> load_vector(const void *p) {
  constexpr int n = is_quantized(F) ? 2 : 4;
  Vector<F> v;
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords / n; i++) {
    Words<n> words = static_cast<const Words<n> *>(p)[i];
    QKV_UNROLL
    for (int j = 0; j < n; j++) v.w[i * n + j] = words.w[j];
  }
  return v;
}

// Of memory that the kernel does not write and that goes by once.
template <Format F> QKV_DEVICE Vector<F> stream_vector(const void *p) {
  constexpr int n = is_quantized(F) ? 2 : 4;
  Vector<F> v;
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords / n; i++) {
    Words<n> words = load_stream(static_cast<const Words<n> *>(p) + i);
    QKV_UNROLL
    for (int j = 0; j < n; j++) v.w[i * n + j] = words.w[j];
  }
  return v;
}

template <Format F> QKV_DEVICE void store_vector(void *p, const Vector<F> &v) {
  constexpr int n = is_quantized(F) ? 2 : 4;
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords / n; i++) {
    Words<n> words;
    QKV_UNROLL
    for (int j = 0; j < n; j++) words.w[j] = v.w[i * n + j];
    static_cast<Words<n> *>(p)[i] = words;
  }
}

template <Format F> QKV_DEVICE Vector<F> zero_vector() {
  Vector<F> v;
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords; i++) v.w[i] = 0;
  return v;
}

// ---- values

// The elements as f32, exact; a NaN stays one.
template <Format F> QKV_DEVICE void unpack_vector(const Vector<F> &v, float (&x)[kVector]) {
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords; i++) {
    if constexpr (F == Format::F32) x[i] = float_of(v.w[i]);
    if constexpr (F == Format::F16) unpack_f16(v.w[i], x[2 * i], x[2 * i + 1]);
    if constexpr (F == Format::BF16) unpack_bf16(v.w[i], x[2 * i], x[2 * i + 1]);
    if constexpr (is_quantized(F)) {
      float four[4];
      decode4<F>(v.w[i], four);
      QKV_UNROLL
      for (int j = 0; j < 4; j++) x[4 * i + j] = four[j];
    }
  }
}

// f32 to the nearest elements; codes saturate, a NaN stays one.
template <Format F> QKV_DEVICE Vector<F> pack_vector(const float (&x)[kVector]) {
  Vector<F> v;
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords; i++) {
    if constexpr (F == Format::F32) v.w[i] = bits_of(x[i]);
    if constexpr (F == Format::F16) v.w[i] = pack_f16(x[2 * i], x[2 * i + 1]);
    if constexpr (F == Format::BF16) v.w[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    if constexpr (is_quantized(F)) {
      float four[4];
      QKV_UNROLL
      for (int j = 0; j < 4; j++) four[j] = x[4 * i + j];
      v.w[i] = encode4<F>(four);
    }
  }
  return v;
}

// Between unquantized formats, the bits of NaN included; the same format is a copy.
template <Format To, Format From> QKV_DEVICE Vector<To> convert_vector(const Vector<From> &v) {
  if constexpr (To == From) {
    return v;
  } else {
    Vector<To> out = zero_vector<To>();
    QKV_UNROLL
    for (int i = 0; i < kVector; i++) {
      float x;
      if constexpr (From == Format::F32) {
        x = float_of(v.w[i]);
      } else {
        x = widen(Stored<From>{static_cast<uint16_t>(v.w[i / 2] >> 16 * (i % 2))});
      }
      if constexpr (To == Format::F32) {
        out.w[i] = bits_of(x);
      } else {
        out.w[i / 2] |= static_cast<uint32_t>(narrow<Stored<To>>(x).bits) << 16 * (i % 2);
      }
    }
    return out;
  }
}

// ---- scales of a row

struct RowScale {
  float one;              // of the whole row, if there is no `each`
  const float *each;      // static scales of the channels, or null
  int64_t channel_stride;
  float dynamic;          // times `each`; 0: none

  QKV_DEVICE float at(int channel) const {
    if (each == nullptr) return one;
    float fixed = each[channel * channel_stride];
    return dynamic == 0.0f ? fixed : combined_scale(fixed, dynamic);
  }
};

// The static scales of a head.
QKV_DEVICE RowScale static_row_scale(const quantkv_scale &scale, int head) {
  const float *first = scale.values + head * scale.head_stride;
  if (scale.channel_stride == 0) return RowScale{*first, nullptr, 0, 0.0f};
  return RowScale{1.0f, first, scale.channel_stride, 0.0f};
}

QKV_DEVICE RowScale with_dynamic(const RowScale &fixed, float dynamic) {
  if (fixed.each == nullptr) return RowScale{combined_scale(fixed.one, dynamic), nullptr, 0, 0.0f};
  return RowScale{1.0f, fixed.each, fixed.channel_stride, dynamic};
}

// ---- quantize, dequantize

// x / s rounded to f32 as divide() does it, given r = RN(1/s): three operations (16-bit A) or five instead of ten,
// three branches and a special function.
//
// The product q = RN(x r) is within 2 ulp of x/s; a correction by its remainder makes it one of the two neighbours of
// x/s, and a second one, by Markstein's theorem, RN(x/s). Where x has the 8 or 11 bits of a bf16 or f16 the first is
// enough: so it is for every such significand and every significand of s (testing/conformance looks at all of them).
// Over- and underflow: for s in 2^-63 .. 2^63 the remainders are exact where |x/s| >= 2^-18; what is smaller stays
// smaller and keeps its sign, and is zero in every 8-bit format. What overflows, and an infinite x, ends in a NaN
// (inf - inf), which the code shows. The remainder is negated so that zeros keep their sign.
template <Format A> QKV_DEVICE float quotient(float x, float scale, float reciprocal) {
  constexpr int corrections = A == Format::F32 ? 2 : 1;
  float q = multiply(x, reciprocal);
  QKV_UNROLL
  for (int i = 0; i < corrections; i++) {
    float rest = fused_multiply_add(q, scale, -x);
    q = fused_multiply_add(-rest, reciprocal, q);
  }
  return q;
}

// 1/s as `quotient` wants it, or 0 where s is too far from 1.
QKV_DEVICE float easy_reciprocal(float scale) {
  return scale >= 1.08420217e-19f && scale <= 9.22337204e+18f ? divide(1.0f, scale) : 0.0f;
}

// Scales of 8 channels and their reciprocals (kEach), or one for all of them.
template <bool kEach> struct EasyScales {
  static constexpr int kCount = kEach ? kVector : 1;
  float scale[kCount];
  float reciprocal[kCount];

  QKV_DEVICE void set(int i, float s) {
    scale[i] = s;
    reciprocal[i] = easy_reciprocal(s);
  }
  QKV_DEVICE bool are_easy() const {
    bool easy = true;
    QKV_UNROLL
    for (int i = 0; i < kCount; i++) easy &= reciprocal[i] != 0.0f;
    return easy;
  }
};

// The codes of 8 quotients. False where a NaN (0x7f in both formats) came out: it is one of x, or what `quotient` cannot
// do, and the codes are to be made again by store_element.
template <Format F, Format A, bool kEach>
QKV_DEVICE bool quotient_codes(Vector<F> &codes, const Vector<A> &v, const EasyScales<kEach> &scales) {
  static_assert(F == Format::E4M3 || F == Format::E5M2, "formats with NaN 0x7f");
  float x[kVector];
  unpack_vector<A>(v, x);
  QKV_UNROLL
  for (int i = 0; i < kVector; i++) {
    x[i] = quotient<A>(x[i], scales.scale[kEach ? i : 0], scales.reciprocal[kEach ? i : 0]);
  }
  codes = pack_vector<F>(x);
  const uint32_t carries = ((codes.w[0] & 0x7f7f7f7fu) + 0x01010101u) | ((codes.w[1] & 0x7f7f7f7fu) + 0x01010101u);
  return (carries & 0x80808080u) == 0;
}

template <Format F, Format A, bool kEach>
QKV_DEVICE bool store_quotients(void *p, const Vector<A> &v, const EasyScales<kEach> &scales) {
  Vector<F> codes;
  const bool good = quotient_codes<F>(codes, v, scales);
  store_vector(p, codes);
  return good;
}

// What may be done with a vector of 8 activations of format A, in a few instructions each.
enum class Store { Copy, E4M3, E5M2, Elements };

template <Format A> QKV_HOST_DEVICE Store store_of(Format format, bool are_easy) {
  if (format == A) return Store::Copy;
  if (are_easy && format == Format::E4M3) return Store::E4M3;
  if (are_easy && format == Format::E5M2) return Store::E5M2;
  return Store::Elements;
}

// False where store_elements is to do it.
template <Format A, bool kEach>
QKV_DEVICE bool store_fast(Store store, void *p, const Vector<A> &v, const EasyScales<kEach> &scales) {
  switch (store) {
  case Store::Copy: store_vector(p, v); return true;
  case Store::E4M3: return store_quotients<Format::E4M3>(p, v, scales);
  case Store::E5M2: return store_quotients<Format::E5M2>(p, v, scales);
  default: return false;
  }
}

// Stores 8 activations, any format and any scale; `channel` is that of the first.
template <class T>
QKV_DEVICE void store_elements(Format format, void *p, const T *x, const RowScale &scale, int channel) {
  dispatch_format(format, [&](auto tag) {
    constexpr Format F = decltype(tag)::value;
    QKV_NO_UNROLL
    for (int i = 0; i < kVector; i++) store_element<F>(p, i, x[i], is_quantized(F) ? scale.at(channel + i) : 1.0f);
  });
}

// 8 activations from what is stored: decode(code) * scale. Unquantized formats do not look at the scale.
template <Format A, Format F>
QKV_DEVICE Vector<A> from_stored_vector(const Vector<F> &v, const float (&scale)[kVector]) {
  if constexpr (is_quantized(F)) {
    float x[kVector];
    unpack_vector<F>(v, x);
    QKV_UNROLL
    for (int i = 0; i < kVector; i++) x[i] = multiply(x[i], scale[i]);
    return pack_vector<A>(x);
  } else {
    return convert_vector<A>(v);
  }
}

// ---- sharing

constexpr int kRowThreads = 256;
// Enough blocks to keep any device busy and evenly so: threads do more than one token only beyond it.
constexpr int64_t kFillingBlocks = 1024;

struct RowShare {
  int32_t lane_shift; // log2 of the lanes of a row
  int32_t rows;       // rows of a token
  int32_t block_rows; // of which a block has so many
  int32_t side;       // tokens side by side in a block
  int32_t steps;      // tokens of a thread, `side` apart

  QKV_HOST_DEVICE int lanes() const { return 1 << lane_shift; }
  QKV_HOST_DEVICE int groups() const { return kRowThreads >> lane_shift; }
  QKV_HOST_DEVICE int tokens_per_block() const { return side * steps; }
};

// `width`: vectors of the longest row, of which a lane is to have `per_lane` (more, if that takes more than a warp). `most_rows`: of a block.
inline RowShare share_rows(int64_t tokens, int rows, int width, int per_lane, int max_steps, int most_rows = kRowThreads) {
  RowShare share = {0, rows, rows, 1, 1};
  while (share.lanes() * per_lane < width && share.lanes() < kWarp) share.lane_shift++;
  if (share.block_rows > most_rows) share.block_rows = most_rows;
  if (share.block_rows > share.groups()) share.block_rows = share.groups();
  share.side = share.groups() / share.block_rows;
  while (2 * share.steps <= max_steps &&
         ceil_div(tokens, 2 * share.tokens_per_block()) * ceil_div(rows, share.block_rows) >= kFillingBlocks) {
    share.steps *= 2;
  }
  return share;
}

// Blocks for `tokens`, which max_tokens() limits.
inline Grid grid_of(const RowShare &share, int64_t tokens) {
  return Grid{ceil_div(tokens, share.tokens_per_block()), ceil_div(share.rows, share.block_rows), 1};
}

// Tokens that one grid covers. More than any device has memory for; launchers cut longer calls all the same.
constexpr int64_t kMaxTokensPerGrid = kMaxGridX;

// This warp among those of the grid's first dimension, and how many those are.
QKV_DEVICE int64_t global_warp() {
  return static_cast<int64_t>(block_index_x()) * (kRowThreads / kWarp) + warp_index();
}
QKV_DEVICE int64_t global_warps() { return static_cast<int64_t>(grid_size_x()) * (kRowThreads / kWarp); }

// A thread's row and first token.
struct RowPlace {
  int lane;
  int row;             // of a token; share.rows or more: none
  int side_token;      // of those side by side
  int64_t first_token; // the others follow at distance share.side

  // Threads side by side have tokens of one row: in a cache of [heads, slots, channels] their rows follow each other.
  QKV_DEVICE explicit RowPlace(const RowShare &share) {
    const int group = thread_index() >> share.lane_shift, row_of_block = group / share.side;
    lane = thread_index() & (share.lanes() - 1);
    row = row_of_block < share.block_rows ? block_index_y() * share.block_rows + row_of_block : share.rows;
    side_token = group - row_of_block * share.side;
    first_token = static_cast<int64_t>(block_index_x()) * share.tokens_per_block() + side_token;
  }
};

} // namespace quantkv
