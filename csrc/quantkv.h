/* quantkv: the quantized paged KV cache, C ABI.
 *
 * One function an operation. Each takes a plain struct by pointer and a stream, enqueues its kernels
 * there and returns a status at once. No function allocates, synchronises, exits, keeps a reference to
 * the struct, or reads device memory on the host: every one can be captured in a CUDA graph, and a
 * replay sees what the device buffers hold then. Scratch memory comes from the caller.
 *
 * Conventions
 *   - "device" beside a pointer: device memory of the current context. Shapes stand beside pointers,
 *     outermost dimension first. Strides count elements, not bytes, unless named so.
 *   - Pointers and strides are as large as they say; what the host can see (shapes, strides, formats) is
 *     checked and answered with a status. What only the device sees (slots, block ids, lengths) is
 *     checked by the kernels: what lies outside is skipped and sets a bit in `faults`. No data can make
 *     a kernel touch memory outside the buffers it was given.
 *   - Numerics are those of docs/numerics.md, bit for bit where that page says so.
 *
 * Versioning: compare quantkv_abi_version() with QUANTKV_ABI_VERSION before the first call. Structs only
 * change together with that number.
 */
#ifndef QUANTKV_H
#define QUANTKV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define QUANTKV_API __attribute__((visibility("default")))
#else
#define QUANTKV_API
#endif

#define QUANTKV_ABI_VERSION 1

/* What a call answers. */
enum quantkv_status {
  QUANTKV_OK = 0,
  /* A shape, stride, format or pointer in the struct is not possible. */
  QUANTKV_INVALID_ARGUMENT = 1,
  /* Possible, but there is no kernel for it on this device. */
  QUANTKV_UNSUPPORTED = 2,
  /* The workspace is smaller than the matching *_workspace_bytes() says. */
  QUANTKV_WORKSPACE_TOO_SMALL = 3,
  /* The library holds no code for this device (see QUANTKV_CUDA_ARCHS). */
  QUANTKV_NO_KERNEL_FOR_DEVICE = 4,
  /* No driver, or no device. */
  QUANTKV_NO_DEVICE = 5,
  /* QUANTKV_DEVICE_ERROR + e: the runtime refused a launch with its error e. */
  QUANTKV_DEVICE_ERROR = 1000
};

/* How an element is stored (caches, dense codes) or computed with (activations: the first three). */
enum quantkv_format {
  QUANTKV_F32 = 0,
  QUANTKV_F16 = 1,
  QUANTKV_BF16 = 2,
  QUANTKV_FP8_E4M3 = 3,
  QUANTKV_FP8_E5M2 = 4,
  QUANTKV_FP8_E4M3_FNUZ = 5
};

/* Bits of the sticky fault word: what kernels found in device data. */
enum quantkv_fault {
  QUANTKV_FAULT_SLOT = 1,
  QUANTKV_FAULT_BLOCK = 2,
  QUANTKV_FAULT_SEQ_LEN = 4,
  QUANTKV_FAULT_QUERY_START = 8,
  QUANTKV_FAULT_PLAN = 16
};

/* A CUstream / cudaStream_t. Null is the default stream. */
typedef void *quantkv_stream;

/* A version that grows with any change to this file. */
QUANTKV_API uint32_t quantkv_abi_version(void);

/* A sentence in English for a status; never null. Statuses above QUANTKV_DEVICE_ERROR give the
 * runtime's own words. */
QUANTKV_API const char *quantkv_cuda_status_string(int status);

/* Where element (block, head, slot, channel) lies, in elements:
 *   block*block_stride + head*head_stride + slot*slot_stride + (channel/chunk)*chunk_stride + channel%chunk
 * HND and NHD: chunk >= head_dim. */
typedef struct quantkv_address_map {
  int64_t block_stride;
  int64_t head_stride;
  int64_t slot_stride;
  int64_t chunk;
  int64_t chunk_stride;
} quantkv_address_map;

/* Static scales: device f32, value at head*head_stride + channel*channel_stride; stride 0 broadcasts.
 * Ignored (may be null) where the format is not FP8. */
typedef struct quantkv_scale {
  const float *values;
  int64_t head_stride;
  int64_t channel_stride;
} quantkv_scale;

/* One half (K or V) of one layer's cache. */
typedef struct quantkv_half {
  void *codes;          /* device [num_blocks, ...map]; aligned to 16 bytes for the fast kernels, else to an element */
  float *dynamic;       /* device [num_blocks, num_kv_heads, block_size], or null: no scale per (slot, head) */
  quantkv_scale scale;
  quantkv_address_map map;
  int32_t format;       /* quantkv_format */
  int32_t head_dim;     /* 1 .. 512 */
} quantkv_half;

/* One layer's cache. */
typedef struct quantkv_cache {
  quantkv_half k;
  quantkv_half v;
  int64_t num_blocks;
  int32_t block_size;   /* a power of two, 8 .. 256 */
  int32_t num_kv_heads;
  uint32_t *faults;     /* device, one word, sticky; or null: checked all the same, not reported */
} quantkv_cache;

