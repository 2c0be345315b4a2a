// paged_attention's merge: the states that workers left of a (group, column) they share, to outputs and LSE.
//
// The warps of a block share the rows of one merge, or several warps (`parts`) a row, whose pieces they take in turn;
// a lane has four channels. A row is summed in an order that follows from the plan alone. What a merge is, and where
// its states lie, stands in one record: two trips to memory, then the result.
//
// Done by a kernel of its own, or by the block that finishes the last piece (merge_when_last).
#pragma once
#include "paged_attention.h"

namespace quantkv {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kMergeChannels = 4 * kWarp; // at a time
constexpr int kMergePieces = 16;          // on their way at once, a warp

// One row of a merge: where its pieces lie.
struct MergeRow {
  const WorkList &list;
  const Merge &merge;
  int32_t row;

  QKV_DEVICE int32_t slot(int32_t piece) const {
    return piece == 0 ? merge.first_slot : 2 * (merge.first_worker + piece);
  }
  QKV_DEVICE Words<2> state(int32_t piece) const {
    return *reinterpret_cast<const Words<2> *>(list.states + (static_cast<int64_t>(slot(piece)) * list.rows + row) * 2);
  }
  // Four accumulators.
  QKV_DEVICE Words<4> values(int32_t piece, int32_t channel) const {
    return *reinterpret_cast<const Words<4> *>(partial_values(list, slot(piece), row) + channel);
  }
};

// Softmax state of one row, of which a lane has four channels.
struct MergeState {
  float max, sum, acc[4];

