// paged_attention by the matrix cores of AMD's GPUs: 16-bit activations over a cache of 8-bit codes, or of the same
// 16-bit type, without dynamic scales. What it does not take is the portable kernel's.
//
// A block of 256 threads holds up to 16 query rows and goes through their keys 64 tokens at a time:
//   S = Q K^T    [16 rows, 64 tokens]      a wave has 16 tokens; where there are 8 waves, and half of the channels
//   softmax      lane = token and token + 32; warp w has rows w and w + 8
//   O += P V     [16 rows, kDim channels]  a wave has every kWaves-th 16 channels, sums in registers
// K and then V pass through one tile of shared memory, decoded to f16 (exactly) or bf16; codes are read once. Rows of
// shared memory are 16 bytes longer than their elements, so that neighbours begin on different banks.
//
// Range. f16 products: a query row is scaled by a power of two, so that its largest element is near 2^13; the inverse
// goes to the scores, as does K's scale of the head. K's scales per channel are multiplied into the query before. Weights
// are scaled to 2^15: gfx90a's products take subnormal f16 for zero, and many small weights are much together.
//
// Tokens that are not to be read (outside the piece, no block) are holes: zeros in the tiles, weight 0.
#pragma once
#include "../core/amdgcn/prim_matrix.h"
#include "../ops/paged_attention_portable.h"

namespace quantkv {

constexpr int kMatrixThreads = 256, kMatrixWarps = kMatrixThreads / kWarp, kMatrixWaves = kMatrixThreads / kWave;
constexpr int kMatrixRows = 16, kMatrixTokens = 64;
constexpr int kTokenTiles = kMatrixTokens / 16;
constexpr int kScoreParts = kMatrixWaves > kTokenTiles ? kMatrixWaves / kTokenTiles : 1; // of the channels

// What weights are multiplied by for the products, and sums by afterwards.
template <class T> constexpr float kWeightUnit = FormatOf<T>::value == Format::F16 ? 32768.0f : 1.0f;
template <class T> constexpr float kSumUnit = 1.0f / kWeightUnit<T>;

template <int kDim> struct MatrixShared {
  static constexpr int kStride = kDim + 8, kScoreStride = kMatrixTokens + 4, kWeightStride = kMatrixTokens + 8;
  alignas(16) uint16_t query[kMatrixRows * kStride];
  alignas(16) uint16_t tile[kMatrixTokens * kStride];
  alignas(16) uint16_t weights[kMatrixRows * kWeightStride];
  float scores[kScoreParts][kMatrixRows * kScoreStride]; // to be added up
  int64_t k_rows[kMatrixTokens], v_rows[kMatrixTokens];  // first elements of the tokens' rows; -1: a hole
  float factor[kMatrixRows];                             // a product times this is q . k
  float max[kMatrixRows], sum[kMatrixRows], rescale[kMatrixRows];
  SoftmaxEnd ends[kMatrixRows];
};

// Where the tokens first .. first + 63 lie; two warps.
template <int kDim>
QKV_DEVICE void find_matrix_tokens(const AttentionParams &params, const Piece &piece, int32_t first, MatrixShared<kDim> &shared) {
  const int token = thread_index();
  const int32_t position = first + token;
  int32_t block = -1;
  if (position >= piece.begin && position < piece.end) {
    block = block_of(params, piece.seq, position >> params.paging.block_shift);
  }
  const int slot = position & (params.paging.block_size() - 1);
  shared.k_rows[token] = block < 0 ? -1 : row_index(params.op.cache.k.map, block, piece.kv_head, slot);
  shared.v_rows[token] = block < 0 ? -1 : row_index(params.op.cache.v.map, block, piece.kv_head, slot);
}

// Rows of K or V to the tile; zeros for holes and past the head dim.
template <class T, int kDim>
QKV_DEVICE void load_matrix_tile(const quantkv_half &half, const int64_t *rows, MatrixShared<kDim> &shared) {
  constexpr int quads_of_row = kDim / 4;
  dispatch_format(format_of(half), [&](auto tag) {
    constexpr Format F = decltype(tag)::value;
    if constexpr (is_quantized(F) || F == FormatOf<T>::value) {
      const auto load = [&](int i, auto take) {
        const int quad = i * kMatrixThreads + thread_index(), token = quad / quads_of_row, channel = quad % quads_of_row * 4;
        const int64_t row = rows[token];
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row >= 0 && channel < half.head_dim) take(row, channel, x);
        const bool is_f16 = FormatOf<T>::value == Format::F16;
        const Words<2> words = {{is_f16 ? pack_f16(x[0], x[1]) : pack_bf16(x[0], x[1]),
                                 is_f16 ? pack_f16(x[2], x[3]) : pack_bf16(x[2], x[3])}};
        *reinterpret_cast<Words<2> *>(&shared.tile[token * MatrixShared<kDim>::kStride + channel]) = words;
      };
      constexpr int count = kMatrixTokens * quads_of_row / kMatrixThreads;
      if (has_quads(half)) {
        QKV_UNROLL
        for (int i = 0; i < count; i++) {
          load(i, [&](int64_t row, int channel, float (&x)[4]) {
            load_quad<F>(half.codes, row + channel_index(half, channel), x);
          });
        }
      } else {
        // Strided or odd caches are rare: unrolled, this would be most of the kernel.
        QKV_NO_UNROLL
        for (int i = 0; i < count; i++) {
          load(i, [&](int64_t row, int channel, float (&x)[4]) {
            QKV_UNROLL
            for (int j = 0; j < 4; j++) {
              if (channel + j < half.head_dim) x[j] = load_element<F>(half.codes, row + channel_index(half, channel + j));
            }
          });
        }
      }
    }
  });
}

