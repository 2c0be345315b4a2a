// The decode kernel's two products, K Q^T and V^T P^T: codes as they lie in a lane's registers to operands of tensor cores.
// Which lane has what is said in paged_attention_decode.h.
#pragma once
#include "paged_attention_decode_query.h"
#include "paged_attention_decode_tiles.h"

namespace quantkv {

template <class Shape> QKV_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if QKV_HAS_TENSOR_CORES
  if constexpr (Shape::kBf16) mma_16816_bf16(c, a, b0, b1);
  else mma_16816_f16(c, a, b0, b1);
#endif
}

// c[row tile] = K q: tokens g, g + 8 x rows 2t, 2t + 1.
template <Format F, class Shape, int RowTiles>
QKV_DEVICE void multiply_keys(float (&c)[RowTiles][4], const TilePart<Shape> &part, const DecodeQuery<Shape> &query) {
  QKV_UNROLL
  for (int i = 0; i < RowTiles; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
  QKV_UNROLL
  for (int step = 0; step < Shape::kSteps; step++) {
    uint32_t a[4];
    if constexpr (is_quantized(F)) {
      decode4_to_f16<F>(part.k[0][step], a[0], a[2]);
      decode4_to_f16<F>(part.k[1][step], a[1], a[3]);
    } else {
      a[0] = part.k[0][2 * step];
      a[1] = part.k[1][2 * step];
      a[2] = part.k[0][2 * step + 1];
      a[3] = part.k[1][2 * step + 1];
    }
    QKV_UNROLL
    for (int i = 0; i < RowTiles; i++) {
      const Words<2> b = query.q[i][step][lane_index()];
      mma_16816<Shape>(c[i], a, b.w[0], b.w[1]);
    }
  }
}

// The same of K in whole lines. What the product takes for token g is a token of the lower half in one product and of the
// upper one in another: token g / 2, the first half of each line's channels if g is even, the second if it is odd; for
// token g + 8 likewise token g / 2 + 4. So each is multiplied by both halves of q, of which one is the lane's, and lanes of
// a token (neighbours in g) add up what they have: the even one of the lower half, the odd one of the upper.
template <Format F, class Shape>
QKV_DEVICE void multiply_lines(float (&c)[1][4], const TilePart<Shape> &part, const DecodeQuery<Shape> &query) {
  constexpr int kStepsHere = Shape::kSteps / Shape::kLines / 2, kWordsAStep = 4 / kStepsHere; // of half a line
  float sums[2][2][4]; // [half of the tokens][half of the channels]
  QKV_UNROLL
  for (int i = 0; i < 2; i++) {
    QKV_UNROLL
    for (int h = 0; h < 2; h++) sums[i][h][0] = sums[i][h][1] = sums[i][h][2] = sums[i][h][3] = 0.0f;
    QKV_UNROLL
    for (int line = 0; line < Shape::kLines; line++) {
      QKV_UNROLL
      for (int step = 0; step < kStepsHere; step++) {
        const uint32_t *row = &part.k[i][8 * line + kWordsAStep * step], *row8 = row + 4;
        uint32_t a[4];
        if constexpr (is_quantized(F)) {
          decode4_to_f16<F>(row[0], a[0], a[2]);
          decode4_to_f16<F>(row8[0], a[1], a[3]);
        } else {
          a[0] = row[0];
          a[1] = row8[0];
          a[2] = row[1];
          a[3] = row8[1];
        }
        QKV_UNROLL
        for (int h = 0; h < 2; h++) {
          const Words<2> b = query.q[0][(2 * line + h) * kStepsHere + step][lane_index()];
          mma_16816<Shape>(sums[i][h], a, b.w[0], b.w[1]);
        }
      }
    }
  }
  const bool odd = Shape::reread_lane() / 4 % 2 != 0;
  QKV_UNROLL
  for (int j = 0; j < 4; j++) {
    const float mine = odd ? sums[1][1][j] : sums[0][0][j], others = odd ? sums[0][1][j] : sums[1][0][j];
    c[0][j] = mine + shuffle_xor(others, 4);
  }
}

// o += V^T p of packed values, of which a word is tokens of one channel, as the product wants them: rows g are channels g of each 16.
template <Format F, class Shape, int RowTiles>
QKV_DEVICE void multiply_packed_values(float (&o)[RowTiles][Shape::kSteps][4], const TilePart<Shape> &part,
                                       const uint32_t (&p)[RowTiles][2]) {
  QKV_UNROLL
  for (int step = 0; step < Shape::kSteps; step++) {
    uint32_t a[4];
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      if constexpr (is_quantized(F)) {
        decode4_to_f16<F>(part.packed_v(2 * step + i, 0), a[i], a[2 + i]);
      } else {
        a[i] = part.packed_v(2 * step + i, 0);
        a[2 + i] = part.packed_v(2 * step + i, 1);
      }
    }
    QKV_UNROLL
    for (int i = 0; i < RowTiles; i++) mma_16816<Shape>(o[i][step], a, p[i][0], p[i][1]);
  }
}

// o += V^T p.
template <Format F, class Shape, int RowTiles>
QKV_DEVICE void multiply_values(float (&o)[RowTiles][Shape::kSteps][4], const TilePart<Shape> &part,
                                const uint32_t (&p)[RowTiles][2]) {
  // Selectors of channels of a word: pairs (token, next token) of channels 0, 1 and 2, 3, or of channels 0 and 1.
  constexpr uint32_t first = is_quantized(F) ? 0x5140 : 0x5410, second = is_quantized(F) ? 0x7362 : 0x7632;
  QKV_UNROLL
  for (int word = 0; word < Shape::kWordsV; word++) {
    uint32_t low[2] = {byte_permute(part.v[0][word], part.v[1][word], first), byte_permute(part.v[0][word], part.v[1][word], second)};
    uint32_t high[2] = {byte_permute(part.v[2][word], part.v[3][word], first), byte_permute(part.v[2][word], part.v[3][word], second)};
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

} // namespace quantkv
