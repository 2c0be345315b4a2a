// paged_attention in f32 arithmetic: every storage format, layout, head dim and activation type, on every device.
//
// A block of 8 warps holds up to 16 query rows and goes through their keys 32 tokens at a time, K and V 128 channels
// at a time, decoded to f32 in shared memory:
//   scores    lane = token; each warp takes every eighth quad of channels, for all rows; the warps' sums are added
//             through shared memory
//   softmax   lane = token; warp w has rows w and w + 8
//   values    thread = channel of 128 and half of the tokens, for all rows; the halves are added at the end
// Every value read from shared memory meets all rows. The static scale of K is folded into the queries, the dynamic
// scales into scores and weights, the static scale of V into the outputs.
//
// Tokens that are not to be read (outside the piece, no block) are holes: zeros in the tiles, weight 0.
#pragma once
#include "paged_attention.h"

namespace quantkv {

constexpr int kPortableWarps = 8;
constexpr int kPortableThreads = kPortableWarps * kWarp;
constexpr int kPortableRows = 16;
constexpr int kPortableTokens = kWarp;
constexpr int kPortableChannels = 128;                 // at a time
constexpr int kPortableStride = kPortableChannels + 4; // of a token in shared memory: quads of 8 lanes meet all banks

// Dynamic shared memory: this, then the queries [kPortableRows, query_stride].
struct PortableShared {
  // K or V [tokens, channels]; sums of scores [warps, rows, tokens]; accumulators [rows, channels].
  float tile[kPortableTokens * kPortableStride];
  float weights[kPortableRows * kPortableTokens];
  int64_t k_rows[kPortableTokens], v_rows[kPortableTokens]; // first elements of the tokens' rows; -1: a hole
  float k_dynamic[kPortableTokens], v_dynamic[kPortableTokens];
  float max[kPortableRows], sum[kPortableRows]; // states of the rows
  float rescale[kPortableRows];                 // of the accumulators for the tokens at hand
  SoftmaxEnd ends[kPortableRows];
};

QKV_HOST_DEVICE int portable_query_stride(int k_head_dim) { return (k_head_dim + 3) / 4 * 4; }
QKV_HOST_DEVICE size_t portable_shared_bytes(int k_head_dim) {
  return sizeof(PortableShared) + sizeof(float) * kPortableRows * portable_query_stride(k_head_dim);
}

// Whether four channels from a multiple of four on are one aligned word.
QKV_DEVICE bool has_quads(const quantkv_half &half) {
  const quantkv_address_map &map = half.map;
  int64_t strides = map.block_stride | map.head_stride | map.slot_stride | half.head_dim;
  if (!row_is_contiguous(half)) strides |= map.chunk | map.chunk_stride;
  return strides % 4 == 0 && reinterpret_cast<uintptr_t>(half.codes) % (4 * bytes_of(half)) == 0;
}

template <Format F> QKV_DEVICE void load_quad(const void *codes, int64_t index, float (&x)[4]) {
  if constexpr (is_quantized(F)) {
    const uint8_t *from = static_cast<const uint8_t *>(codes) + index;
    decode4<F>(load_stream(reinterpret_cast<const Words<1> *>(from)).w[0], x);
  } else if constexpr (F == Format::F32) {
    Words<4> words = load_stream(reinterpret_cast<const Words<4> *>(static_cast<const float *>(codes) + index));
    QKV_UNROLL
    for (int i = 0; i < 4; i++) x[i] = float_of(words.w[i]);
  } else {
    Words<2> words = load_stream(reinterpret_cast<const Words<2> *>(static_cast<const uint16_t *>(codes) + index));
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      if constexpr (F == Format::F16) {
        unpack_f16(words.w[i], x[2 * i], x[2 * i + 1]);
      } else {
        unpack_bf16(words.w[i], x[2 * i], x[2 * i + 1]);
      }
    }
  }
}