// Queries of the piece, scaled; zeros past its rows and channels. A warp has rows w and w + 8.
template <class T, int kDim>
QKV_DEVICE void load_matrix_queries(const AttentionParams &params, const Piece &piece, MatrixShared<kDim> &shared) {
  const quantkv_half &k = params.op.cache.k;
  const bool by_channel = is_quantized(format_of(k)) && k.scale.channel_stride != 0;
  for (int row = warp_index(); row < kMatrixRows; row += kMatrixWarps) {
    const bool valid = row < piece.rows();
    const int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
    const int64_t from = valid ? row_index(params.op.query, token, head) : 0;
    float x[kDim / kWarp], largest = 0.0f;
    QKV_UNROLL
    for (int i = 0; i < kDim / kWarp; i++) {
      const int channel = i * kWarp + lane_index();
      x[i] = 0.0f;
      if (valid && channel < k.head_dim) {
        x[i] = load_activation(params.op.query.data, params.op.activation, from + channel);
        if (by_channel) x[i] *= static_scale(k, piece.kv_head, channel);
      }
      largest = maximum(largest, x[i] < 0.0f ? -x[i] : x[i]);
    }
    float power = 1.0f, inverse = 1.0f;
    if (FormatOf<T>::value == Format::F16) {
      QKV_UNROLL
      for (int mask = kWarp / 2; mask > 0; mask /= 2) largest = maximum(largest, shuffle_xor(largest, mask));
      // 2^exponent <= largest; 2^(13 - exponent) and its inverse are normal for every exponent left.
      int exponent = static_cast<int>(bits_of(largest) >> 23) - 127;
      exponent = exponent < -100 ? -100 : exponent;
      power = float_of(static_cast<uint32_t>(127 + 13 - exponent) << 23);
      inverse = float_of(static_cast<uint32_t>(127 - 13 + exponent) << 23);
    }
    QKV_UNROLL
    for (int i = 0; i < kDim / kWarp; i++) {
      const uint16_t bits = FormatOf<T>::value == Format::F16 ? to_f16(x[i] * power).bits : to_bf16(x[i]).bits;
      shared.query[row * MatrixShared<kDim>::kStride + i * kWarp + lane_index()] = bits;
    }
    if (lane_index() == 0) shared.factor[row] = inverse * (by_channel ? 1.0f : static_scale(k, piece.kv_head, 0));
  }
}

// A lane's terms, where they lie side by side.
QKV_DEVICE void load_terms(const uint16_t *from, uint32_t (&out)[matrix::kWords]) {
  QKV_UNROLL
  for (int i = 0; i < matrix::kWords; i += 2) {
    const Words<2> words = *reinterpret_cast<const Words<2> *>(from + 2 * i);
    out[i] = words.w[0];
    out[i + 1] = words.w[1];
  }
}

