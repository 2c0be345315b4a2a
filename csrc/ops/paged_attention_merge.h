// paged_attention's merge: the states that workers left of a (group, column) they share, to outputs and LSE.
//
// A block takes one row of one merge at a time. Its warps take the pieces in turn, their lanes four channels each;
// each row is summed in an order that follows from the number of pieces alone.
#pragma once
#include "paged_attention.h"

namespace quantkv {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kMergeChannels = 4 * kWarp; // at a time

// The slots of a merge's pieces. Only the first worker can have had a piece before this one.
struct MergeSlots {
  const WorkList &list;
  int32_t first_worker;
  int32_t first_slot;

  QKV_DEVICE int32_t operator()(int32_t piece) const {
    return piece == 0 ? first_slot : 2 * (first_worker + piece);
  }
  QKV_DEVICE const float *state(int32_t piece, int32_t row) const {
    return list.states + (static_cast<int64_t>((*this)(piece)) * list.rows + row) * 2;
  }
};

// Max and sum over all pieces of a row, the same in every lane.
QKV_DEVICE void merge_states_of_row(const MergeSlots &slots, int32_t pieces, int32_t row, float &max, float &sum) {
  max = negative_infinity();
  for (int32_t piece = lane_index(); piece < pieces; piece += kWarp) max = maximum(max, slots.state(piece, row)[0]);
  QKV_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) max = maximum(max, shuffle_xor(max, mask));
  sum = 0.0f;
  for (int32_t piece = lane_index(); piece < pieces; piece += kWarp) {
    const float *state = slots.state(piece, row);
    sum += state[1] * softmax_rescale(state[0], max);
  }
  QKV_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
}

// Accumulators of channels `channel` .. + 4 over the pieces of one warp.
QKV_DEVICE void merge_values_of_row(const MergeSlots &slots, int32_t pieces, int32_t row, int32_t channel, float max,
                                    float (&acc)[4]) {
  QKV_UNROLL
  for (int i = 0; i < 4; i++) acc[i] = 0.0f;
  if (channel >= slots.list.value_stride) return;
  for (int32_t piece = warp_index(); piece < pieces; piece += kMergeWarps) {
    float piece_max = slots.state(piece, row)[0];
    if (piece_max == negative_infinity()) continue; // it saw no key: what its products with 0 gave is no part of this
    float weight = softmax_rescale(piece_max, max);
    const float *from = partial_values(slots.list, slots(piece), row) + channel;
    Words<4> values = *reinterpret_cast<const Words<4> *>(from);
    QKV_UNROLL
    for (int i = 0; i < 4; i++) acc[i] += weight * float_of(values.w[i]);
  }
}

QKV_DEVICE bool is_sound(const WorkList &list, const Merge &merge) {
  return merge.group >= 0 && merge.group < list.max_groups && merge.column >= 0 && merge.column < list.columns &&
         merge.first_worker >= 0 && merge.first_worker <= merge.last_worker && merge.last_worker < list.workers;
}

QKV_DEVICE void merge_row(const AttentionParams &params, const WorkList &list, const Merge &merge, int32_t row,
                          float *parts /* shared [kMergeWarps, kMergeChannels] */) {
  const WorkGroup group = list.groups[merge.group];
  if (!is_sound(params, list, group)) return;
  int32_t kv_head = merge.column / list.columns_per_kv_head;
  int32_t head_in_group = (merge.column - kv_head * list.columns_per_kv_head) * list.heads_per_column;
  int32_t num_heads = smaller_of(list.heads_per_column, params.group_size - head_in_group);
  if (row >= group.num_queries * num_heads) return;
  int32_t head = kv_head * params.group_size + head_in_group + row % num_heads;
  int32_t token = group.first_token + row / num_heads;

  int64_t start = group.first_tile * list.columns + static_cast<int64_t>(merge.column) * tiles_of(group, list.tile);
  int32_t first_slot = 2 * merge.first_worker + (list.starts[merge.first_worker].unit < start ? 1 : 0);
  MergeSlots slots = {list, merge.first_worker, first_slot};
  int32_t pieces = merge.last_worker - merge.first_worker + 1;
  float max, sum;
  merge_states_of_row(slots, pieces, row, max, sum);
  SoftmaxEnd end = end_of_row(params, head, max, sum);
  if (thread_index() == 0) store_lse(params, token, head, end.lse);

  const quantkv_half &v = params.op.cache.v;
  int64_t output = row_index(params.op.output, token, head);
  for (int32_t base = 0; base < v.head_dim; base += kMergeChannels) {
    float acc[4];
    merge_values_of_row(slots, pieces, row, base + 4 * lane_index(), max, acc);
    QKV_UNROLL
    for (int i = 0; i < 4; i++) parts[warp_index() * kMergeChannels + 4 * lane_index() + i] = acc[i];
    sync_threads();
    int32_t channel = base + thread_index();
    if (thread_index() < kMergeChannels && channel < v.head_dim) {
      float total = 0.0f;
      QKV_UNROLL
      for (int warp = 0; warp < kMergeWarps; warp++) total += parts[warp * kMergeChannels + thread_index()];
      store_activation(params.op.output.data, params.op.activation, output + channel,
                       softmax_result(total, end) * static_scale(v, kv_head, channel));
    }
    sync_threads();
  }
}

QKV_KERNEL void QKV_LAUNCH_BOUNDS(kMergeThreads, 1) merge_attention(AttentionLists call) {
  QKV_SHARED(float, parts, kMergeWarps * kMergeChannels);
  const WorkList &list = call.lists[block_index_y()];
  wait_for_previous_kernel();
  int64_t merges = list.header->num_merges;
  int64_t items = (merges < list.workers ? merges : list.workers) * list.rows;
  for (int64_t item = block_index_x(); item < items; item += grid_size_x()) {
    const Merge merge = list.merges[item / list.rows];
    if (is_sound(list, merge)) merge_row(call.params, list, merge, static_cast<int32_t>(item % list.rows), parts);
  }
}

} // namespace quantkv
