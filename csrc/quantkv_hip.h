/* quantkv on AMD's GPUs: the functions of quantkv.h and quantkv_decoder.h over the HIP runtime, C ABI.
 *
 * The structs, the statuses and the conventions are those two headers': a stream is a hipStream_t, the current device is
 * HIP's. The library links no runtime: whoever uses it hands it the few functions it calls, those of the
 * libamdhip64 the program has, of any version from 5 on (quantkv_hip_use_runtime). Kernels are loaded on a device when
 * the first of a group is launched there, which no graph capture allows: quantkv_hip_load_kernels does it before.
 */
#ifndef QUANTKV_HIP_H
#define QUANTKV_HIP_H

#include "quantkv.h"
#include "quantkv_decoder.h"

#ifdef __cplusplus
extern "C" {
#endif

/* hipModule_t, hipFunction_t and hipStream_t are pointers, hipError_t is an int, hipMemcpyKind an enum: as HIP 5, 6 and
 * 7 have them. No struct of HIP's is used. */
typedef struct quantkv_hip_runtime {
  int (*get_device)(int *device);                                               /* hipGetDevice */
  int (*get_attribute)(int *value, int attribute, int device);                  /* hipDeviceGetAttribute */
  int (*load_module)(void **module, const void *image);                         /* hipModuleLoadData */
  int (*get_function)(void **function, void *module, const char *name);         /* hipModuleGetFunction */
  int (*launch)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void *stream, void **params,
                void **extra);                                                  /* hipModuleLaunchKernel */
  int (*copy)(void *dst, const void *src, size_t bytes, int kind, void *stream); /* hipMemcpyAsync */
  const char *(*error_text)(int error);                                         /* hipGetErrorString */
} quantkv_hip_runtime;

/* Copies the table. Call it once, before anything else; a call without it answers QUANTKV_NO_DEVICE. */
QUANTKV_API int quantkv_hip_use_runtime(const quantkv_hip_runtime *functions);
/* Loads every kernel on the current device, where it is not yet. QUANTKV_NO_KERNEL_FOR_DEVICE if the library was built
 * without code for it (QUANTKV_HIP_ARCHS). */
QUANTKV_API int quantkv_hip_load_kernels(void);

QUANTKV_API uint32_t quantkv_hip_abi_version(void);
QUANTKV_API const char *quantkv_hip_status_string(int status);

QUANTKV_API int quantkv_hip_cache_write(const quantkv_cache_write *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_copy_blocks(const quantkv_copy_blocks *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_swap_blocks(const quantkv_memory_copy *copies, size_t num_copies, quantkv_stream stream);
QUANTKV_API int quantkv_hip_gather(const quantkv_gather *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_absmax(const quantkv_absmax *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_update_scales(const quantkv_update_scales *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_quantize(const quantkv_convert *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_dequantize(const quantkv_convert *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_paged_attention_workspace_bytes(const quantkv_paged_attention *op, size_t *bytes);
QUANTKV_API int quantkv_hip_paged_attention(const quantkv_paged_attention *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_merge_states(const quantkv_merge_states *op, quantkv_stream stream);

QUANTKV_API int quantkv_hip_decoder_embed(const quantkv_decoder_embed *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_gather_rows(const quantkv_decoder_gather_rows *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_rms_norm(const quantkv_decoder_rms_norm *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_rope_table(const quantkv_decoder_rope_table *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_rope(const quantkv_decoder_rope *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_silu_mul(const quantkv_decoder_binary *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_add(const quantkv_decoder_binary *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_linear(const quantkv_decoder_linear *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_argmax(const quantkv_decoder_argmax *op, quantkv_stream stream);
QUANTKV_API int quantkv_hip_decoder_random(const quantkv_decoder_random *op, quantkv_stream stream);

#ifdef __cplusplus
}
#endif

#endif /* QUANTKV_HIP_H */
