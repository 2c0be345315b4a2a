// The query rows of the attention kernels that take many: from memory, their softmax, and back.
//
// A warp has 16 rows of the piece, 16 * warp_index() and on. Scores, weights and outputs are fragments of
// 16 x 8 products (prim.h): with lane = 4g + t, s[n] has rows g and g + 8, keys 8n + 2t and 8n + 2t + 1.
#pragma once
#include "paged_attention.h"

namespace quantkv {

#if QKV_HAS_TENSOR_CORES

// ---- queries

// Eight elements as f32.
QKV_DEVICE void unpack_chunk(const Words<4> &words, int32_t activation, float (&x)[8]) {
  QKV_UNROLL
  for (int i = 0; i < 4; i++) {
    if (activation == QUANTKV_F16) {
      unpack_f16(words.w[i], x[2 * i], x[2 * i + 1]);
    } else {
      unpack_bf16(words.w[i], x[2 * i], x[2 * i + 1]);
    }
  }
}

// A lane's part of kTurns of the rows of queries that its warp has, kRows of them: every fourth row, and of the eight lanes that
// share it every eighth chunk of 8 channels.
template <int kDim, int kRows, int kTurns> struct PrefillQueries {
  static constexpr int kChunks = kDim / 64;
  int first_turn;
  Words<4> words[kTurns][kChunks];

  // Of a thread, read again, so that nothing is kept from piece to piece.
  QKV_DEVICE int row_of(int thread, int turn) const { return thread / kWarp * kRows + thread % kWarp / 8 + 4 * (first_turn + turn); }
  static QKV_DEVICE int chunk_of(int thread, int i) { return thread % 8 + 8 * i; }

  // All on their way at once. Zeros where there is nothing.
  QKV_DEVICE void load(const AttentionParams &params, const Piece &piece) {
    const int thread = reread_thread_index();
    const quantkv_half &k = params.op.cache.k;
    QKV_UNROLL
    for (int turn = 0; turn < kTurns; turn++) {
      const int row = row_of(thread, turn), query = piece.query_of(row);
      const bool exists = row < piece.rows();
      const uint16_t *from = static_cast<const uint16_t *>(params.op.query.data);
      if (exists) from += row_index(params.op.query, piece.first_token + query, piece.first_head + row - query * piece.num_heads);
      QKV_UNROLL
      for (int i = 0; i < kChunks; i++) {
        const int channel = 8 * chunk_of(thread, i);
        words[turn][i] = Words<4>{};
        if (exists && channel < k.head_dim) words[turn][i] = *reinterpret_cast<const Words<4> *>(from + channel);
      }
    }
  }

  // For products in T, as load_prefill_queries has it.
  template <class T, class Store>
  QKV_DEVICE void put(const AttentionParams &params, const Piece &piece, Store store, float *factors) {
    const quantkv_half &k = params.op.cache.k;
    const int thread = reread_thread_index();
    if (FormatOf<T>::value == Format::F16 && is_quantized(format_of(k)) && k.scale.channel_stride != 0) {
      float scales[kChunks][8];
      QKV_UNROLL
      for (int i = 0; i < kChunks; i++) {
        QKV_UNROLL
        for (int j = 0; j < 8; j++) {
          const int channel = 8 * chunk_of(thread, i) + j;
          scales[i][j] = channel < k.head_dim ? static_scale(k.scale, piece.kv_head, channel) : 0.0f;
        }
      }
      put_rows(thread, store, factors, [&](Words<4>(&row)[kChunks]) {
        return to_f16(row, params.op.activation, [&](float x, int i, int j) { return x * scales[i][j]; });
      });
    } else if (FormatOf<T>::value == Format::F16 && params.op.activation != QUANTKV_F16) {
      put_rows(thread, store, factors,
               [](Words<4>(&row)[kChunks]) { return to_f16(row, QUANTKV_BF16, [](float x, int, int) { return x; }); });
    } else {
      put_rows(thread, store, factors, [](Words<4>(&)[kChunks]) { return 1.0f; });
    }
  }

private:
  template <class Store, class Convert> QKV_DEVICE void put_rows(int thread, Store store, float *factors, Convert convert) {
    QKV_UNROLL
    for (int turn = 0; turn < kTurns; turn++) {
      const int row = row_of(thread, turn);
      const float factor = convert(words[turn]);
      QKV_UNROLL
      for (int i = 0; i < kChunks; i++) store(row, chunk_of(thread, i), words[turn][i]);
      if (thread % 8 == 0) factors[row] = factor;
    }
  }

  // A row times its scales to f16, by a power of two that is answered: the largest |x| comes to 2^14 .. 2^15. An infinity is as
  // large as any, for it decides the scores alone.
  template <class Scale> static QKV_DEVICE float to_f16(Words<4> (&row)[kChunks], int32_t activation, Scale scale) {
    float x[kChunks][8], top = 0.0f;
    QKV_UNROLL
    for (int i = 0; i < kChunks; i++) {
      unpack_chunk(row[i], activation, x[i]);
      QKV_UNROLL
      for (int j = 0; j < 8; j++) {
        x[i][j] = scale(x[i][j], i, j);
        top = maximum(top, magnitude(x[i][j]));
      }
    }
    QKV_UNROLL
    for (int mask = 1; mask < 8; mask *= 2) top = maximum(top, shuffle_xor(top, mask));
    uint32_t exponent = bits_of(top) >> 23;
    if (exponent < 15) exponent = 15;
    const float to_range = float_of((127 + 14 + 127 - exponent) << 23);
    QKV_UNROLL
    for (int i = 0; i < kChunks; i++) {
      QKV_UNROLL
      for (int j = 0; j < 4; j++) row[i].w[j] = pack_f16(x[i][2 * j] * to_range, x[i][2 * j + 1] * to_range);
    }
    return float_of((exponent - 14) << 23);
  }
};

// Queries of the piece for products in T, the kRows rows of this warp: chunk c of row r by store(r, c, words), what brings the
// row back to its size to factors[r]. Rows it has not are zeros. Answers the KV head's scale of K: 1 where channels have their own,
// which queries are multiplied by, or there is none. Written for few instructions: a piece runs them once, and cold.
template <class T, int kDim, int kRows = 16, class Store>
QKV_DEVICE float load_prefill_queries(const AttentionParams &params, const Piece &piece, Store store, float *factors) {
  constexpr int kTurns = kRows / 4, kAtOnce = kDim == 256 && kTurns > 2 ? 2 : kTurns; // for registers
  const quantkv_half &k = params.op.cache.k;
  const bool is_uniform = is_quantized(format_of(k)) && k.scale.channel_stride == 0;
  const float k_scale = is_uniform ? static_scale(k.scale, piece.kv_head, 0) : 1.0f;
  QKV_UNROLL
  for (int first_turn = 0; first_turn < kTurns; first_turn += kAtOnce) {
    PrefillQueries<kDim, kRows, kAtOnce> queries;
    queries.first_turn = first_turn;
    queries.load(params, piece);
    queries.template put<T>(params, piece, store, factors);
  }
  return k_scale;
}

// ---- softmax

// The two rows a lane has: g and g + 8 of its warp's 16, where lane = 4g + t. In every eight keys it has 2t, 2t + 1.
struct PrefillRows {
  Visible visible[2];
  float factor[2]; // of products, to scores in base 2
  float slope[2];
  float max[2];
  float sum[2];    // of this lane's keys
  float unit;      // accumulators are in this unit: a power of two not below any dynamic V scale met so far
};

// Of a thread: read again where that is rare, so that nothing of it is kept from piece to piece.
QKV_DEVICE int prefill_row(int thread, int half) { return thread / kWarp * 16 + thread % kWarp / 4 + 8 * half; }

// `k_scale`: the queries'.
QKV_DEVICE PrefillRows start_prefill_rows(const AttentionParams &params, const Piece &piece, float k_scale, const float *query_factors) {
  const int thread = reread_thread_index();
  PrefillRows rows;
  const float factor = params.score_factor * k_scale;
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    int row = prefill_row(thread, half);
    const int query = piece.query_of(row);
    const bool exists = row < piece.rows();
    rows.visible[half] = exists ? visible_to(params, piece.first_position + query) : Visible{0, -1};
    rows.factor[half] = factor * query_factors[row];
    rows.slope[half] = exists ? alibi_slope(params, piece.first_head + row - query * piece.num_heads) : 0.0f;
    rows.max[half] = negative_infinity();
    rows.sum[half] = 0.0f;
  }
  rows.unit = params.op.cache.v.dynamic == nullptr ? 1.0f : 0.0f;
  return rows;
}