/* Rows [tokens, heads, dim]: channels contiguous, element (t, h, d) at t*token_stride + h*head_stride + d. */
typedef struct quantkv_rows {
  void *data;           /* device; only read where the struct says "in" */
  int64_t token_stride;
  int64_t head_stride;
} quantkv_rows;

/* ---- cache_write: quantize keys and values and scatter them to their slots ---------------------------- */

typedef struct quantkv_cache_write {
  quantkv_cache cache;
  quantkv_rows key;             /* in  [num_tokens.., num_kv_heads, k.head_dim] */
  quantkv_rows value;           /* in  [num_tokens.., num_kv_heads, v.head_dim] */
  const int64_t *slot_mapping;  /* device [num_tokens]; negative = skip. Of tokens on one slot any may win, element by
                                   element: give each its own */
  int64_t num_tokens;
  int32_t activation;           /* quantkv_format of key and value: F32, F16 or BF16 */
} quantkv_cache_write;

QUANTKV_API int quantkv_cuda_cache_write(const quantkv_cache_write *op, quantkv_stream stream);

/* ---- copy_blocks: duplicate blocks, all layers in one launch ------------------------------------------ */

/* A run of memory that is a table of equal blocks. */
typedef struct quantkv_block_table_memory {
  void *base;                   /* device */
  int64_t block_stride_bytes;
  int64_t block_bytes;
} quantkv_block_table_memory;

/* Copies block pairs[2i] to pairs[2i+1] in each of `num_tables` memories (2 to 4 a layer: K, V and their
 * dynamic scales). Sources and destinations must be disjoint: copies run in no order. */
typedef struct quantkv_copy_blocks {
  const quantkv_block_table_memory *tables; /* device [num_tables] */
  int64_t num_tables;
  const int64_t *pairs;         /* device [num_pairs, 2] */
  int64_t num_pairs;
  int64_t num_blocks;           /* ids outside are skipped and set QUANTKV_FAULT_BLOCK */
  int64_t max_block_bytes;      /* the largest block_bytes: sizes the launch */
  uint32_t *faults;             /* device, or null */
} quantkv_copy_blocks;

QUANTKV_API int quantkv_cuda_copy_blocks(const quantkv_copy_blocks *op, quantkv_stream stream);

/* ---- swap_blocks: move blocks between device and host pools ------------------------------------------- */

/* One copy: `bytes` from `src` to `dst`, either in device or in (best page-locked) host memory, which is page-locked
 * from end to end or not at all. */
typedef struct quantkv_memory_copy {
  void *dst;
  const void *src;
  int64_t bytes;
} quantkv_memory_copy;

/* Enqueues the copies, in no order among themselves: small ones between this device and page-locked memory, in
 * vectors of 16 bytes, by a kernel; the others by copy engines, in batches where the driver has them (12.8 and newer).
 * `copies` is read on the host before the call returns. Not to be used inside a graph capture if host
 * memory is pageable. */
QUANTKV_API int quantkv_cuda_swap_blocks(const quantkv_memory_copy *copies, size_t num_copies, quantkv_stream stream);

/* ---- gather: paged to dense ---------------------------------------------------------------------------- */

typedef struct quantkv_gather {
  quantkv_cache cache;
  const int32_t *block_tables;  /* device [num_seqs, block_table_stride] */
  int64_t block_table_stride;
  const int32_t *cu_seq_lens;   /* device [num_seqs + 1]: output rows of each sequence */
  const int32_t *starts;        /* device [num_seqs]: first position of each, or null: 0 */
  int64_t num_seqs;
  int64_t num_tokens;           /* output rows */
  quantkv_rows key;             /* out [num_tokens, num_kv_heads, k.head_dim] */
  quantkv_rows value;           /* out [num_tokens, num_kv_heads, v.head_dim] */
  int32_t activation;           /* of key and value; or -1: the raw codes, rows gapless, strides ignored */
} quantkv_gather;

QUANTKV_API int quantkv_cuda_gather(const quantkv_gather *op, quantkv_stream stream);

/* ---- scales ---------------------------------------------------------------------------------------------- */

typedef struct quantkv_absmax {
  quantkv_rows input;           /* in [num_tokens, num_heads, head_dim] */
  int64_t num_tokens;
  int32_t num_heads;
  int32_t head_dim;
  int32_t activation;
  int64_t head_stride;          /* of `running`: (0, 0) per tensor, (1, 0) per head, (head_dim, 1) per channel */
  int64_t channel_stride;
  float *running;               /* device: running = max(running, |x|); NaN ignored, infinities are FLT_MAX */
} quantkv_absmax;

QUANTKV_API int quantkv_cuda_absmax(const quantkv_absmax *op, quantkv_stream stream);

/* scales[i] = max(absmax[i] / divisor, 2^-126), or 1.0 where absmax[i] is 0. */
typedef struct quantkv_update_scales {
  const float *absmax;          /* device [len] */
  float *scales;                /* device [len] */
  int64_t len;
  float divisor;
} quantkv_update_scales;

QUANTKV_API int quantkv_cuda_update_scales(const quantkv_update_scales *op, quantkv_stream stream);

