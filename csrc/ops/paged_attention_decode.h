// paged_attention for few query rows a KV head (decode, speculative decode), on tensor cores: sm_80 and up.
//
// The limit is reading K and V once, so nothing else may be in the way: codes go from global memory straight to
// registers, are widened there to f16 (exactly, two codes an instruction) and multiplied as they lie. Nothing passes
// through shared memory and no barrier is met until a piece of work ends.
//
//   S   = K Q^T      [16 tokens, 8 rows]        tokens on the long side of the 16 x 8 x 16 product
//   O^T += V^T P^T   [16 channels, 8 rows] x D/16
//
// Rows are the (query, query head) pairs of a piece, 8 * RowTiles at most. Lane 4g + t holds
//   K   of tokens g and g + 8: every 4th run of kWidthK bytes. A product over d may take the channels in any order:
//       what the hardware calls channels (2t, 2t+1, 2t+8, 2t+9) of a step are four that lie side by side in memory;
//       q is loaded in the same order.
//   V   of tokens 2t, 2t+1, 2t+8, 2t+9: every 8th run of kWidthV bytes. V^T wants pairs of tokens of one channel: bytes
//       of two tokens are interleaved by byte_permute before they are widened.
//   S   of tokens g and g + 8, rows 2t and 2t + 1; P becomes the second product's operand by transpose_8x8
//   O   of two channels a 16-row tile of O^T, rows 2t and 2t + 1
//
// The four warps of a block take tiles in turn, each with a softmax state of its own, and merge them in shared memory
// when the piece ends. The loads of a tile are issued before the products of the one before it.
#pragma once
#include "../core/fp8.h"
#include "paged_attention.h"