  QKV_DEVICE void add(float other_max, float other_sum, const float (&other)[4]) {
    // A piece that saw no key has no part in the result, whatever its products with zero gave.
    if (other_max == negative_infinity() && other_sum == 0.0f) return;
    const float top = maximum(max, other_max), mine = softmax_rescale(max, top), others = softmax_rescale(other_max, top);
    max = top;
    sum = sum * mine + other_sum * others;
    QKV_UNROLL
    for (int i = 0; i < 4; i++) acc[i] = acc[i] * mine + other[i] * others;
  }
};

// Pieces part, part + parts .. of a row, channels `channel` .. + 4. Of up to 32 of them a lane has the state of each, so
// that their weights are known at once; accumulators are then only added up, many loads under way.
QKV_DEVICE MergeState merge_pieces(const MergeRow &row, int32_t part, int32_t parts, int32_t channel) {
  MergeState state = {negative_infinity(), 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
  const bool inside = channel < row.list.value_stride;
  const int32_t count = (row.merge.num_pieces - part + parts - 1) / parts, lane = lane_index();
  float weight = 0.0f;  // of piece base + lane
  uint32_t used = 0;    // pieces that saw a key: others have no part in the result, whatever products with zero gave
  QKV_NO_UNROLL
  for (int32_t base = 0; base < count; base += kMergePieces) {
    Words<4> values[kMergePieces];
    QKV_UNROLL
    for (int i = 0; i < kMergePieces; i++) {
      values[i] = Words<4>{{0, 0, 0, 0}};
      if (inside && base + i < count) values[i] = row.values(part + (base + i) * parts, channel);
    }
    if (base % kWarp == 0) {
      float max = negative_infinity(), sum = 0.0f;
      if (base + lane < count) {
        const Words<2> words = row.state(part + (base + lane) * parts);
        max = float_of(words.w[0]);
        sum = float_of(words.w[1]);
      }
      const bool none = max == negative_infinity() && sum == 0.0f;
      used = ballot(!none);
      float top = maximum(state.max, max);
      QKV_UNROLL
      for (int mask = 1; mask < kWarp; mask *= 2) top = maximum(top, shuffle_xor(top, mask));
      weight = softmax_rescale(max, top);
      float weighted = none ? 0.0f : sum * weight;
      QKV_UNROLL
      for (int mask = 1; mask < kWarp; mask *= 2) weighted += shuffle_xor(weighted, mask);
      const float rescale = softmax_rescale(state.max, top);
      state.max = top;
      state.sum = state.sum * rescale + weighted;
      QKV_UNROLL
      for (int i = 0; i < 4; i++) state.acc[i] *= rescale;
    }
    QKV_UNROLL
    for (int i = 0; i < kMergePieces; i++) {
      const int32_t at = base % kWarp + i;
      const float of_piece = shuffle(weight, at);
      if ((used >> at & 1) == 0) continue;
      QKV_UNROLL
      for (int j = 0; j < 4; j++) state.acc[j] += float_of(values[i].w[j]) * of_piece;
    }
  }
  return state;
}

// Whether the merge is one that the plan of this call could hold.
QKV_DEVICE bool is_sound(const AttentionParams &params, const WorkList &list, const Merge &merge) {
  return merge.num_queries > 0 && merge.num_heads > 0 && merge.num_queries <= list.queries_per_group &&
         merge.num_heads <= list.heads_per_column && merge.first_token >= 0 &&
         merge.first_token <= params.op.num_tokens - merge.num_queries && merge.first_head >= 0 &&
         merge.first_head <= params.op.num_heads - merge.num_heads && merge.kv_head >= 0 &&
         merge.kv_head < params.op.cache.num_kv_heads && merge.first_worker >= 0 && merge.num_pieces > 0 &&
         merge.first_worker < list.workers && merge.num_pieces <= list.workers - merge.first_worker &&
         merge.first_slot / 2 == merge.first_worker && merge.first_slot >= 0;
}

// Writes channels `channel` .. + 4 of a merged row.
QKV_DEVICE void write_merged(const AttentionParams &params, const MergeRow &row, const MergeState &state, int32_t channel) {
  const Merge &merge = row.merge;
  const int32_t query = row.row / merge.num_heads, head = merge.first_head + row.row - query * merge.num_heads;
  const int32_t token = merge.first_token + query;
  const SoftmaxEnd end = end_of_row(params, head, state.max, state.sum);
  if (channel == 0) store_lse(params, token, head, end.lse);
  const quantkv_half &v = params.op.cache.v;
  const int64_t output = row_index(params.op.output, token, head) + channel;
  const bool by_channel = is_quantized(format_of(v)) && v.scale.channel_stride != 0;
  const float scale = static_scale(v, merge.kv_head, 0);
  float x[4];
  QKV_UNROLL
  for (int i = 0; i < 4; i++) {
    const bool other = by_channel && channel + i < v.head_dim;
    x[i] = softmax_result(state.acc[i], end) * (other ? static_scale(v, merge.kv_head, channel + i) : scale);
  }
  if (channel + 4 <= v.head_dim && params.op.activation != QUANTKV_F32) {
    store_activation_x4(params.op, output, x);
    return;
  }
  QKV_UNROLL
  for (int i = 0; i < 4; i++) {
    if (channel + i < v.head_dim) store_activation(params.op.output.data, params.op.activation, output + i, x[i]);
  }
}

// Shared by the warps of a row.
struct MergeShared {
  float max[kMergeWarps], sum[kMergeWarps];
  float acc[kMergeWarps][kMergeChannels];
};

// `parts` warps a row, rows first_row .. + kMergeWarps / parts.
QKV_DEVICE void merge_rows(const AttentionParams &params, const WorkList &list, const Merge &merge, int32_t first_row,
                           int32_t parts, MergeShared &shared) {
  const int32_t part = warp_index() % parts;
  const MergeRow row = {list, merge, first_row + warp_index() / parts};
  const bool mine = row.row < merge.num_queries * merge.num_heads;
  for (int32_t base = 0; base < params.op.cache.v.head_dim; base += kMergeChannels) {
    const int32_t channel = base + 4 * lane_index();
    MergeState state = {negative_infinity(), 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
    if (mine) state = merge_pieces(row, part, parts, channel);
    if (parts > 1) {
      shared.max[warp_index()] = state.max;
      shared.sum[warp_index()] = state.sum;
      QKV_UNROLL
      for (int i = 0; i < 4; i++) shared.acc[warp_index()][4 * lane_index() + i] = state.acc[i];
      sync_threads();
      for (int32_t other = 1; other < parts && part == 0; other++) {
        const int32_t warp = warp_index() + other;
        float acc[4];
        QKV_UNROLL
        for (int i = 0; i < 4; i++) acc[i] = shared.acc[warp][4 * lane_index() + i];
        state.add(shared.max[warp], shared.sum[warp], acc);
      }
      sync_threads();
    }
    if (mine && part == 0) write_merged(params, row, state, channel);
  }
}

// Rows that `warps` warps take at once: a power of two, so that all warps have work.
QKV_DEVICE int32_t rows_at_once(int32_t rows, int32_t warps) {
  int32_t at_once = 1;
  while (at_once < rows && at_once < warps) at_once *= 2;
  return at_once;
}

// The merges that a block has a piece of: at most two, of its first piece and of its last one. In shared memory.
struct PendingMerges {
  alignas(16) Merge merges[2];
  int32_t index[2]; // in list.merges; -1: none
  bool is_last[2];
};

// To be called by all threads of a block (of at most kMergeWarps warps, a power of two) when all its pieces are stored:
// the block that is the last to store a piece of a merge does the merge. Which one that is does not show.
QKV_DEVICE void merge_when_last(const AttentionParams &params, const WorkList &list, PendingMerges &pending,
                                MergeShared &shared) {
  if (pending.index[0] < 0 && pending.index[1] < 0) return;
  sync_threads();
  const int thread = thread_index();
  if (thread < 2) {
    const int32_t index = pending.index[thread];
    bool is_last = false;
    if (index >= 0) {
      is_last = atomic_add_ordered(&list.tickets[index], 1) + 1 == static_cast<uint32_t>(pending.merges[thread].num_pieces);
      if (is_last) list.tickets[index] = 0; // for the next call with this plan
    }
    pending.is_last[thread] = is_last;
  }
  sync_threads();
  QKV_NO_UNROLL
  for (int i = 0; i < 2; i++) {
    const Merge &merge = pending.merges[i];
    if (!pending.is_last[i] || !is_sound(params, list, merge)) continue;
    const int32_t warps = block_threads() / kWarp, rows = merge.num_queries * merge.num_heads;
    const int32_t at_once = rows_at_once(rows, warps);
    for (int32_t row = 0; row < rows; row += at_once) merge_rows(params, list, merge, row, warps / at_once, shared);
  }
}

// Grid: x any, y the number of lists.
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kMergeThreads, 1) merge_attention(AttentionLists call) {
  QKV_SHARED(MergeShared, shared, 1);
  const WorkList &list = call.lists[block_index_y()];
  if (list.merges_itself) {
    // This kernel's end must not be before the other's.
    wait_for_previous_kernel();
    return;
  }
  // The plan is there: the kernel before this one had waited for it before it let this one start.
  const int32_t rows = rows_at_once(list.rows, kMergeWarps);
  const int64_t items_a_merge = (list.rows + rows - 1) / rows, items = items_a_merge * list.workers;
  Merge merge = {};
  if (block_index_x() < items) merge = list.merges[block_index_x() / items_a_merge];
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int64_t item = block_index_x(); item < items; item += grid_size_x()) {
    if (item != block_index_x()) merge = list.merges[item / items_a_merge];
    if (!is_sound(call.params, list, merge)) continue;
    merge_rows(call.params, list, merge, static_cast<int32_t>(item % items_a_merge) * rows, kMergeWarps / rows, shared[0]);
  }
}

} // namespace quantkv
