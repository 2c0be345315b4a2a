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

// Queries of the piece for products in T, the kRows rows of this warp: chunk c of row r by store(r, c, words), what brings the
// row back to its size to factors[r]. Rows it has not are zeros. Eight lanes a row, each every eighth chunk.
template <class T, int kDim, int kRows = 16, class Store>
QKV_DEVICE void load_prefill_queries(const AttentionParams &params, const Piece &piece, Store store, float *factors) {
  constexpr int kChunks = kDim / 64; // of a lane
  const quantkv_half &k = params.op.cache.k;
  const int thread = reread_thread_index(), lane = thread % kWarp; // not kept from piece to piece
  const int first_row = thread / kWarp * kRows + lane / 8;
  const bool is_scaled = is_quantized(format_of(k)) && k.scale.channel_stride != 0;
  const bool is_converted = FormatOf<T>::value == Format::F16 && (is_scaled || params.op.activation != QUANTKV_F16);
  Words<4> all[kRows / 4][kChunks]; // of the lane's rows: all on their way at once
  QKV_UNROLL
  for (int i = 0; i < kRows / 4; i++) {
    const int row = first_row + 4 * i;
    const bool exists = row < piece.rows();
    const int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
    const uint16_t *from = static_cast<const uint16_t *>(params.op.query.data);
    if (exists) from += row_index(params.op.query, token, head);
    QKV_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk++) {
      const int channel = 8 * (lane % 8 + 8 * chunk);
      all[i][chunk] = Words<4>{};
      if (exists && channel < k.head_dim) all[i][chunk] = *reinterpret_cast<const Words<4> *>(from + channel);
    }
  }
  QKV_UNROLL
  for (int turn = 0; turn < kRows / 4; turn++) {
    const int row = first_row + 4 * turn;
    Words<4>(&words)[kChunks] = all[turn];
    float factor = 1.0f;
    if (is_converted) {
      float x[kChunks][8], top = 0.0f;
      QKV_UNROLL
      for (int i = 0; i < kChunks; i++) {
        int channel = 8 * (lane % 8 + 8 * i);
        unpack_chunk(words[i], params.op.activation, x[i]);
        QKV_UNROLL
        for (int j = 0; j < 8; j++) {
          if (is_scaled && channel < k.head_dim) x[i][j] *= static_scale(k.scale, piece.kv_head, channel + j);
          uint32_t magnitude = bits_of(x[i][j]) & 0x7fffffffu;
          if (magnitude < 0x7f800000u) top = maximum(top, float_of(magnitude));
        }
      }
      QKV_UNROLL
      for (int mask = 1; mask < 8; mask *= 2) top = maximum(top, shuffle_xor(top, mask));
      // By exponents: the largest value to 2^14 .. 2^15.
      uint32_t exponent = bits_of(top) >> 23;
      if (exponent < 15) exponent = 15;
      float to_range = float_of((127 + 14 + 127 - exponent) << 23);
      factor = float_of((exponent - 14) << 23);
      QKV_UNROLL
      for (int i = 0; i < kChunks; i++) {
        QKV_UNROLL
        for (int j = 0; j < 4; j++) words[i].w[j] = pack_f16(x[i][2 * j] * to_range, x[i][2 * j + 1] * to_range);
      }
    }
    QKV_UNROLL
    for (int i = 0; i < kChunks; i++) store(row, lane % 8 + 8 * i, words[i]);
    if (lane % 8 == 0) factors[row] = factor;
  }
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

QKV_DEVICE PrefillRows start_prefill_rows(const AttentionParams &params, const Piece &piece,
                                          const float *query_factors) {
  const quantkv_half &k = params.op.cache.k;
  const int thread = reread_thread_index();
  PrefillRows rows;
  float factor = params.score_factor;
  if (is_quantized(format_of(k)) && k.scale.channel_stride == 0) factor *= static_scale(k.scale, piece.kv_head, 0);
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    int row = prefill_row(thread, half);
    bool exists = row < piece.rows();
    rows.visible[half] = exists ? visible_to(params, piece.first_position + row / piece.num_heads) : Visible{0, -1};
    rows.factor[half] = factor * query_factors[row];
    rows.slope[half] = exists ? alibi_slope(params, piece.first_head + row % piece.num_heads) : 0.0f;
    rows.max[half] = negative_infinity();
    rows.sum[half] = 0.0f;
  }
  rows.unit = params.op.cache.v.dynamic == nullptr ? 1.0f : 0.0f;
  return rows;
}

