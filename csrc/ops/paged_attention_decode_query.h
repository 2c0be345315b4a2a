// The decode kernel's queries: from global memory to shared memory, and there to operands of the product with K. The idea
// is in paged_attention_decode.h; the order of channels is that of a lane's share of a K row.
#pragma once
#include "paged_attention.h"

namespace quantkv {

// The queries of a piece and of the next one, in shared memory: every warp uses the same, and registers are for K and V.
// Threads share rows in runs of 8 channels, kLanes a row; a run is copied and read again by the same thread.
template <class Shape> struct DecodeQuery {
  static constexpr int kRuns = Shape::kDim / 8;
  static constexpr int kLanes = kRuns <= 8 ? 8 : kRuns <= 16 ? 16 : 32;
  static constexpr int kItems = Shape::kRows * kLanes; // whole warps of them
  static_assert(kRuns <= kLanes && kItems % kWarp == 0, "lanes that share a row are neighbours in a warp");

  // Whether the piece has none of the rows that the warp of `row` takes at a time.
  static QKV_DEVICE bool has_none(const Piece &piece, int row) { return row / (kWarp / kLanes) * (kWarp / kLanes) >= piece.rows(); }

  alignas(16) uint16_t raw[Shape::kRows][Shape::kDim]; // as they come
  Words<2> q[Shape::kRowTiles][Shape::kSteps][kWarp];  // operands of lane 4g + t: row g of the tile, four channels
  alignas(8) float factor[Shape::kRows];                          // a product times this is a score, but for the cap
  int32_t position[Shape::kRows];                      // of the row's query
  float slope[Shape::kRows];                           // ALiBi's of the row's head

  QKV_DEVICE void set_row(int row, float its_factor, int32_t its_position, float its_slope) {
    factor[row] = its_factor;
    position[row] = its_position;
    slope[row] = its_slope;
  }
};

// Asks for the queries of a piece. Rows it does not have are zeros.
template <class Shape>
QKV_DEVICE void begin_query(DecodeQuery<Shape> &out, const AttentionParams &params, const Piece &piece) {
  using Query = DecodeQuery<Shape>;
  const uint16_t *data = static_cast<const uint16_t *>(params.op.query.data);
  QKV_NO_UNROLL
  for (int i = reread_thread_index(); i < Query::kItems; i += Shape::kThreads) {
    const int row = i / Query::kLanes, run = i % Query::kLanes;
    if (run >= Query::kRuns || Query::has_none(piece, row)) continue;
    const int query = piece.query_of(row);
    const bool valid = row < piece.rows();
    const int head = piece.first_head + row - query * piece.num_heads;
    const uint16_t *from = data + (valid ? row_index(params.op.query, piece.first_token + query, head) + 8 * run : 0);
    uint16_t *to = &out.raw[row][8 * run];
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0 || !valid) {
      copy_async_16(to, from, valid);
    } else {
      QKV_NO_UNROLL
      for (int j = 0; j < 8; j++) to[j] = from[j];
    }
  }
  copy_async_commit();
}

// The four channels of a step that a lane multiplies lie side by side in memory: the step and the lane's t of those
// from `channel` on.
template <class Shape> QKV_DEVICE void find_key_channel(int channel, int &step, int &t) {
  constexpr int width = Shape::kWidthK, element = Shape::kElement;
  const int byte = channel * element;
  t = byte / width % 4;
  step = (byte / (4 * width) * width + byte % width) / (4 * element); // of the lane's share of a row
}

// A run of a row to where lanes find their operands.
template <class Shape> QKV_DEVICE void store_query(DecodeQuery<Shape> &out, int row, int run, const uint32_t (&words)[4]) {
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    int step, t;
    find_key_channel<Shape>(8 * run + 4 * half, step, t);
    out.q[row / 8][step][row % 8 * 4 + t] = {{words[2 * half], words[2 * half + 1]}};
  }
}

// Queries to operands. Rows are scaled by a power of two, so that the largest element is near 2^13: a bf16 query then
// fits an f16 exactly, but for elements below 2^-37 of the largest. A per-channel scale of K is multiplied in first;
// `k_scale` is the one of the head otherwise.
template <class Shape>
QKV_DEVICE void make_query(DecodeQuery<Shape> &out, const AttentionParams &params, const Piece &piece, float k_scale) {
  using Query = DecodeQuery<Shape>;
  const quantkv_half &k = params.op.cache.k;
  const bool by_channel = is_quantized(format_of(k)) && k.scale.channel_stride != 0;
  QKV_NO_UNROLL
  for (int i = reread_thread_index(); i < Query::kItems; i += Shape::kThreads) {
    const int row = i / Query::kLanes, run = i % Query::kLanes;
    const bool inside = run < Query::kRuns;
    if (Query::has_none(piece, row)) {
      if (inside) store_query(out, row, run, {0, 0, 0, 0});
      if (run == 0) out.set_row(row, 0.0f, 0, 0.0f);
      continue;
    }
    const Words<4> words = *reinterpret_cast<const Words<4> *>(&out.raw[row][inside ? 8 * run : 0]);
    float x[8];
    QKV_UNROLL
    for (int j = 0; j < 4; j++) {
      if (params.op.activation == QUANTKV_F16) unpack_f16(words.w[j], x[2 * j], x[2 * j + 1]);
      else unpack_bf16(words.w[j], x[2 * j], x[2 * j + 1]);
    }
    if (by_channel && inside) {
      QKV_UNROLL
      for (int j = 0; j < 8; j++) x[j] *= static_scale(k, piece.kv_head, 8 * run + j);
    }
    float power = 1.0f, inverse = 1.0f;
    if constexpr (!Shape::kBf16) {
      float largest = 0.0f;
      QKV_UNROLL
      for (int j = 0; j < 8; j++) largest = maximum(largest, x[j] < 0.0f ? -x[j] : x[j]);
      QKV_UNROLL
      for (int mask = 1; mask < Query::kLanes; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
      // 2^exponent <= largest; 2^(13 - exponent) and its inverse are normal for every exponent left.
      int exponent = static_cast<int>(bits_of(largest) >> 23) - 127;
      exponent = exponent < -100 ? -100 : exponent;
      power = float_of(static_cast<uint32_t>(127 + 13 - exponent) << 23);
      inverse = float_of(static_cast<uint32_t>(127 - 13 + exponent) << 23);
    }
    if (!inside) continue;
    uint32_t words_of_row[4];
    QKV_UNROLL
    for (int j = 0; j < 4; j++) {
      const float low = x[2 * j] * power, high = x[2 * j + 1] * power;
      words_of_row[j] = Shape::kBf16 ? pack_bf16(low, high) : pack_f16(low, high);
    }
    store_query(out, row, run, words_of_row);
    if (run == 0) {
      const int query = piece.query_of(row);
      const float slope = row < piece.rows() ? alibi_slope(params, piece.first_head + row - query * piece.num_heads) : 0.0f;
      out.set_row(row, inverse * (by_channel ? 1.0f : k_scale) * params.score_factor, piece.first_position + query, slope);
    }
  }
}

} // namespace quantkv