/* ---- convert: dense quantize and dequantize -------------------------------------------------------------- */

typedef struct quantkv_convert {
  quantkv_rows rows;            /* in (quantize) or out (dequantize) [num_tokens, num_heads, head_dim] */
  void *codes;                  /* device [num_tokens, num_heads, head_dim], gapless; out or in */
  quantkv_scale scale;
  int64_t num_tokens;
  int32_t num_heads;
  int32_t head_dim;
  int32_t format;               /* of codes */
  int32_t activation;           /* of rows */
} quantkv_convert;

QUANTKV_API int quantkv_cuda_quantize(const quantkv_convert *op, quantkv_stream stream);
QUANTKV_API int quantkv_cuda_dequantize(const quantkv_convert *op, quantkv_stream stream);

/* ---- paged attention --------------------------------------------------------------------------------------- */

/* Sequence s has queries query_starts[s] .. query_starts[s+1], its newest tokens, and seq_lens[s] cached
 * tokens including them. See docs/numerics.md, "Attention". */
typedef struct quantkv_paged_attention {
  quantkv_cache cache;
  quantkv_rows query;           /* in  [num_tokens, num_heads, k.head_dim] */
  quantkv_rows output;          /* out [num_tokens, num_heads, v.head_dim] */
  float *lse;                   /* device [num_tokens, num_heads], natural logarithm, or null */
  const int32_t *query_starts;  /* device [num_seqs + 1] */
  const int32_t *seq_lens;      /* device [num_seqs] */
  const int32_t *block_tables;  /* device [num_seqs, block_table_stride] */
  int64_t block_table_stride;
  int64_t num_seqs;
  int64_t num_tokens;
  int32_t num_heads;            /* query heads, a multiple of num_kv_heads */
  int32_t activation;           /* quantkv_format of query and output */
  float softmax_scale;
  float soft_cap;               /* 0: none */
  int64_t sliding_window;       /* keys a query sees at most, its own included; 0: no window */
  const float *alibi_slopes;    /* device [num_heads], or null */
  const float *sinks;           /* device [num_heads], or null */
  void *workspace;              /* device, aligned to 256 bytes */
  size_t workspace_bytes;
  int32_t plan_is_ready;        /* not 0: the workspace holds the plan of an earlier call (another layer of the same
                                   step) with the same sizes, max_query_len, lengths and window; the scheduling
                                   kernel is not run. If it holds anything else results are wrong, or rows are left
                                   alone, maybe with QUANTKV_FAULT_PLAN */
  int32_t kernel;               /* quantkv_attention_kernel */
  int64_t max_query_len;        /* the most queries of any sequence, or 0: not known. A sequence with more is skipped,
                                   with QUANTKV_FAULT_QUERY_START. It chooses the kernels, by the query rows a KV
                                   head, max_query_len * num_heads / num_kv_heads: up to 16 are a decode kernel's
                                   alone, where else one more is launched for sequences with many queries; 9 to 64
                                   have one of their own on sm_90 (FP8, head dim 128), which is only taken where no
                                   sequence can have more; beyond these the prefill kernel's */
} quantkv_paged_attention;

/* Which kernel to run. Auto takes the fastest that has the shape; the others are for tests and benches and
 * answer QUANTKV_UNSUPPORTED where they have not. */
enum quantkv_attention_kernel {
  QUANTKV_ATTENTION_AUTO = 0,
  QUANTKV_ATTENTION_PORTABLE = 1,     /* f32 arithmetic, every shape and format */
  QUANTKV_ATTENTION_TENSOR_CORE = 2   /* sm_80 and newer, f16 or bf16 products with f32 sums */
};

/* Bytes of workspace for at most `num_tokens` query rows in `num_seqs` sequences. Reads the current device's
 * number of multiprocessors (no synchronisation). Only the fields that describe shapes are looked at. */
QUANTKV_API int quantkv_cuda_paged_attention_workspace_bytes(const quantkv_paged_attention *op, size_t *bytes);
QUANTKV_API int quantkv_cuda_paged_attention(const quantkv_paged_attention *op, quantkv_stream stream);

/* ---- merge_states ---------------------------------------------------------------------------------------- */

/* Combines two partial attention outputs over disjoint keys by their LSE (natural logarithm); an infinite
 * LSE of either sign means "no keys". */
typedef struct quantkv_merge_states {
  quantkv_rows a;               /* in  [num_tokens, num_heads, head_dim]; b and output share its strides */
  const float *a_lse;           /* device [num_tokens, num_heads] */
  const void *b;                /* device, in */
  const float *b_lse;
  void *output;                 /* device, out; may be `a` or `b` */
  float *lse;                   /* device [num_tokens, num_heads], or null */
  int64_t num_tokens;
  int32_t num_heads;
  int32_t head_dim;
  int32_t activation;
} quantkv_merge_states;

QUANTKV_API int quantkv_cuda_merge_states(const quantkv_merge_states *op, quantkv_stream stream);

#ifdef __cplusplus
}
#endif

#endif /* QUANTKV_H */