// -inf where a key is not visible to a row, or a hole. `present`: a bit a key.
template <int kKeys>
QKV_DEVICE void mask_tile(const PrefillRows &rows, int32_t first, const uint32_t *present, float (&s)[kKeys / 8][4]) {
  const int column = 2 * (lane_index() % 4);
  QKV_UNROLL
  for (int n = 0; n < kKeys / 8; n++) {
    uint32_t bits = present[n / 4] >> (n % 4 * 8 + column);
    QKV_UNROLL
    for (int i = 0; i < 4; i++) {
      bool is_visible = rows.visible[i / 2](first + 8 * n + column + i % 2) && (bits >> (i % 2) & 1) != 0;
      if (!is_visible) s[n][i] = negative_infinity();
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

// Products to scores in base 2; -inf where a key is not visible.
template <int kKeys>
QKV_DEVICE void score_tile(const AttentionParams &params, const PrefillRows &rows, int32_t first,
                           const float *k_dynamic, const uint32_t *present, bool is_masked, float (&s)[kKeys / 8][4]) {
  const int column = 2 * (lane_index() % 4);
  if (params.op.cache.k.dynamic != nullptr) scale_products<kKeys>(k_dynamic, s);
  QKV_UNROLL
  for (int n = 0; n < kKeys / 8; n++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) s[n][i] *= rows.factor[i / 2];
  }
  if (params.cap != 0.0f) {
    QKV_UNROLL
    for (int n = 0; n < kKeys / 8; n++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) s[n][i] = params.cap * tanh_of(s[n][i]);
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
  if (is_masked) mask_tile<kKeys>(rows, first, present, s);
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

// Each warp lays its rows where their queries were, at place(row, chunk), and stores them from there in whole chunks.
template <int kDim, class Place>
QKV_DEVICE void store_prefill_output(const AttentionParams &params, const Piece &piece, const PrefillRows &rows,
                                     const float (&o)[kDim / 8][4], Place place) {
  const quantkv_half &v = params.op.cache.v;
  const int thread = reread_thread_index(), lane = thread % kWarp, column = 2 * (lane % 4);
  const bool is_uniform = !is_quantized(format_of(v)) || v.scale.channel_stride == 0;
  const float one_scale = is_uniform ? static_scale(v, piece.kv_head, 0) : 0.0f;
  sync_warp();
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    int row = prefill_row(thread, half);
    if (row >= piece.rows()) continue;
    int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
    SoftmaxEnd end = end_of_row(params, head, rows.max[half], rows.sum[half]);
    if (column == 0) store_lse(params, token, head, end.lse);
    QKV_UNROLL
    for (int c = 0; c < kDim / 8; c++) {
      if (c * 8 >= v.head_dim) break;
      float x[2];
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        float scale = rows.unit * (is_uniform ? one_scale : static_scale(v, piece.kv_head, 8 * c + column + i));
        x[i] = softmax_result(o[c][2 * half + i], end) * scale;
      }
      uint32_t pair = params.op.activation == QUANTKV_F16 ? pack_f16(x[0], x[1]) : pack_bf16(x[0], x[1]);
      *reinterpret_cast<uint32_t *>(place(row, c) + 2 * column) = pair;
    }
  }
  sync_warp();
  for (int i = lane; i < 16 * (kDim / 8); i += kWarp) {
    int row = thread / kWarp * 16 + i / (kDim / 8), chunk = i % (kDim / 8);
    if (row >= piece.rows() || chunk * 8 >= v.head_dim) continue;
    int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
    uint16_t *to = static_cast<uint16_t *>(params.op.output.data) + row_index(params.op.output, token, head);
    *reinterpret_cast<Words<4> *>(to + chunk * 8) =
        *reinterpret_cast<const Words<4> *>(place(row, chunk));
  }
}

#endif // QKV_HAS_TENSOR_CORES

} // namespace quantkv