template <class T, int kDim> QKV_DEVICE void multiply_matrix_keys(MatrixShared<kDim> &shared) {
  using Shared = MatrixShared<kDim>;
  constexpr int steps = kDim / 16 / kScoreParts;
  const int column = matrix::lane() % 16;
  for (int job = matrix::wave_index(); job < kTokenTiles * kScoreParts; job += kMatrixWaves) {
    const int tile = job % kTokenTiles, part = job / kTokenTiles;
    float sums[matrix::kSums] = {};
    QKV_UNROLL
    for (int step = 0; step < steps; step++) {
      const int channel = (part * steps + step) * 16 + matrix::first_term();
      uint32_t a[matrix::kWords], b[matrix::kWords];
      load_terms(&shared.query[column * Shared::kStride + channel], a); // its row of A has the same number
      load_terms(&shared.tile[(16 * tile + column) * Shared::kStride + channel], b);
      matrix::multiply<T>(sums, a, b);
    }
    QKV_UNROLL
    for (int i = 0; i < matrix::kSums; i++) {
      shared.scores[part][matrix::row_of(i) * Shared::kScoreStride + 16 * tile + column] = sums[i];
    }
  }
}

// Weights of one row's 64 tokens, and its state after them; one warp.
template <class T, int kDim>
QKV_DEVICE void weigh_matrix_tokens(const AttentionParams &params, const Piece &piece, int row, int32_t first, MatrixShared<kDim> &shared) {
  using Shared = MatrixShared<kDim>;
  const int lane = lane_index();
  float weight[2] = {0.0f, 0.0f}, rescale = 1.0f;
  if (row < piece.rows()) {
    const int32_t position = piece.first_position + row / piece.num_heads;
    const Visible visible = visible_to(params, position);
    const float slope = alibi_slope(params, piece.first_head + row % piece.num_heads), max = shared.max[row];
    float score[2], top = max;
    bool seen[2];
    QKV_UNROLL
    for (int half = 0; half < 2; half++) {
      const int token = lane + half * kWarp;
      float product = 0.0f;
      QKV_UNROLL
      for (int part = 0; part < kScoreParts; part++) product += shared.scores[part][row * Shared::kScoreStride + token];
      seen[half] = shared.k_rows[token] >= 0 && visible(first + token);
      score[half] = negative_infinity();
      if (seen[half]) {
        score[half] = score_of(params, product * shared.factor[row]);
        if (slope != 0.0f) score[half] += slope * static_cast<float>(first + token - position);
      }
      top = maximum(top, score[half]);
    }
    QKV_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) top = maximum(top, shuffle_xor(top, mask));
    rescale = softmax_rescale(max, top);
    QKV_UNROLL
    for (int half = 0; half < 2; half++) weight[half] = seen[half] ? exp2_approx(score[half] - softmax_reference(top)) : 0.0f;
    float total = weight[0] + weight[1];
    QKV_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    sync_warp(); // every lane has read the old maximum
    if (lane == 0) {
      shared.sum[row] = shared.sum[row] * rescale + total;
      shared.max[row] = top;
    }
  }
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    const float scaled = weight[half] * kWeightUnit<T>;
    const uint16_t bits = FormatOf<T>::value == Format::F16 ? to_f16(scaled).bits : to_bf16(scaled).bits;
    shared.weights[row * Shared::kWeightStride + lane + half * kWarp] = bits;
  }
  if (lane == 0) shared.rescale[row] = rescale;
}

// The 16-channel tiles of a wave, and their sums.
template <int kDim> constexpr int kChannelTiles = (kDim / 16 + kMatrixWaves - 1) / kMatrixWaves;

