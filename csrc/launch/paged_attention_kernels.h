// The attention kernels as the launcher sees them.
#pragma once
#include "../core/launch.h"
#include "../ops/paged_attention.h"

namespace quantkv {

// How a kernel wants its work cut.
struct KernelShape {
  int32_t tile;                      // positions of a unit
  int32_t max_rows;                  // query rows of a group, at most; 0: there is no kernel for this call
  int32_t blocks_per_multiprocessor;
  int32_t min_tiles;                 // of a worker
  int32_t piece_cost;                // of starting and ending a (group, column), in tiles
};

// f32 arithmetic: every call.
KernelShape portable_shape();
int launch_portable(const AttentionParams &params, const WorkList &list, quantkv_stream stream);

// Tensor cores, many rows. By what the shape says; and by pointers and strides too.
KernelShape prefill_shape(const quantkv_cache &cache, int32_t activation, const Device &device);
bool prefill_can_load(const quantkv_paged_attention &op);
int launch_prefill(const AttentionParams &params, const WorkList &list, quantkv_stream stream);

// The same for devices of compute capability 9.0, of calls that launch_prefill could take too. Starting and ending a
// piece takes about as long as three tiles. kDim: the larger head dim, rounded up to 64, 128 or 256.
template <int kDim> constexpr KernelShape kPrefillHopperShape = {kDim == 256 ? 64 : 128, 128, 1, 4, 3};
int padded_prefill_dim(const quantkv_cache &cache);
KernelShape prefill_hopper_shape(const quantkv_paged_attention &op, const Device &device);
int launch_prefill_hopper(const AttentionParams &params, const WorkList &list, quantkv_stream stream);

// Tensor cores, few rows: what the plan must know of the kernel that will run.
struct DecodeConfig {
  int32_t max_rows;                  // of a (group, column): 8 or 16; 0: there is no kernel for this call
  int32_t blocks_per_multiprocessor; // with `rows` rows
};

// The configuration for groups of at most `rows` rows (<= max_rows; 16 if not known yet).
DecodeConfig decode_config(const quantkv_paged_attention &op, const Device &device, int32_t rows);

// Whether its loads and those of the wide kernel can have this call's K and V: both of one format and head dim, rows aligned.
bool decode_can_load(const quantkv_paged_attention &op);

// Enqueues the kernel. The call has a configuration, and list.rows is at most its max_rows.
int launch_decode(const AttentionParams &params, const WorkList &list, const Device &device, void *stream);

// The same of 9 to 64 rows, for devices of compute capability 9.0. `rows`: of the longest sequence. A piece costs much: some 3000
// instructions a warp that seldom run, and are cold.
constexpr int32_t kDecodeWideTile = 64;
template <int Rows, bool Dynamic> constexpr int32_t kDecodeWideBlocks = Rows > 32 ? 2 : Dynamic ? 3 : 4; // of a multiprocessor
template <int Rows> constexpr int32_t kDecodeWidePieceCost = Rows > 32 ? 8 : 6;
template <int Rows, bool Dynamic = false>
constexpr KernelShape kDecodeWideShape = {kDecodeWideTile, Rows, kDecodeWideBlocks<Rows, Dynamic>, 2, kDecodeWidePieceCost<Rows>};
KernelShape decode_wide_shape(const quantkv_paged_attention &op, const Device &device, int64_t rows);
int launch_decode_wide(const AttentionParams &params, const WorkList &list, quantkv_stream stream);

} // namespace quantkv