namespace quantkv {

// No scale is smaller: 2^-126.
constexpr float kSmallestScale = 1.17549435e-38f;

// Bytes of one load, where `lanes` lanes share `bytes`.
constexpr int load_width(int bytes, int lanes) {
  return bytes / lanes % 16 == 0 ? 16 : bytes / lanes % 8 == 0 ? 8 : 4;
}

// The numbers of one instantiation: format F of K and V, head dim D of both, tiles of 8 query rows, dynamic scales.
template <Format F, int D, int RowTiles, bool Dynamic> struct DecodeShape {
  static_assert(F != Format::F32, "f32 is not a tensor core type here");
  static_assert(D % 32 == 0, "a lane's share of a V row is whole words");
  static_assert(!Dynamic || is_quantized(F), "only quantized rows have scales");
  static constexpr int kElement = bytes_of(F);
  static constexpr int kTile = 16;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = RowTiles;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = 8 * RowTiles;
  static constexpr int kWidthK = load_width(D * kElement, 4);
  static constexpr int kWidthV = load_width(D * kElement, 8);
  static constexpr int kWordsK = D * kElement / 16; // of one K row, a lane
  static constexpr int kWordsV = D * kElement / 32; // of one V row, a lane
  static constexpr int kSteps = D / 16;             // of S; also 16-channel tiles of O^T
  static constexpr bool kBf16 = F == Format::BF16;  // bf16 products; else f16

  // What a lane keeps: O, K, V, and what softmax needs. Two tiles of V (the one in use, the one on its way) are better,
  // where 3 blocks an SM have the registers for them. Measured limits: nothing spills.
  static constexpr int kKept = RowTiles * (kSteps * 4 + 12) + 2 * kWordsK + 4 * kWordsV + (Dynamic ? 8 : 0);
  static constexpr int kWithAhead = kKept + 4 * kWordsV;
  static constexpr int kBlocks = kWithAhead <= 92 ? 4 : kWithAhead <= 120 || kKept <= 104 ? 3 : 2;
  static constexpr bool kValuesAhead = kWithAhead <= (kBlocks == 3 ? 120 : 200);
  static constexpr bool kFits = kKept <= 200;

  // Shared memory: O [warps, rows, kStride] f32, then (max, sum) [warps, rows]. The pad keeps rows on different banks.
  static constexpr int kStride = D + 4;
  static constexpr int kSharedBytes = 4 * kWarps * kRows * (kStride + 2);
};

// The tiles one warp attends to in a piece, and where they lie. Offsets inside a block fit 32 bits.
template <class Shape> struct DecodeTiles {
  const AttentionParams &params;
  const Piece &piece;
  int32_t first;                // number of the warp's first tile: position / 16
  int32_t count;                // of this warp
  uint32_t k_offset, v_offset;  // bytes from a tile's first row to this lane's part of rows g (K) and 2t (V)
  int32_t blocks, next_blocks;  // of a batch of tiles, and of the one after it

  QKV_DEVICE DecodeTiles(const AttentionParams &params, const Piece &piece) : params(params), piece(piece) {
    const quantkv_cache &cache = params.op.cache;
    const uint32_t g = lane_index() / 4, t = lane_index() % 4;
    k_offset = bytes(piece.kv_head * cache.k.map.head_stride + g * cache.k.map.slot_stride) + t * Shape::kWidthK;
    v_offset = bytes(piece.kv_head * cache.v.map.head_stride + 2 * t * cache.v.map.slot_stride) + g * Shape::kWidthV;
    first = piece.begin / Shape::kTile + warp_index();
    int32_t end = piece.end / Shape::kTile + (piece.end % Shape::kTile != 0);
    count = (end - first + Shape::kWarps - 1) / Shape::kWarps;
    next_blocks = find(0);
  }

  static QKV_DEVICE uint32_t bytes(int64_t elements) { return static_cast<uint32_t>(elements) * Shape::kElement; }

  QKV_DEVICE bool halved() const { return params.paging.block_shift == 3; }

  // Tiles of a batch: a lane keeps the block of one, or of half a one if blocks have 8 slots.
  QKV_DEVICE int32_t batch() const { return halved() ? kWarp / 2 : kWarp; }

  QKV_DEVICE int32_t position(int32_t n) const { return (first + n * Shape::kWarps) * Shape::kTile; }

  // This lane's block of the batch that begins with tile n.
  QKV_DEVICE int32_t find(int32_t n) const {
    n += halved() ? lane_index() / 2 : lane_index();
    if (n >= count) return -1;
    int32_t at = position(n) + (halved() ? 8 * (lane_index() % 2) : 0);
    int32_t size = halved() ? 8 : Shape::kTile;
    return at < piece.end && at + size > piece.begin ? block_of(params, piece.seq, at >> params.paging.block_shift) : -1;
  }

  // Makes `blocks` those of the batch that begins with tile n, and asks for the next.
  QKV_DEVICE void begin_batch(int32_t n) {
    blocks = next_blocks;
    next_blocks = find(n + batch());
  }
};

// The blocks of a tile; negative: not in the cache.
struct TileBlocks {
  int32_t low, high; // of tokens 0-7 and 8-15

  // Whether `token` of the tile at `position` is one the piece has keys of.
  QKV_DEVICE bool has(const Piece &piece, int32_t position, int32_t token) const {
    return (token < 8 ? low : high) >= 0 && position + token >= piece.begin && position + token < piece.end;
  }
};

template <int Width, int Words, int Lanes> QKV_DEVICE void load_row(uint32_t (&out)[Words], const unsigned char *row) {
  constexpr int count = Width / 4;
  QKV_UNROLL
  for (int i = 0; i < Words / count; i++) {
    auto words = load_stream(reinterpret_cast<const quantkv::Words<count> *>(row + i * Lanes * Width));
    QKV_UNROLL
    for (int j = 0; j < count; j++) out[i * count + j] = words.w[j];
  }
}

// A tile on its way to a lane's registers. No load waits for a decision: rows the piece does not have are read from
// where they would be, or from block 0, and made harmless when they are used.
template <class Shape> struct TileLoader {
  const DecodeTiles<Shape> &tiles;
  TileBlocks blocks;
  uint32_t slot, slot_high; // of token 0, of token 8

  QKV_DEVICE TileLoader(const DecodeTiles<Shape> &tiles, int32_t n) : tiles(tiles) {
    const bool halved = tiles.halved();
    const int32_t in_batch = n & (tiles.batch() - 1);
    blocks.low = shuffle(tiles.blocks, halved ? 2 * in_batch : in_batch);
    blocks.high = shuffle(tiles.blocks, halved ? 2 * in_batch + 1 : in_batch);
    slot = tiles.position(n) & ((1u << tiles.params.paging.block_shift) - 1);
    slot_high = halved ? 0 : slot + 8;
  }

  // The row of a half tile's first token, with a lane's offset.
  QKV_DEVICE const unsigned char *row(const quantkv_half &half, bool upper, uint32_t offset) const {
    const int64_t block = larger_of(upper ? blocks.high : blocks.low, 0);
    const uint32_t inside = offset + (upper ? slot_high : slot) * tiles.bytes(half.map.slot_stride);
    return static_cast<const unsigned char *>(half.codes) + block * (half.map.block_stride * Shape::kElement) + inside;
  }

  // Tokens g, g + 8.
  QKV_DEVICE void keys(uint32_t (&out)[2][Shape::kWordsK]) const {
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      load_row<Shape::kWidthK, Shape::kWordsK, 4>(out[i], row(tiles.params.op.cache.k, i == 1, tiles.k_offset));
    }
  }