// -inf where a key is not visible to a row.
template <int kKeys> QKV_DEVICE void mask_tile(const PrefillRows &rows, int32_t first, float (&s)[kKeys / 8][4]) {
  const uint32_t own = static_cast<uint32_t>(first + 2 * (lane_index() % 4));
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    const Visible &visible = rows.visible[half];
    const uint32_t before = own - static_cast<uint32_t>(visible.first);
    const uint32_t count = static_cast<uint32_t>(forget(visible.last) + 1 - visible.first); // few tiles are masked: not kept
    QKV_UNROLL
    for (int n = 0; n < kKeys / 8; n++) {
      QKV_UNROLL
      for (int j = 0; j < 2; j++) {
        if (before + 8 * n + j >= count) s[n][2 * half + j] = negative_infinity();
      }
    }
  }
}

// The same where a block is missing. `present`: a bit a key.
template <int kKeys> QKV_DEVICE void mask_holes(const uint32_t *present, float (&s)[kKeys / 8][4]) {
  const int column = 2 * (lane_index() % 4);
  QKV_UNROLL
  for (int n = 0; n < kKeys / 8; n++) {
    const uint32_t bits = present[n / 4] >> (n % 4 * 8 + column);
    QKV_UNROLL
    for (int i = 0; i < 4; i++) {
      if ((bits >> (i % 2) & 1) == 0) s[n][i] = negative_infinity();
    }
  }
}