// Channels base .. base + kPortableChannels of all tokens to `tile`, as f32 without scales; zeros past the head dim.
QKV_DEVICE void load_portable_tile(const quantkv_half &half, const int64_t *rows, int base, float *tile) {
  int channel = base + 4 * lane_index();
  bool quads = has_quads(half);
  int64_t offset = channel < half.head_dim ? channel_index(half, channel) : 0;
  dispatch_format(format_of(half), [&](auto tag) {
    constexpr Format F = decltype(tag)::value;
    QKV_UNROLL
    for (int i = 0; i < kPortableTokens / kPortableWarps; i++) {
      int token = warp_index() + i * kPortableWarps;
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      int64_t row = rows[token];
      if (row >= 0 && channel < half.head_dim) {
        if (quads) {
          load_quad<F>(half.codes, row + offset, x);
        } else {
          QKV_UNROLL
          for (int j = 0; j < 4; j++) {
            if (channel + j < half.head_dim) x[j] = load_element<F>(half.codes, row + channel_index(half, channel + j));
          }
        }
      }
      Words<4> words = {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
      *reinterpret_cast<Words<4> *>(tile + token * kPortableStride + 4 * lane_index()) = words;
    }
  });
}

QKV_DEVICE void load_floats(const float *from, float (&x)[4]) {
  Words<4> words = *reinterpret_cast<const Words<4> *>(from);
  QKV_UNROLL
  for (int i = 0; i < 4; i++) x[i] = float_of(words.w[i]);
}

// Queries of the piece to shared memory, the static scale of K folded in; zeros past its rows and channels.
QKV_DEVICE void load_portable_queries(const AttentionParams &params, const Piece &piece, float *query) {
  const quantkv_half &k = params.op.cache.k;
  int stride = portable_query_stride(k.head_dim);
  for (int row = warp_index(); row < kPortableRows; row += kPortableWarps) {
    int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
    int64_t from = row < piece.rows() ? row_index(params.op.query, token, head) : 0;
    for (int channel = lane_index(); channel < stride; channel += kWarp) {
      float x = 0.0f;
      if (row < piece.rows() && channel < k.head_dim) {
        x = load_activation(params.op.query.data, params.op.activation, from + channel) *
            static_scale(k, piece.kv_head, channel);
      }
      query[row * stride + channel] = x;
    }
  }
}

// Where the tokens `first` .. lie; one warp.
QKV_DEVICE void find_portable_tokens(const AttentionParams &params, const Piece &piece, int32_t first,
                                     PortableShared &shared) {
  int lane = lane_index();
  int32_t position = first + lane;
  int64_t k_row = -1, v_row = -1;
  float k_dynamic = 1.0f, v_dynamic = 1.0f;
  int32_t block = -1;
  if (position >= piece.begin && position < piece.end) {
    block = block_of(params, piece.seq, position >> params.paging.block_shift);
  }
  if (block >= 0) {
    const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
    int slot = position & (params.paging.block_size() - 1);
    k_row = row_index(k.map, block, piece.kv_head, slot);
    v_row = row_index(v.map, block, piece.kv_head, slot);
    int64_t scale = dynamic_scale_index(params.paging, block, piece.kv_head, slot);
    if (k.dynamic != nullptr) k_dynamic = k.dynamic[scale];
    if (v.dynamic != nullptr) v_dynamic = v.dynamic[scale];
  }
  shared.k_rows[lane] = k_row;
  shared.v_rows[lane] = v_row;
  shared.k_dynamic[lane] = k_dynamic;
  shared.v_dynamic[lane] = v_dynamic;
}

// q·k of all rows and the 32 tokens, as this warp's part of the sum: lane = token.
QKV_DEVICE void add_scores(const float *query, int stride, int base, int k_head_dim, int rows, const float *tile,
                           float (&sums)[kPortableRows]) {
  QKV_NO_UNROLL
  for (int quad = warp_index(); quad < kPortableChannels / 4 && base + 4 * quad < k_head_dim; quad += kPortableWarps) {
    float k[4];
    load_floats(tile + lane_index() * kPortableStride + 4 * quad, k);
    QKV_UNROLL
    for (int row = 0; row < kPortableRows; row++) {
      if (row % 4 == 0 && row >= rows) break;
      float q[4];
      load_floats(query + row * stride + base + 4 * quad, q);
      QKV_UNROLL
      for (int j = 0; j < 4; j++) sums[row] += q[j] * k[j];
    }
  }
}

// Weights of one row's 32 tokens, and its state after them: lane = token.
QKV_DEVICE void weigh_tokens(const AttentionParams &params, const Piece &piece, int row, int32_t first, float qk,
                             PortableShared &shared) {
  int lane = lane_index();
  float max = shared.max[row], weight = 0.0f, rescale = 1.0f;
  if (row < piece.rows()) {
    int32_t position = piece.first_position + row / piece.num_heads;
    int32_t head = piece.first_head + row % piece.num_heads;
    float score = negative_infinity();
    bool is_visible = shared.k_rows[lane] >= 0 && visible_to(params, position)(first + lane);
    if (is_visible) {
      score = score_of(params, qk * shared.k_dynamic[lane]);
      if (params.op.alibi_slopes != nullptr) {
        score += alibi_slope(params, head) * static_cast<float>(first + lane - position);
      }
    }
    float top = maximum(max, score);
    QKV_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) top = maximum(top, shuffle_xor(top, mask));
    rescale = softmax_rescale(max, top);
    weight = is_visible ? exp2_approx(score - softmax_reference(top)) : 0.0f;
    float total = weight;
    QKV_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    sync_warp(); // every lane has read the old maximum
    if (lane == 0) {
      shared.sum[row] = shared.sum[row] * rescale + total;
      shared.max[row] = top;
    }
    if (is_visible) weight *= shared.v_dynamic[lane];
  }
  shared.weights[row * kPortableTokens + lane] = weight;
  if (lane == 0) shared.rescale[row] = rescale;
}