  // Tokens 2t, 2t + 1, 2t + 8, 2t + 9.
  QKV_DEVICE void values(uint32_t (&out)[4][Shape::kWordsV]) const {
    const quantkv_half &v = tiles.params.op.cache.v;
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      const unsigned char *first = row(v, i == 1, tiles.v_offset);
      load_row<Shape::kWidthV, Shape::kWordsV, 8>(out[2 * i], first);
      load_row<Shape::kWidthV, Shape::kWordsV, 8>(out[2 * i + 1], first + tiles.bytes(v.map.slot_stride));
    }
  }

  // Scales of tokens g, g + 8.
  QKV_DEVICE void scales(float (&k)[2], float (&v)[2]) const {
    const quantkv_cache &cache = tiles.params.op.cache;
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      int64_t row = static_cast<int64_t>(larger_of(i ? blocks.high : blocks.low, 0)) * cache.num_kv_heads + tiles.piece.kv_head;
      int64_t index = (row << tiles.params.paging.block_shift) + (i ? slot_high : slot) + lane_index() / 4;
      k[i] = cache.k.dynamic != nullptr ? cache.k.dynamic[index] : 1.0f;
      v[i] = cache.v.dynamic != nullptr ? cache.v.dynamic[index] : 1.0f;
    }
  }
};

// The tile in use.
template <class Shape> struct DecodeTile {
  uint32_t k[2][Shape::kWordsK], v[4][Shape::kWordsV];
  float k_dynamic[2], v_dynamic[2];
  TileBlocks blocks;
  int32_t position;
  bool whole; // every token is there and every row sees it

  // Zeroes what no product may meet: values of tokens the piece does not have, whatever bits are there. Their weight is
  // zero, but zero times NaN is not. (Their keys do no harm: the score is replaced.)
  QKV_DEVICE void drop_missing(const Piece &piece) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    QKV_UNROLL
    for (int row = 0; row < 4; row++) {
      if (blocks.has(piece, position, 8 * (row / 2) + 2 * t + row % 2)) continue;
      QKV_UNROLL
      for (int i = 0; i < Shape::kWordsV; i++) v[row][i] = 0;
    }
    QKV_UNROLL
    for (int half = 0; half < 2; half++) {
      if (!blocks.has(piece, position, 8 * half + g)) v_dynamic[half] = kSmallestScale;
    }
  }
};

// The queries of a piece as operands, in shared memory: every warp uses the same, and registers are for K and V.
template <class Shape> struct DecodeQuery {
  Words<2> q[Shape::kRowTiles][Shape::kSteps][kWarp]; // of lane 4g + t: row g of the row tile, four channels
  float factor[Shape::kRows];                         // a product times this is q . k
};