// Products times the dynamic scales of K.
template <int kKeys> QKV_DEVICE void scale_products(const float *k_dynamic, float (&s)[kKeys / 8][4]) {
  const int column = 2 * (forget(lane_index()) % 4);
  QKV_UNROLL
  for (int n = 0; n < kKeys / 8; n++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) s[n][i] *= k_dynamic[8 * n + column + i % 2];
  }
}

// The unit of the accumulators once a tile with these dynamic scales is in; answers what they are multiplied by.
template <int kMaxima> QKV_DEVICE float grow_unit(PrefillRows &rows, const float (&maxima)[kMaxima]) {
  float top = maxima[0];
  QKV_UNROLL
  for (int i = 1; i < kMaxima; i++) top = maximum(top, maxima[i]);
  // The power of two above, within 2^-126 .. 2^126: its reciprocal is normal.
  uint32_t bits = (bits_of(top) + 0x7fffffu) & 0x7f800000u;
  bits = bits < 0x00800000u ? 0x00800000u : bits > 0x7e800000u ? 0x7e800000u : bits;
  float unit = maximum(rows.unit, float_of(bits)), rescale = divide(rows.unit, unit);
  rows.unit = unit;
  return rescale;
}

// Weights times the dynamic scales of V, in that unit.
template <int kKeys>
QKV_DEVICE void scale_weights(const PrefillRows &rows, const float *v_dynamic, float (&p)[kKeys / 8][4]) {
  const int column = 2 * (forget(lane_index()) % 4);
  float to_unit = divide(1.0f, rows.unit);
  QKV_UNROLL
  for (int n = 0; n < kKeys / 8; n++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) p[n][i] *= v_dynamic[8 * n + column + i % 2] * to_unit;
  }
}

// Products, times K's dynamic scales, to scores in base 2.
template <int kKeys>
QKV_DEVICE void score_products(const AttentionParams &params, const PrefillRows &rows, int32_t first, float (&s)[kKeys / 8][4]) {
  const int column = 2 * (lane_index() % 4);
  QKV_UNROLL
  for (int n = 0; n < kKeys / 8; n++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) s[n][i] *= rows.factor[i / 2];
  }
  if (params.cap != 0.0f) {
    QKV_UNROLL
    for (int n = 0; n < kKeys / 8; n++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) s[n][i] = params.cap * tanh_quick(s[n][i]);
    }
  }
  if (params.op.alibi_slopes != nullptr) {
    QKV_UNROLL
    for (int n = 0; n < kKeys / 8; n++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) {
        s[n][i] += rows.slope[i / 2] * static_cast<float>(first + 8 * n + column + i % 2 - rows.visible[i / 2].last);
      }
    }
  }
}

// ---- results

template <int kDim>
QKV_DEVICE void store_prefill_partial(const AttentionParams &params, const WorkList &list, const Piece &piece,
                                      const PrefillRows &rows, const float (&o)[kDim / 8][4]) {
  const int thread = reread_thread_index(), column = 2 * (thread % 4);
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    int row = prefill_row(thread, half);
    if (row >= piece.rows()) continue;
    if (column == 0) store_partial_state(list, piece.slot, row, rows.max[half], rows.sum[half]);
    float *values = partial_values(list, piece.slot, row) + column;
    QKV_UNROLL
    for (int c = 0; c < kDim / 8; c++) {
      if (c * 8 >= params.op.cache.v.head_dim) break;
      Words<2> pair = {{bits_of(o[c][2 * half] * rows.unit), bits_of(o[c][2 * half + 1] * rows.unit)}};
      *reinterpret_cast<Words<2> *>(values + 8 * c) = pair;
    }
  }
}

