// paged_attention: which kernels take a call, where its plan and partial states lie, launches.
//
//   f32 activations, sm_75, odd shapes     portable kernel for everything
//   else                                   decode kernel for sequences of at most 8 or 16 query rows a KV head;
//                                          for the others, on sm_90, the wide decode kernel if none has more than 64,
//                                          which may take all; or the prefill kernel, on sm_90 its own where that can;
//                                          or one of them if it is all there is
#pragma once
#include "../core/check.h"
#include "../ops/paged_attention_merge.h"
#include "../ops/paged_attention_plan.h"
#include "paged_attention_kernels.h"

namespace quantkv {
namespace {

constexpr int32_t kAnyQueries = 0x7fffffff;
constexpr int32_t kDecodeTile = 16, kDecodeMinTiles = 8, kDecodePieceCost = 10;
constexpr int32_t kDecodeRows = 16, kDecodeBlocks = 4; // at most

enum class Kernel { Portable, Decode, DecodeWide, Prefill, PrefillHopper };

// A call, cut into the work of up to two kernels.
struct Dispatch {
  AttentionLists call;
  Kernel kernels[kMaxWorkLists];
  int count;
};

AttentionParams params_of(const quantkv_paged_attention &op) {
  AttentionParams params = {};
  params.op = op;
  params.paging = paging_of(op.cache);
  params.group_size = op.num_heads / op.cache.num_kv_heads;
  const int64_t blocks = kMaxPositions / op.cache.block_size;
  params.capacity = op.block_table_stride > blocks
                        ? kMaxPositions
                        : static_cast<int32_t>(op.block_table_stride * op.cache.block_size);
  const bool is_known = op.max_query_len > 0 && op.max_query_len < op.num_tokens;
  params.max_query_len = static_cast<int32_t>(is_known ? op.max_query_len : op.num_tokens);
  const bool has_window = op.sliding_window > 0 && op.sliding_window < kMaxPositions;
  params.window = has_window ? static_cast<int32_t>(op.sliding_window) : kMaxPositions;
  params.cap = op.soft_cap * kLog2E;
  params.score_factor = op.soft_cap == 0.0f ? op.softmax_scale * kLog2E : op.softmax_scale / op.soft_cap;
  return params;
}

// ---- work lists

WorkList list_of(const AttentionParams &params, const KernelShape &shape, const Device &device) {
  const quantkv_paged_attention &op = params.op;
  const int32_t heads = params.group_size;
  WorkList list = {};
  list.min_queries = 1;
  list.max_queries = kAnyQueries;
  list.tile = shape.tile;
  list.columns_per_kv_head = static_cast<int32_t>(ceil_div(heads, shape.max_rows));
  list.heads_per_column = static_cast<int32_t>(ceil_div(heads, list.columns_per_kv_head));
  list.queries_per_group = shape.max_rows / list.heads_per_column;
  list.columns = op.cache.num_kv_heads * list.columns_per_kv_head;
  list.rows = list.queries_per_group * list.heads_per_column;
  list.workers = shape.blocks_per_multiprocessor * device.multiprocessors;
  list.min_tiles = shape.min_tiles;
  list.piece_cost = shape.piece_cost;
  list.max_groups = static_cast<int32_t>(op.num_tokens); // a group has at least one query
  list.value_stride = (op.cache.v.head_dim + 3) / 4 * 4;
  return list;
}

// Gives the parts of a list their places in the workspace, from `offset` on; answers where they end.
size_t place(WorkList &list, void *workspace, size_t offset) {
  const auto take = [&](auto *&part, size_t count) {
    part = reinterpret_cast<decltype(part + 0)>(static_cast<unsigned char *>(workspace) + offset);
    offset += (count * sizeof(*part) + 255) / 256 * 256;
  };
  const size_t workers = static_cast<size_t>(list.workers), slots = (list.merges_itself ? 1 : 2) * workers;
  const size_t rows = slots * static_cast<size_t>(list.rows);
  take(list.groups, static_cast<size_t>(list.max_groups));
  take(list.starts, workers);
  take(list.merges, workers);
  take(list.values, rows * static_cast<size_t>(list.value_stride));
  take(list.states, rows * 2);
  return offset;
}

void add(Dispatch &dispatch, Kernel kernel, const WorkList &list) {
  dispatch.kernels[dispatch.count] = kernel;
  dispatch.call.lists[dispatch.count] = list;
  dispatch.call.lists[dispatch.count++].merges_itself = kernel == Kernel::Decode || kernel == Kernel::DecodeWide;
}

KernelShape decode_shape(const quantkv_paged_attention &op, const Device &device, int32_t rows) {
  const DecodeConfig config = decode_config(op, device, rows);
  if (config.max_rows == 0) return KernelShape{};
  const int32_t blocks = config.blocks_per_multiprocessor;
  return KernelShape{kDecodeTile, rows < config.max_rows ? rows : config.max_rows,
                     blocks < kDecodeBlocks ? blocks : kDecodeBlocks, kDecodeMinTiles, kDecodePieceCost};
}

// Rows that the decode kernel's tiles should have: 8 or 16.
int32_t decode_rows(const AttentionParams &params) {
  if (params.group_size > 8) return kDecodeRows;
  const quantkv_paged_attention &op = params.op;
  // As many as the longest sequence fills. If that has too many for the decode kernel, sequences are alike, and none is
  // its business; or most have one query, beside a few that have very many.
  const int64_t mean = op.num_seqs == 0 ? 1 : ceil_div(op.num_tokens, op.num_seqs);
  const int64_t longest = params.max_query_len, heads = params.group_size;
  const int64_t rows = (longest * heads <= kDecodeRows ? longest : mean) * heads;
  return rows <= 8 || rows > kDecodeRows ? 8 : kDecodeRows;
}

Dispatch dispatch_of(const quantkv_paged_attention &op, const Device &device) {
  Dispatch dispatch = {};
  dispatch.call.params = params_of(op);
  const AttentionParams &params = dispatch.call.params;
  KernelShape decode = {}, prefill = {};
  Kernel prefill_kernel = Kernel::Prefill;
  const int64_t longest = static_cast<int64_t>(params.max_query_len) * params.group_size; // rows
  const int64_t mean = ceil_div(op.num_tokens, op.num_seqs) * params.group_size;
  if (op.kernel != QUANTKV_ATTENTION_PORTABLE) {
    decode = decode_shape(op, device, decode_rows(params));
    const KernelShape wide = decode_wide_shape(op, device, longest);
    if (wide.max_rows > 0 && longest <= kDecodeRows) {
      add(dispatch, Kernel::DecodeWide, list_of(params, wide, device));
      return dispatch;
    }
    const bool is_decode = op.num_tokens <= op.num_seqs || params.max_query_len <= decode.max_rows / params.group_size;
    if (prefill_can_load(op) && !(is_decode && decode.max_rows >= params.group_size)) {
      prefill = prefill_shape(op.cache, op.activation, device);
      const KernelShape hopper = prefill_hopper_shape(op, device);
      if (prefill.max_rows > 0 && hopper.max_rows > 0) {
        prefill = hopper;
        prefill_kernel = Kernel::PrefillHopper;
      }
      if (wide.max_rows > 0) {
        prefill = wide;
        prefill_kernel = Kernel::DecodeWide;
        // One kernel for all, unless most sequences are the other's.
        if (mean > decode.max_rows) decode = KernelShape{};
      }
    }
  }
  if (decode.max_rows > 0 && prefill.max_rows > 0) {
    const int32_t few = decode.max_rows / params.group_size; // queries
    WorkList few_queries = list_of(params, decode, device), many_queries = list_of(params, prefill, device);
    few_queries.max_queries = few;
    many_queries.min_queries = few + 1;
    if (few > 0) add(dispatch, Kernel::Decode, few_queries);
    add(dispatch, prefill_kernel, many_queries);
  } else if (decode.max_rows > 0) {
    add(dispatch, Kernel::Decode, list_of(params, decode, device));
  } else if (prefill.max_rows > 0) {
    add(dispatch, prefill_kernel, list_of(params, prefill, device));
  } else if (op.kernel != QUANTKV_ATTENTION_TENSOR_CORE) {
    add(dispatch, Kernel::Portable, list_of(params, portable_shape(), device));
  }
  return dispatch;
}

// No call of this shape, with these tokens or fewer, needs more: whatever its pointers, strides and kernel.
size_t workspace_bound(const quantkv_paged_attention &op, const Device &device) {
  const AttentionParams params = params_of(op);
  const auto bytes = [&](const KernelShape &shape, bool merges_itself = false) {
    WorkList list = list_of(params, shape, device);
    list.merges_itself = merges_itself;
    // Rows may be cut another way: the most that there can be.
    list.rows = shape.max_rows;
    return place(list, nullptr, 0);
  };
  const size_t portable = bytes(portable_shape());
  if (device.compute_capability < 80) return portable;
  size_t tensor_core = bytes(KernelShape{kDecodeTile, kDecodeRows, kDecodeBlocks, kDecodeMinTiles, kDecodePieceCost}, true);
  const size_t prefill = bytes(KernelShape{kPrefillRows, kPrefillRows, kPrefillBlocks, 1, 0});
  const size_t hopper = bytes(kPrefillHopperShape<128>);
  size_t many = prefill > hopper ? prefill : hopper;
  if (device.compute_capability == 90) {
    const size_t wide = bytes(kDecodeWideShape<64>, true);
    many = wide > many ? wide : many;
  }
  tensor_core += many;
  return portable > tensor_core ? portable : tensor_core;
}

// ---- checks

int check_shape(const quantkv_paged_attention &op) {
  const int32_t size = op.cache.block_size;
  if (size < 8 || size > 256 || (size & (size - 1)) != 0) return QUANTKV_UNSUPPORTED;
  QKV_CHECK(check_heads(op.cache.num_kv_heads));
  QKV_CHECK(check_heads(op.num_heads));
  if (op.num_heads % op.cache.num_kv_heads != 0) return QUANTKV_INVALID_ARGUMENT;
  const quantkv_half *const halves[] = {&op.cache.k, &op.cache.v};
  for (const quantkv_half *half : halves) {
    if (!is_format(half->format)) return QUANTKV_INVALID_ARGUMENT;
    if (half->head_dim < 1 || half->head_dim > kMaxHeadDim) return QUANTKV_UNSUPPORTED;
  }
  if (op.num_tokens < 0 || op.num_seqs < 0 || op.max_query_len < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op.num_tokens > kAnyQueries || op.num_seqs > kAnyQueries) return QUANTKV_UNSUPPORTED;
  return valid_if(is_activation(op.activation));
}

bool is_finite(float x) { return x - x == 0.0f; }

int check(const quantkv_paged_attention &op) {
  QKV_CHECK(check_cache(op.cache));
  QKV_CHECK(check_shape(op));
  QKV_CHECK(check_rows(op.query, op.activation, op.num_tokens, op.num_heads, op.cache.k.head_dim));
  QKV_CHECK(check_rows(op.output, op.activation, op.num_tokens, op.num_heads, op.cache.v.head_dim));
  if (!is_finite(op.softmax_scale) || !is_finite(op.soft_cap) || op.soft_cap < 0.0f || op.sliding_window < 0) {
    return QUANTKV_INVALID_ARGUMENT;
  }
  if (op.kernel < QUANTKV_ATTENTION_AUTO || op.kernel > QUANTKV_ATTENTION_TENSOR_CORE) return QUANTKV_INVALID_ARGUMENT;
  if (op.num_seqs > 0 && extent(op.num_seqs, op.block_table_stride, 1, 0, op.block_table_stride) < 0) {
    return QUANTKV_INVALID_ARGUMENT;
  }
  const void *const all_words[] = {op.query_starts, op.seq_lens, op.block_tables, op.lse, op.alibi_slopes, op.sinks};
  for (const void *words : all_words) {
    if (!is_aligned(words, 4)) return QUANTKV_INVALID_ARGUMENT;
  }
  if (op.num_seqs == 0) return QUANTKV_OK;
  if (op.query_starts == nullptr || op.seq_lens == nullptr) return QUANTKV_INVALID_ARGUMENT;
  if (op.block_tables == nullptr && op.block_table_stride > 0) return QUANTKV_INVALID_ARGUMENT;
  return valid_if(op.workspace != nullptr && is_aligned(op.workspace, 256));
}

// ---- launches

// Blocks of the plan kernel that empty the slots of lists that merge themselves, besides the one that plans.
int64_t slot_blocks_of(const Dispatch &dispatch) {
  int64_t most = 0; // of a list
  for (int i = 0; i < dispatch.count; i++) {
    const WorkList &list = dispatch.call.lists[i];
    const int64_t bytes = list.merges_itself ? 4ll * list.workers * list.rows * list.value_stride : 0;
    const int64_t blocks = ceil_div(bytes, kSlotBytes);
    if (blocks > most) most = blocks;
  }
  return most < kSlotBlocks ? most : kSlotBlocks;
}

int launch(const Dispatch &dispatch, const Device &device, quantkv_stream stream) {
  const AttentionLists &call = dispatch.call;
  if (!call.params.op.plan_is_ready) {
    const Grid grid = {dispatch.count, 1 + slot_blocks_of(dispatch), 1};
    QKV_CHECK(QKV_LAUNCH_OVERLAPPED((plan_attention), grid, kPlanThreads, 0, stream, call));
  }
  if (call.params.op.num_tokens == 0) return QUANTKV_OK;
  int64_t most_rows = 0; // to be merged
  for (int i = 0; i < dispatch.count; i++) {
    const WorkList &list = call.lists[i];
    switch (dispatch.kernels[i]) {
    case Kernel::Portable: QKV_CHECK(launch_portable(call.params, list, stream)); break;
    case Kernel::Decode: QKV_CHECK(launch_decode(call.params, list, device, stream)); break;
    case Kernel::DecodeWide: QKV_CHECK(launch_decode_wide(call.params, list, stream)); break;
    case Kernel::Prefill: QKV_CHECK(launch_prefill(call.params, list, stream)); break;
    case Kernel::PrefillHopper: QKV_CHECK(launch_prefill_hopper(call.params, list, stream)); break;
    }
    const int64_t rows = list.merges_itself ? 0 : static_cast<int64_t>(list.workers) * list.rows;
    if (rows > most_rows) most_rows = rows;
  }
  if (most_rows == 0) return QUANTKV_OK;
  const int64_t resident = 8 * static_cast<int64_t>(device.multiprocessors);
  const Grid grid = {most_rows < resident ? most_rows : resident, dispatch.count, 1};
  return QKV_LAUNCH_OVERLAPPED((merge_attention), grid, kMergeThreads, 0, stream, call);
}

} // namespace
} // namespace quantkv

int QKV_ENTRY(paged_attention_workspace_bytes)(const quantkv_paged_attention *op, size_t *bytes) {
  using namespace quantkv;
  if (op == nullptr || bytes == nullptr) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check_shape(*op));
  Device device = {};
  QKV_CHECK(current_device(device));
  *bytes = workspace_bound(*op, device);
  return QUANTKV_OK;
}

int QKV_ENTRY(paged_attention)(const quantkv_paged_attention *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check(*op));
  if (op->num_seqs == 0) return QUANTKV_OK;
  Device device = {};
  QKV_CHECK(current_device(device));
  Dispatch dispatch = dispatch_of(*op, device);
  if (dispatch.count == 0) return QUANTKV_UNSUPPORTED;
  size_t needed = 0;
  for (int i = 0; i < dispatch.count; i++) needed = place(dispatch.call.lists[i], op->workspace, needed);
  if (op->workspace_bytes < needed) return QUANTKV_WORKSPACE_TOO_SMALL;
  return launch(dispatch, device, stream);
}