// Adds 16 tokens' weighted values of one channel to all rows.
QKV_DEVICE void add_values(const PortableShared &shared, int rows, float (&acc)[kPortableRows]) {
  int channel = thread_index() % kPortableChannels;
  int begin = thread_index() / kPortableChannels * (kPortableTokens / 2);
  QKV_UNROLL
  for (int row = 0; row < kPortableRows; row++) {
    if (row % 4 == 0 && row >= rows) break;
    acc[row] *= shared.rescale[row];
  }
  QKV_NO_UNROLL
  for (int token = begin; token < begin + kPortableTokens / 2; token += 4) {
    float v[4];
    QKV_UNROLL
    for (int j = 0; j < 4; j++) v[j] = shared.tile[(token + j) * kPortableStride + channel];
    QKV_UNROLL
    for (int row = 0; row < kPortableRows; row++) {
      if (row % 4 == 0 && row >= rows) break;
      float weights[4];
      load_floats(shared.weights + row * kPortableTokens + token, weights);
      QKV_UNROLL
      for (int j = 0; j < 4; j++) acc[row] += weights[j] * v[j];
    }
  }
}

// The sums of both halves of the tokens to tile [rows, kPortableChannels], and from there to where they belong.
QKV_DEVICE void store_portable_chunk(const AttentionParams &params, const WorkList &list, const Piece &piece, int base,
                                     const float (&acc)[kPortableRows], PortableShared &shared) {
  const quantkv_half &v = params.op.cache.v;
  int channel = thread_index() % kPortableChannels;
  for (int half = 1; half >= 0; half--) {
    if (thread_index() / kPortableChannels == half) {
      QKV_UNROLL
      for (int row = 0; row < kPortableRows; row++) {
        float *sum = shared.tile + row * kPortableChannels + channel;
        *sum = half == 1 ? acc[row] : *sum + acc[row];
      }
    }
    sync_threads();
  }
  for (int i = thread_index(); i < piece.rows() * kPortableChannels; i += kPortableThreads) {
    int row = i / kPortableChannels, column = i % kPortableChannels;
    if (base + column >= v.head_dim) continue;
    if (piece.slot >= 0) {
      partial_values(list, piece.slot, row)[base + column] = shared.tile[i];
    } else {
      int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
      store_activation(params.op.output.data, params.op.activation,
                       row_index(params.op.output, token, head) + base + column,
                       softmax_result(shared.tile[i], shared.ends[row]) * static_scale(v, piece.kv_head, base + column));
    }
  }
  sync_threads();
}

