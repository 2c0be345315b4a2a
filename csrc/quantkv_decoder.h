/* quantkv_decoder: the small kernels of quantkv's reference decoder, C ABI.
 *
 * Not part of quantkv.h: engines have these operations already. The conventions are quantkv.h's: one plain struct a
 * function, a stream, a status; nothing allocates, synchronises or reads device memory on the host, so that a whole
 * decode step can be captured in a graph. Activations and weights are row-major and gapless; sums are f32.
 *
 * A row of a result depends on its own row of the input alone and is computed in the same order whatever the number of
 * rows. Ids and row numbers that device memory holds are checked by the kernels: what is out of range reads as zeros.
 */
#ifndef QUANTKV_DECODER_H
#define QUANTKV_DECODER_H

#include "quantkv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[r] = table[ids[r]] */
typedef struct quantkv_decoder_embed {
  const void *table;        /* device [vocab, width], of `weight` */
  const int32_t *ids;       /* device [rows] */
  void *out;                /* device [rows, width], of `activation` */
  int64_t rows;
  int64_t vocab;
  int64_t width;
  int32_t weight;           /* quantkv_format: F32, F16 or BF16 */
  int32_t activation;       /* quantkv_format: F32, F16 or BF16 */
} quantkv_decoder_embed;

QUANTKV_API int quantkv_cuda_decoder_embed(const quantkv_decoder_embed *op, quantkv_stream stream);

/* out[r] = weight * (x[r] / sqrt(mean(x[r]^2) + eps)); `out` may be `x`. */
typedef struct quantkv_decoder_rms_norm {
  const void *x;            /* device [rows, width] */
  const void *weight;       /* device [width] */
  void *out;                /* device [rows, width] */
  int64_t rows;
  int64_t width;
  float eps;
  int32_t activation;       /* of all three */
} quantkv_decoder_rms_norm;

QUANTKV_API int quantkv_cuda_decoder_rms_norm(const quantkv_decoder_rms_norm *op, quantkv_stream stream);

/* cos[r, i], sin[r, i] = scaling * cos, sin(positions[r] * inv_freq[i]), the angle rounded to f32. */
typedef struct quantkv_decoder_rope_table {
  const int32_t *positions; /* device [rows] */
  const float *inv_freq;    /* device [half] */
  float *cos;               /* device [rows, half] */
  float *sin;               /* device [rows, half] */
  int64_t rows;
  int64_t half;
  float scaling;
} quantkv_decoder_rope_table;

QUANTKV_API int quantkv_cuda_decoder_rope_table(const quantkv_decoder_rope_table *op, quantkv_stream stream);

/* Turns channels i and i + head_dim/2 of each head in place: (a cos - b sin, b cos + a sin). */
typedef struct quantkv_decoder_rope {
  void *x;                  /* device [rows, heads, head_dim] */
  const float *cos;         /* device [rows, head_dim / 2] */
  const float *sin;         /* device [rows, head_dim / 2] */
  int64_t rows;
  int64_t heads;
  int64_t head_dim;         /* even */
  int32_t activation;
} quantkv_decoder_rope;

QUANTKV_API int quantkv_cuda_decoder_rope(const quantkv_decoder_rope *op, quantkv_stream stream);

/* silu_mul: x[i] = silu(x[i]) * y[i].   add: x[i] += y[i]. */
typedef struct quantkv_decoder_binary {
  void *x;                  /* device [len], in and out */
  const void *y;            /* device [len] */
  int64_t len;
  int32_t activation;       /* of both */
} quantkv_decoder_binary;

QUANTKV_API int quantkv_cuda_decoder_silu_mul(const quantkv_decoder_binary *op, quantkv_stream stream);
QUANTKV_API int quantkv_cuda_decoder_add(const quantkv_decoder_binary *op, quantkv_stream stream);

/* out[i] = x[rows[i]] */
typedef struct quantkv_decoder_gather_rows {
  const void *x;            /* device [num_rows, width] */
  const int32_t *rows;      /* device [count] */
  void *out;                /* device [count, width] */
  int64_t count;
  int64_t num_rows;
  int64_t width;
  int32_t activation;       /* of both */
} quantkv_decoder_gather_rows;

QUANTKV_API int quantkv_cuda_decoder_gather_rows(const quantkv_decoder_gather_rows *op, quantkv_stream stream);

/* out[r, o] = sum_i x[r, i] * weight[o, i] + bias[o]. For any shape, without tensor cores: the fallback where no matrix
 * library is there, and what tests compare one with. */
typedef struct quantkv_decoder_linear {
  const void *x;            /* device [rows, inputs], of `activation` */
  const void *weight;       /* device [outputs, inputs], of `weight_format` */
  const void *bias;         /* device [outputs], of `activation`, or null */
  void *out;                /* device [rows, outputs], of `output` */
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  int32_t activation;
  int32_t weight_format;
  int32_t output;           /* `activation`, or F32 */
} quantkv_decoder_linear;

QUANTKV_API int quantkv_cuda_decoder_linear(const quantkv_decoder_linear *op, quantkv_stream stream);

/* Greedy sampling: the index of each row's largest logit, the lowest of equals; NaN is passed over. -1 where no logit
 * is a number above -inf. */
typedef struct quantkv_decoder_argmax {
  const float *logits;      /* device [rows, vocab] */
  int32_t *ids;             /* device [rows] */
  int64_t rows;
  int64_t vocab;
} quantkv_decoder_argmax;

QUANTKV_API int quantkv_cuda_decoder_argmax(const quantkv_decoder_argmax *op, quantkv_stream stream);

/* Random weights: element i is a number of mean 0 and of standard deviation `deviation` made from (seed, i) alone, the
 * same bits on every device: the sum of the four 16-bit words of a hash, centred and scaled (csrc/ops/decoder/random.h). */
typedef struct quantkv_decoder_random {
  void *out;                /* device [len] */
  int64_t len;
  uint64_t seed;
  float deviation;
  int32_t format;           /* quantkv_format: F32, F16 or BF16 */
} quantkv_decoder_random;

QUANTKV_API int quantkv_cuda_decoder_random(const quantkv_decoder_random *op, quantkv_stream stream);

#ifdef __cplusplus
}
#endif

#endif /* QUANTKV_DECODER_H */