// Four neighbouring activations of 16 bits.
QKV_DEVICE void load_activation_x4(float (&x)[4], const void *data, int32_t activation, int64_t index) {
  const uint16_t *p = static_cast<const uint16_t *>(data) + index;
  uint32_t words[2];
  if (reinterpret_cast<uintptr_t>(p) % 8 == 0) {
    Words<2> both = *reinterpret_cast<const Words<2> *>(p);
    words[0] = both.w[0];
    words[1] = both.w[1];
  } else {
    words[0] = p[0] | static_cast<uint32_t>(p[1]) << 16;
    words[1] = p[2] | static_cast<uint32_t>(p[3]) << 16;
  }
  QKV_UNROLL
  for (int i = 0; i < 2; i++) {
    if (activation == QUANTKV_F16) unpack_f16(words[i], x[2 * i], x[2 * i + 1]);
    else unpack_bf16(words[i], x[2 * i], x[2 * i + 1]);
  }
}

// The four channels of a step that a lane multiplies lie side by side; the first of them.
template <class Shape> QKV_DEVICE int key_channel(int step) {
  constexpr int width = Shape::kWidthK, element = Shape::kElement;
  int byte = step * 4 * element; // in the lane's share of a row
  return (byte / width * 4 * width + lane_index() % 4 * width + byte % width) / element;
}

// Rows are scaled by a power of two, so that the largest element is near 2^13: a bf16 query then fits an f16 exactly,
// but for elements below 2^-37 of the largest. A per-channel scale of K is multiplied in first.
template <class Shape>
QKV_DEVICE void load_queries(DecodeQuery<Shape> &out, const AttentionParams &params, const Piece &piece) {
  const quantkv_half &k = params.op.cache.k;
  const bool by_channel = is_quantized(format_of(k)) && k.scale.channel_stride != 0;
  const float scale = by_channel ? 1.0f : static_scale(k, piece.kv_head, 0);
  QKV_NO_UNROLL
  for (int tile = 0; tile < Shape::kRowTiles; tile++) {
    const int row = 8 * tile + lane_index() / 4, query = row / piece.num_heads;
    const int64_t offset =
        row_index(params.op.query, piece.first_token + query, piece.first_head + row - query * piece.num_heads);
    auto load = [&](float(&x)[4], int step) {
      int channel = key_channel<Shape>(step);
      x[0] = x[1] = x[2] = x[3] = 0.0f;
      if (row < piece.rows()) load_activation_x4(x, params.op.query.data, params.op.activation, offset + channel);
      if (!by_channel) return;
      QKV_UNROLL
      for (int i = 0; i < 4; i++) x[i] *= static_scale(k, piece.kv_head, channel + i);
    };
    float power = 1.0f, inverse = 1.0f;
    if constexpr (!Shape::kBf16) {
      float largest = 0.0f;
      QKV_UNROLL
      for (int step = 0; step < Shape::kSteps; step++) {
        float x[4];
        load(x, step);
        QKV_UNROLL
        for (int i = 0; i < 4; i++) largest = maximum(largest, x[i] < 0.0f ? -x[i] : x[i]);
      }
      largest = maximum(largest, shuffle_xor(largest, 1));
      largest = maximum(largest, shuffle_xor(largest, 2));
      // 2^exponent <= largest; 2^(13 - exponent) and its inverse are normal for every exponent left.
      int exponent = static_cast<int>(bits_of(largest) >> 23) - 127;
      exponent = exponent < -100 ? -100 : exponent;
      power = float_of(static_cast<uint32_t>(127 + 13 - exponent) << 23);
      inverse = float_of(static_cast<uint32_t>(127 - 13 + exponent) << 23);
    }
    QKV_UNROLL
    for (int step = warp_index(); step < Shape::kSteps; step += Shape::kWarps) {
      float x[4];
      load(x, step);
      Words<2> &q = out.q[tile][step][lane_index()];
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        float low = x[2 * i] * power, high = x[2 * i + 1] * power;
        q.w[i] = Shape::kBf16 ? pack_bf16(low, high) : pack_f16(low, high);
      }
    }
    if (warp_index() == 0 && lane_index() % 4 == 0) out.factor[row] = inverse * scale;
  }
}