// kChunks: how many times kPortableChannels channels of V there are at most.
template <int kChunks>
QKV_DEVICE void attend_portable(const AttentionParams &params, const WorkList &list, const Piece &piece,
                                PortableShared &shared, float *query) {
  const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
  const int rows = piece.rows(), stride = portable_query_stride(k.head_dim);
  float acc[kChunks][kPortableRows];
  QKV_UNROLL
  for (int chunk = 0; chunk < kChunks; chunk++) {
    QKV_UNROLL
    for (int row = 0; row < kPortableRows; row++) acc[chunk][row] = 0.0f;
  }
  if (thread_index() < kPortableRows) {
    shared.max[thread_index()] = negative_infinity();
    shared.sum[thread_index()] = 0.0f;
  }
  load_portable_queries(params, piece, query);

  for (int32_t first = piece.begin / kPortableTokens * kPortableTokens; first < piece.end; first += kPortableTokens) {
    if (warp_index() == 0) find_portable_tokens(params, piece, first, shared);
    sync_threads();
    float sums[kPortableRows];
    QKV_UNROLL
    for (int row = 0; row < kPortableRows; row++) sums[row] = 0.0f;
    for (int base = 0; base < k.head_dim; base += kPortableChannels) {
      load_portable_tile(k, shared.k_rows, base, shared.tile);
      sync_threads();
      add_scores(query, stride, base, k.head_dim, rows, shared.tile, sums);
      sync_threads();
    }
    QKV_UNROLL
    for (int row = 0; row < kPortableRows; row++) {
      shared.tile[(warp_index() * kPortableRows + row) * kPortableTokens + lane_index()] = sums[row];
    }
    sync_threads();
    QKV_NO_UNROLL
    for (int row = warp_index(); row < kPortableRows; row += kPortableWarps) {
      float qk = 0.0f;
      QKV_UNROLL
      for (int warp = 0; warp < kPortableWarps; warp++) {
        qk += shared.tile[(warp * kPortableRows + row) * kPortableTokens + lane_index()];
      }
      weigh_tokens(params, piece, row, first, qk, shared);
    }
    sync_threads();
    QKV_NO_UNROLL
    for (int base = 0; base < v.head_dim; base += kPortableChannels) {
      load_portable_tile(v, shared.v_rows, base, shared.tile);
      sync_threads();
      QKV_UNROLL
      for (int chunk = 0; chunk < kChunks; chunk++) {
        if (base == chunk * kPortableChannels) add_values(shared, rows, acc[chunk]);
      }
      sync_threads();
    }
  }

  sync_threads();
  if (int row = thread_index(); row < rows) {
    if (piece.slot >= 0) {
      store_partial_state(list, piece.slot, row, shared.max[row], shared.sum[row]);
    } else {
      int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
      shared.ends[row] = end_of_row(params, head, shared.max[row], shared.sum[row]);
      store_lse(params, token, head, shared.ends[row].lse);
    }
  }
  QKV_UNROLL
  for (int chunk = 0; chunk < kChunks; chunk++) {
    if (chunk * kPortableChannels < v.head_dim) {
      store_portable_chunk(params, list, piece, chunk * kPortableChannels, acc[chunk], shared);
    }
  }
}

template <int kChunks>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kPortableThreads, kChunks <= 2 ? 2 : 1)
    attend_portable_kernel(AttentionParams params, WorkList list) {
  QKV_DYNAMIC_SHARED(memory);
  PortableShared &shared = *reinterpret_cast<PortableShared *>(memory);
  float *query = reinterpret_cast<float *>(memory + sizeof(PortableShared));
  wait_for_previous_kernel();
  WorkIterator work(params, list, block_index_x());
  for (Piece piece; work.next(piece);) attend_portable<kChunks>(params, list, piece, shared, query);
}

} // namespace quantkv