// A lane's outputs by scaled(value, half, chunk, i), of channel 8 chunk + 2t + i, as pairs of `pack` at place(row, chunk).
template <int kDim, class Place, class Scaled, class Pack>
QKV_DEVICE void lay_prefill_output(const float (&o)[kDim / 8][4], Place place, Scaled scaled, Pack pack) {
  const int thread = reread_thread_index();
  QKV_UNROLL
  for (int c = 0; c < kDim / 8; c++) {
    QKV_UNROLL
    for (int half = 0; half < 2; half++) {
      *reinterpret_cast<uint32_t *>(place(prefill_row(thread, half), c) + 4 * (thread % 4)) =
          pack(scaled(o[c][2 * half], half, c, 0), scaled(o[c][2 * half + 1], half, c, 1));
    }
  }
}

// Rows from place(row, chunk) to memory, as queries are loaded: eight lanes a row.
template <int kDim, class Place> QKV_DEVICE void store_laid_output(const AttentionParams &params, const Piece &piece, Place place) {
  const int thread = reread_thread_index();
  QKV_UNROLL
  for (int turn = 0; turn < 4; turn++) {
    const int row = thread / kWarp * 16 + thread % kWarp / 8 + 4 * turn, query = piece.query_of(row);
    if (row >= piece.rows()) continue;
    const int head = piece.first_head + row - query * piece.num_heads;
    uint16_t *to = static_cast<uint16_t *>(params.op.output.data) + row_index(params.op.output, piece.first_token + query, head);
    QKV_UNROLL
    for (int i = 0; i < kDim / 64; i++) {
      const int chunk = thread % 8 + 8 * i;
      if (8 * chunk < params.op.cache.v.head_dim) {
        *reinterpret_cast<Words<4> *>(to + 8 * chunk) = *reinterpret_cast<const Words<4> *>(place(row, chunk));
      }
    }
  }
}

// Each warp lays its rows where their queries were, at place(row, chunk), and stores them from there in whole chunks. `rows.sum`: of
// all keys.
template <int kDim, class Place>
QKV_DEVICE void store_prefill_output(const AttentionParams &params, const Piece &piece, const PrefillRows &rows,
                                     const float (&o)[kDim / 8][4], Place place) {
  const quantkv_half &v = params.op.cache.v;
  const int thread = reread_thread_index();
  const bool is_uniform = !is_quantized(format_of(v)) || v.scale.channel_stride == 0;
  const float one_scale = rows.unit * (is_uniform ? static_scale(v, piece.kv_head, 0) : 1.0f);
  SoftmaxEnd ends[2];
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    const int row = prefill_row(thread, half), query = piece.query_of(row), head = piece.first_head + row - query * piece.num_heads;
    ends[half] = {1.0f, 0.0f};
    if (row >= piece.rows()) continue;
    ends[half] = end_of_row(params, head, rows.max[half], rows.sum[half]);
    if (thread % 4 == 0) store_lse(params, piece.first_token + query, head, ends[half].lse);
  }
  sync_warp();
  const auto lay = [&](auto scaled) {
    if (params.op.activation == QUANTKV_F16) {
      lay_prefill_output<kDim>(o, place, scaled, [](float low, float high) { return pack_f16(low, high); });
    } else {
      lay_prefill_output<kDim>(o, place, scaled, [](float low, float high) { return pack_bf16(low, high); });
    }
  };
  // One product of an output, if that is as exact as two.
  const float factors[2] = {ends[0].factor * one_scale, ends[1].factor * one_scale};
  if (is_uniform && !any(!(magnitude(factors[0]) > kSmallestNormal && magnitude(factors[1]) > kSmallestNormal))) {
    lay([&](float x, int half, int, int) { return x * factors[half]; });
  } else {
    lay([&](float x, int half, int c, int i) {
      const int channel = 8 * c + 2 * (thread % 4) + i;
      const bool has_own = !is_uniform && channel < v.head_dim;
      return softmax_result(x, ends[half]) * (has_own ? one_scale * static_scale(v, piece.kv_head, channel) : one_scale);
    });
  }
  sync_warp();
  store_laid_output<kDim>(params, piece, place);
}

#endif // QKV_HAS_TENSOR_CORES

} // namespace quantkv