template <class T, int kDim>
QKV_DEVICE void multiply_matrix_values(const MatrixShared<kDim> &shared, float (&acc)[kChannelTiles<kDim>][matrix::kSums]) {
  using Shared = MatrixShared<kDim>;
  const int column = matrix::lane() % 16, wave = matrix::wave_index();
  QKV_UNROLL
  for (int n = 0; n < kChannelTiles<kDim>; n++) {
    const int tile = wave + n * kMatrixWaves;
    if (tile >= kDim / 16) break;
    QKV_UNROLL
    for (int i = 0; i < matrix::kSums; i++) acc[n][i] *= shared.rescale[matrix::row_of(i)];
    QKV_UNROLL
    for (int step = 0; step < kTokenTiles; step++) {
      const int token = 16 * step + matrix::first_term();
      uint32_t a[matrix::kWords], b[matrix::kWords];
      load_terms(&shared.weights[column * Shared::kWeightStride + token], a);
      const uint16_t *values = &shared.tile[token * Shared::kStride + 16 * tile + column];
      QKV_UNROLL
      for (int i = 0; i < matrix::kWords; i++) {
        b[i] = values[2 * i * Shared::kStride] | static_cast<uint32_t>(values[(2 * i + 1) * Shared::kStride]) << 16;
      }
      matrix::multiply<T>(acc[n], a, b);
    }
  }
}

template <class T, int kDim>
QKV_DEVICE void attend_matrix(const AttentionParams &params, const WorkList &list, const Piece &piece, MatrixShared<kDim> &shared) {
  const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
  float acc[kChannelTiles<kDim>][matrix::kSums] = {};
  if (thread_index() < kMatrixRows) {
    shared.max[thread_index()] = negative_infinity();
    shared.sum[thread_index()] = 0.0f;
  }
  load_matrix_queries<T>(params, piece, shared);

  for (int32_t first = piece.begin / kMatrixTokens * kMatrixTokens; first < piece.end; first += kMatrixTokens) {
    if (warp_index() < kMatrixTokens / kWarp) find_matrix_tokens(params, piece, first, shared);
    sync_threads();
    load_matrix_tile<T>(k, shared.k_rows, shared);
    sync_threads();
    multiply_matrix_keys<T>(shared);
    sync_threads();
    load_matrix_tile<T>(v, shared.v_rows, shared);
    QKV_NO_UNROLL
    for (int row = warp_index(); row < kMatrixRows; row += kMatrixWarps) {
      weigh_matrix_tokens<T>(params, piece, row, first, shared);
    }
    sync_threads();
    multiply_matrix_values<T>(shared, acc);
  }

  sync_threads();
  const int rows = piece.rows();
  if (int row = thread_index(); row < rows) {
    if (piece.slot >= 0) {
      store_partial_state(list, piece.slot, row, shared.max[row], shared.sum[row]);
    } else {
      const int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
      shared.ends[row] = end_of_row(params, head, shared.max[row], shared.sum[row]);
      store_lse(params, token, head, shared.ends[row].lse);
    }
  }
  sync_threads();
  QKV_UNROLL
  for (int n = 0; n < kChannelTiles<kDim>; n++) {
    const int channel = (matrix::wave_index() + n * kMatrixWaves) * 16 + matrix::lane() % 16;
    QKV_UNROLL
    for (int i = 0; i < matrix::kSums; i++) {
      const int row = matrix::row_of(i);
      if (row >= rows || channel >= v.head_dim) continue;
      const float sum = acc[n][i] * kSumUnit<T>;
      if (piece.slot >= 0) {
        partial_values(list, piece.slot, row)[channel] = sum;
      } else {
        const int token = piece.first_token + row / piece.num_heads, head = piece.first_head + row % piece.num_heads;
        store_activation(params.op.output.data, params.op.activation, row_index(params.op.output, token, head) + channel,
                         softmax_result(sum, shared.ends[row]) * static_scale(v, piece.kv_head, channel));
      }
    }
  }
  sync_threads(); // the next piece begins with what was read here
}

// Grid: one block a worker of the list. T: bf16 for a cache of bf16, f16 for f16 and codes. Head dims are at most kDim.
template <class T, int kDim>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kMatrixThreads, 1) attend_matrix_kernel(AttentionParams params, WorkList list) {
  QKV_SHARED(MatrixShared<kDim>, shared, 1);
  wait_for_previous_kernel();
  WorkIterator work(params, list, block_index_x());
  for (Piece piece; work.next(piece);) attend_matrix<T>(params, list, piece, *shared);
}

} // namespace quantkv