template <class Shape> QKV_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if QKV_HAS_TENSOR_CORES
  if constexpr (Shape::kBf16) mma_16816_bf16(c, a, b0, b1);
  else mma_16816_f16(c, a, b0, b1);
#endif
}

// c[row tile] = K q: tokens g, g + 8 x rows 2t, 2t + 1.
template <Format F, class Shape, int RowTiles>
QKV_DEVICE void multiply_keys(float (&c)[RowTiles][4], const DecodeTile<Shape> &tile, const DecodeQuery<Shape> &query) {
  QKV_UNROLL
  for (int i = 0; i < RowTiles; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
  QKV_UNROLL
  for (int step = 0; step < Shape::kSteps; step++) {
    uint32_t a[4];
    if constexpr (is_quantized(F)) {
      decode4_to_f16<F>(tile.k[0][step], a[0], a[2]);
      decode4_to_f16<F>(tile.k[1][step], a[1], a[3]);
    } else {
      a[0] = tile.k[0][2 * step];
      a[1] = tile.k[1][2 * step];
      a[2] = tile.k[0][2 * step + 1];
      a[3] = tile.k[1][2 * step + 1];
    }
    QKV_UNROLL
    for (int i = 0; i < RowTiles; i++) {
      const Words<2> b = query.q[i][step][lane_index()];
      mma_16816<Shape>(c[i], a, b.w[0], b.w[1]);
    }
  }
}

// o += V^T p.
template <Format F, class Shape, int RowTiles>
QKV_DEVICE void multiply_values(float (&o)[RowTiles][Shape::kSteps][4], const DecodeTile<Shape> &tile,
                                const uint32_t (&p)[RowTiles][2]) {
  // Selectors of channels of a word: pairs (token, next token) of channels 0, 1 and 2, 3, or of channels 0 and 1.
  constexpr uint32_t first = is_quantized(F) ? 0x5140 : 0x5410, second = is_quantized(F) ? 0x7362 : 0x7632;
  QKV_UNROLL
  for (int word = 0; word < Shape::kWordsV; word++) {
    uint32_t low[2] = {byte_permute(tile.v[0][word], tile.v[1][word], first), byte_permute(tile.v[0][word], tile.v[1][word], second)};
    uint32_t high[2] = {byte_permute(tile.v[2][word], tile.v[3][word], first), byte_permute(tile.v[2][word], tile.v[3][word], second)};
    if constexpr (is_quantized(F)) {
      QKV_UNROLL
      for (int pair = 0; pair < 2; pair++) {
        uint32_t a[4];
        decode4_to_f16<F>(low[pair], a[0], a[1]);
        decode4_to_f16<F>(high[pair], a[2], a[3]);
        QKV_UNROLL
        for (int i = 0; i < RowTiles; i++) mma_16816<Shape>(o[i][2 * word + pair], a, p[i][0], p[i][1]);
      }
    } else {
      uint32_t a[4] = {low[0], low[1], high[0], high[1]};
      QKV_UNROLL
      for (int i = 0; i < RowTiles; i++) mma_16816<Shape>(o[i][word], a, p[i][0], p[i][1]);
    }
  }
}

// The channel of o[..][tile][0]; o[..][tile][2] is the next one.
template <class Shape> QKV_DEVICE int channel_of(int tile) {
  constexpr int width = Shape::kWidthV, element = Shape::kElement;
  int byte = tile * 2 * element;
  return (byte / width * 8 * width + lane_index() / 4 * width + byte % width) / element;
}

// Softmax state of a warp: rows 2t, 2t + 1 of each row tile. Sums are of this lane's tokens alone.
template <class Shape, int RowTiles> struct DecodeState {
  float o[RowTiles][Shape::kSteps][4];
  float max[RowTiles][2], sum[RowTiles][2];
  float v_unit; // power of two that o is relative to (dynamic scales of V)

  QKV_DEVICE DecodeState() : v_unit(kSmallestScale) {
    QKV_UNROLL
    for (int i = 0; i < RowTiles; i++) {
      max[i][0] = max[i][1] = negative_infinity();
      sum[i][0] = sum[i][1] = 0.0f;
      QKV_UNROLL
      for (int j = 0; j < Shape::kSteps; j++) o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0.0f;
    }
  }

  QKV_DEVICE void rescale(int i, float first, float second) {
    QKV_UNROLL
    for (int j = 0; j < Shape::kSteps; j++) {
      o[i][j][0] *= first;
      o[i][j][1] *= second;
      o[i][j][2] *= first;
      o[i][j][3] *= second;
    }
  }
};

// Products to scores in base 2; what a row does not see becomes -inf.
template <class Shape, int RowTiles, bool Dynamic>
QKV_DEVICE void make_scores(float (&c)[RowTiles][4], const AttentionParams &params, const Piece &piece,
                            const DecodeTile<Shape> &tile, const float *factor) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const bool plain = params.cap == 0.0f && params.op.alibi_slopes == nullptr;
  QKV_UNROLL
  for (int i = 0; i < RowTiles; i++) {
    QKV_UNROLL
    for (int j = 0; j < 4; j++) {
      float product = c[i][j] * factor[8 * i + 2 * t + j % 2];
      if constexpr (Dynamic) product *= tile.k_dynamic[j / 2];
      c[i][j] = plain ? product * params.score_factor : score_of(params, product);
    }
  }
  if (plain && tile.whole) return;
  QKV_UNROLL
  for (int i = 0; i < RowTiles; i++) {
    QKV_UNROLL
    for (int j = 0; j < 4; j++) {
      int row = 8 * i + 2 * t + (j & 1), query = row / piece.num_heads, token = g + 8 * (j / 2), key = tile.position + token;
      if (row >= piece.rows()) continue;
      int position = piece.first_position + query;
      if (params.op.alibi_slopes != nullptr) {
        int head = piece.first_head + row - query * piece.num_heads;
        c[i][j] += alibi_slope(params, head) * static_cast<float>(key - position);
      }
      if (!tile.blocks.has(piece, tile.position, token) || !visible_to(params, position)(key)) c[i][j] = negative_infinity();
    }
  }
}

