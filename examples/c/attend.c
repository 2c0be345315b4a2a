/* The C ABI from C: writes three tokens to an FP8 cache, attends over them with one query, and compares with
 * the same sum on the host. No Rust; link with libquantkv_cuda.so (scripts/build-c-library.sh) and the CUDA
 * runtime. Exits with 0, with 1 if something is wrong, and with 3 where there is no device.
 *
 *   cc -std=c11 -I csrc -I $CUDA_HOME/include examples/c/attend.c -o attend \
 *      -L target/c -lquantkv_cuda -L $CUDA_HOME/lib64 -lcudart_static -ldl -lpthread -lrt -lm
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantkv.h"

enum { TOKENS = 3, HEADS = 2, KV_HEADS = 1, DIM = 64, BLOCK = 16, BLOCKS = 4 };

static void cuda(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ? 3 : 1);
}

static void quantkv(int status, const char *what) {
  if (status == QUANTKV_OK) return;
  fprintf(stderr, "%s: %s\n", what, quantkv_cuda_status_string(status));
  exit(status == QUANTKV_NO_DEVICE ? 3 : 1);
}

/* Device memory with a copy of `bytes` from `host`, or zeros. */
static void *device(const void *host, size_t bytes) {
  void *memory = NULL;
  cuda(cudaMalloc(&memory, bytes), "cudaMalloc");
  if (host != NULL) {
    cuda(cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  } else {
    cuda(cudaMemset(memory, 0, bytes), "cudaMemset");
  }
  return memory;
}

/* Half a cache of E4M3, [BLOCKS, KV_HEADS, BLOCK, DIM], one static scale. */
static quantkv_half half_of_cache(float scale) {
  quantkv_half half = {0};
  half.codes = device(NULL, (size_t)BLOCKS * KV_HEADS * BLOCK * DIM);
  half.scale.values = device(&scale, sizeof scale);
  half.map.block_stride = KV_HEADS * BLOCK * DIM;
  half.map.head_stride = BLOCK * DIM;
  half.map.slot_stride = DIM;
  half.map.chunk = DIM;
  half.format = QUANTKV_FP8_E4M3;
  half.head_dim = DIM;
  return half;
}

/* [tokens, heads, DIM] without gaps. */
static quantkv_rows rows(void *data, int heads) {
  quantkv_rows rows = {data, (int64_t)heads * DIM, DIM};
  return rows;
}

int main(void) {
  /* Values that E4M3 has exactly, so that the host need not quantize. */
  float key[TOKENS][DIM], value[TOKENS][DIM], query[HEADS][DIM], output[HEADS][DIM];
  int64_t slots[TOKENS];
  for (int d = 0; d < DIM; d++) {
    for (int t = 0; t < TOKENS; t++) {
      key[t][d] = (float)((t + d) % 3 - 1) * 0.5f;
      value[t][d] = (float)(t + 1) * (d % 2 ? 1.0f : -0.25f);
    }
    for (int h = 0; h < HEADS; h++) query[h][d] = (float)(d % (h + 2)) * 0.5f;
  }
  /* The sequence lives in block 2. */
  const int32_t block_table[1] = {2}, seq_lens[1] = {TOKENS}, query_starts[2] = {0, 1};
  for (int t = 0; t < TOKENS; t++) slots[t] = 2 * BLOCK + t;

  if (quantkv_abi_version() != QUANTKV_ABI_VERSION) {
    fprintf(stderr, "header and library differ: %d, %u\n", QUANTKV_ABI_VERSION, quantkv_abi_version());
    return 1;
  }
  cudaStream_t stream;
  cuda(cudaStreamCreate(&stream), "cudaStreamCreate");

  quantkv_cache cache = {0};
  cache.k = half_of_cache(1.0f);
  cache.v = half_of_cache(1.0f);
  cache.num_blocks = BLOCKS;
  cache.block_size = BLOCK;
  cache.num_kv_heads = KV_HEADS;
  cache.faults = device(NULL, sizeof(uint32_t));

  quantkv_cache_write write = {0};
  write.cache = cache;
  write.key = rows(device(key, sizeof key), KV_HEADS);
  write.value = rows(device(value, sizeof value), KV_HEADS);
  write.slot_mapping = device(slots, sizeof slots);
  write.num_tokens = TOKENS;
  write.activation = QUANTKV_F32;
  quantkv(quantkv_cuda_cache_write(&write, stream), "cache_write");

  /* One query, the newest token; the KV head is shared by both query heads. */
  quantkv_paged_attention attend = {0};
  attend.cache = cache;
  attend.query = rows(device(query, sizeof query), HEADS);
  attend.output = rows(device(NULL, sizeof output), HEADS);
  attend.query_starts = device(query_starts, sizeof query_starts);
  attend.seq_lens = device(seq_lens, sizeof seq_lens);
  attend.block_tables = device(block_table, sizeof block_table);
  attend.block_table_stride = 1;
  attend.num_seqs = 1;
  attend.num_tokens = 1;
  attend.num_heads = HEADS;
  attend.activation = QUANTKV_F32;
  attend.softmax_scale = 0.125f; /* 1 / sqrt(DIM) */
  quantkv(quantkv_cuda_paged_attention_workspace_bytes(&attend, &attend.workspace_bytes), "workspace_bytes");
  attend.workspace = device(NULL, attend.workspace_bytes);
  quantkv(quantkv_cuda_paged_attention(&attend, stream), "paged_attention");

  uint32_t faults = 0;
  cuda(cudaMemcpyAsync(output, attend.output.data, sizeof output, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  cuda(cudaMemcpyAsync(&faults, cache.faults, sizeof faults, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  if (faults != 0) {
    fprintf(stderr, "faults: %u\n", faults);
    return 1;
  }

  for (int h = 0; h < HEADS; h++) {
    double weight[TOKENS], sum = 0.0, worst = 0.0;
    for (int t = 0; t < TOKENS; t++) {
      double logit = 0.0;
      for (int d = 0; d < DIM; d++) logit += (double)query[h][d] * key[t][d];
      sum += weight[t] = exp(logit * attend.softmax_scale);
    }
    for (int d = 0; d < DIM; d++) {
      double want = 0.0;
      for (int t = 0; t < TOKENS; t++) want += weight[t] / sum * value[t][d];
      worst = fmax(worst, fabs(output[h][d] - want));
    }
    printf("head %d: %g %g .., within %.1e of the host\n", h, output[h][0], output[h][1], worst);
    if (!(worst < 1e-5)) return 1;
  }
  return 0;
}