// Scores to weights, relative to a maximum that may grow; p is the operand of the second product.
template <class Shape, int RowTiles, bool Dynamic>
QKV_DEVICE void make_weights(uint32_t (&p)[RowTiles][2], const float (&c)[RowTiles][4], DecodeState<Shape, RowTiles> &state,
                             const DecodeTile<Shape> &tile) {
  float v_factor[2] = {1.0f, 1.0f};
  if constexpr (Dynamic) {
    // Weights are multiplied by V's scales relative to the largest power of two met, which keeps them in f16.
    float largest = maximum(tile.v_dynamic[0], tile.v_dynamic[1]);
    if (any(largest > state.v_unit)) {
      QKV_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
      // The power of two at or below the largest scale: scales are normal, so it is, too.
      float unit = float_of(bits_of(largest) & 0x7f800000u);
      if (unit > state.v_unit) {
        float factor = divide(state.v_unit, unit);
        QKV_UNROLL
        for (int i = 0; i < RowTiles; i++) state.rescale(i, factor, factor);
        state.v_unit = unit;
      }
    }
    v_factor[0] = divide(tile.v_dynamic[0], state.v_unit);
    v_factor[1] = divide(tile.v_dynamic[1], state.v_unit);
  }
  QKV_UNROLL
  for (int i = 0; i < RowTiles; i++) {
    float first = maximum(c[i][0], c[i][2]), second = maximum(c[i][1], c[i][3]);
    QKV_UNROLL
    for (int mask = 4; mask < 32; mask *= 2) {
      first = maximum(first, shuffle_xor(first, mask));
      second = maximum(second, shuffle_xor(second, mask));
    }
    first = maximum(first, state.max[i][0]);
    second = maximum(second, state.max[i][1]);
    // After the first tiles the maximum rarely grows.
    if (any(first > state.max[i][0] || second > state.max[i][1])) {
      float rescale0 = softmax_rescale(state.max[i][0], first), rescale1 = softmax_rescale(state.max[i][1], second);
      state.sum[i][0] *= rescale0;
      state.sum[i][1] *= rescale1;
      state.rescale(i, rescale0, rescale1);
      state.max[i][0] = first;
      state.max[i][1] = second;
    }
    float reference0 = softmax_reference(first), reference1 = softmax_reference(second);
    float e[4] = {exp2_approx(c[i][0] - reference0), exp2_approx(c[i][1] - reference1), exp2_approx(c[i][2] - reference0),
                  exp2_approx(c[i][3] - reference1)};
    state.sum[i][0] += e[0] + e[2];
    state.sum[i][1] += e[1] + e[3];
    QKV_UNROLL
    for (int half = 0; half < 2; half++) {
      float x = e[2 * half], y = e[2 * half + 1];
      if constexpr (Dynamic) {
        x *= v_factor[half];
        y *= v_factor[half];
      }
      p[i][half] = transpose_8x8(Shape::kBf16 ? pack_bf16(x, y) : pack_f16(x, y));
    }
  }
}

// Merges the warps' states and writes the rows of the piece, or its partial state. Two barriers.
template <class Shape, int RowTiles, bool Dynamic>
QKV_DEVICE void finish_piece(const AttentionParams &params, const WorkList &list, const Piece &piece,
                             DecodeState<Shape, RowTiles> &state, float *shared) {
  constexpr int D = Shape::kSteps * 16;
  const int g = lane_index() / 4, t = lane_index() % 4;
  float *values = shared, *states = shared + Shape::kWarps * Shape::kRows * Shape::kStride;
  QKV_UNROLL
  for (int i = 0; i < RowTiles; i++) {
    QKV_UNROLL
    for (int j = 0; j < 2; j++) {
      float sum = state.sum[i][j];
      QKV_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      int row = warp_index() * Shape::kRows + 8 * i + 2 * t + j;
      if (g == 0) {
        states[2 * row] = state.max[i][j];
        states[2 * row + 1] = sum;
      }
      QKV_UNROLL
      for (int tile = 0; tile < Shape::kSteps; tile++) {
        float *at = values + row * Shape::kStride + channel_of<Shape>(tile);
        at[0] = Dynamic ? state.o[i][tile][j] * state.v_unit : state.o[i][tile][j];
        at[1] = Dynamic ? state.o[i][tile][2 + j] * state.v_unit : state.o[i][tile][2 + j];
      }
    }
  }
  sync_threads();
  for (int row = 0; row < piece.rows(); row++) {
    float max = negative_infinity(), sum = 0.0f, weight[Shape::kWarps];
    QKV_UNROLL
    for (int warp = 0; warp < Shape::kWarps; warp++) max = maximum(max, states[2 * (warp * Shape::kRows + row)]);
    QKV_UNROLL
    for (int warp = 0; warp < Shape::kWarps; warp++) {
      const float *of = states + 2 * (warp * Shape::kRows + row);
      weight[warp] = softmax_rescale(of[0], max);
      sum += of[1] * weight[warp];
    }
    int query = row / piece.num_heads, head = piece.first_head + row - query * piece.num_heads;
    SoftmaxEnd end = end_of_row(params, head, max, sum);
    for (int d = thread_index(); d < D; d += Shape::kThreads) {
      float acc = 0.0f;
      QKV_UNROLL
      for (int warp = 0; warp < Shape::kWarps; warp++) {
        acc += values[(warp * Shape::kRows + row) * Shape::kStride + d] * weight[warp];
      }
      if (piece.slot < 0) {
        float out = softmax_result(acc, end) * static_scale(params.op.cache.v, piece.kv_head, d);
        store_activation(params.op.output.data, params.op.activation,
                         row_index(params.op.output, piece.first_token + query, head) + d, out);
      } else {
        partial_values(list, piece.slot, row)[d] = acc;
      }
    }
    if (thread_index() == 0) {
      if (piece.slot < 0) store_lse(params, piece.first_token + query, head, end.lse);
      else store_partial_state(list, piece.slot, row, max, sum);
    }
  }
  sync_threads();
}

// Where a block is in its work. In shared memory: registers are for the tiles.
struct DecodeCursor {
  int64_t unit;
  int32_t group;
  bool ended;
  Piece piece;

  QKV_DEVICE void step(const AttentionParams &params, const WorkList &list, bool is_first) {
    WorkIterator work(params, list, block_index_x());
    if (!is_first) {
      work.unit = unit;
      work.group = group;
      work.is_first = false;
    }
    ended = !work.next(piece);
    unit = work.unit;
    group = work.group;
  }
};

// Grid: one block a worker of the list. Shared: Shape::kSharedBytes. Asks for: K and V of format F and head dim D, rows
// contiguous and aligned to kWidthK and kWidthV; 16-bit activations, bf16 ones if F is bf16; rows of the list <= kRows.
template <Format F, int D, int RowTiles, bool Dynamic>
QKV_KERNEL QKV_LAUNCH_BOUNDS((DecodeShape<F, D, RowTiles, Dynamic>::kThreads), (DecodeShape<F, D, RowTiles, Dynamic>::kBlocks))
void paged_attention_decode(QKV_GRID_CONSTANT const AttentionParams params, QKV_GRID_CONSTANT const WorkList list) {
#if QKV_HAS_TENSOR_CORES
  using Shape = DecodeShape<F, D, RowTiles, Dynamic>;
  QKV_DYNAMIC_SHARED(shared);
  QKV_SHARED(DecodeCursor, cursor, 1);
  QKV_SHARED(DecodeQuery<Shape>, query, 1);
  wait_for_previous_kernel();
  for (bool is_first = true;; is_first = false) {
    if (thread_index() == 0) cursor->step(params, list, is_first);
    sync_threads();
    if (cursor->ended) return;
    const Piece &piece = cursor->piece;
    DecodeTiles<Shape> tiles(params, piece);
    tiles.begin_batch(0);
    DecodeTile<Shape> tile, next;
    TileLoader<Shape> first(tiles, 0);
    if (tiles.count > 0) {
      first.keys(next.k);
      first.values(next.v);
      if constexpr (Dynamic) first.scales(next.k_dynamic, next.v_dynamic);
    }
    next.blocks = first.blocks;
    load_queries(*query, params, piece);
    sync_threads();
    DecodeState<Shape, RowTiles> state;
    // Positions every row sees.
    const int32_t last_first = visible_to(params, piece.first_position + piece.num_queries - 1).first;
    const int32_t whole_begin = larger_of(piece.begin, last_first), whole_end = smaller_of(piece.end, piece.first_position + 1);

    for (int32_t n = 0; n < tiles.count; n++) {
      tile = next;
      tile.position = tiles.position(n);
      tile.whole = tile.position >= whole_begin && tile.position + Shape::kTile <= whole_end && tile.blocks.low >= 0 &&
                   tile.blocks.high >= 0;
      float c[RowTiles][4];
      multiply_keys<F>(c, tile, *query);
      const bool more = n + 1 < tiles.count;
      if (((n + 1) & (tiles.batch() - 1)) == 0) tiles.begin_batch(n + 1);
      if (more) {
        TileLoader<Shape> loader(tiles, n + 1);
        next.blocks = loader.blocks;
        loader.keys(next.k);
        if constexpr (Shape::kValuesAhead) loader.values(next.v);
        if constexpr (Dynamic) loader.scales(next.k_dynamic, next.v_dynamic);
      }
      if (!tile.whole) tile.drop_missing(piece);
      make_scores<Shape, RowTiles, Dynamic>(c, params, piece, tile, query->factor);
      uint32_t p[RowTiles][2];
      make_weights<Shape, RowTiles, Dynamic>(p, c, state, tile);
      multiply_values<F>(state.o, tile, p);
      if constexpr (!Shape::kValuesAhead) {
        if (more) TileLoader<Shape>(tiles, n + 1).values(next.v);
      }
    }
    finish_piece<Shape, RowTiles, Dynamic>(params, list, piece, state, reinterpret_cast<float *>(shared));
  }
#endif
}

} // namespace quantkv
