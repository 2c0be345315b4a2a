// paged_attention's merge: the states that workers left of a (group, column) they share, to outputs and LSE.
//
// A warp merges a row, a lane has four channels. A row is summed in an order that follows from the plan alone. What a
// merge is, and where its states lie, stands in one record: two trips to memory, then the result.
//
// Done by a kernel of its own; the decode kernel has a way of its own (paged_attention_decode_merge.h).
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
};

// The pieces of a row, channels `channel` .. + 4. Of up to 32 of them a lane has the state of each, so that their weights
// are known at once; accumulators are then only added up, many loads under way.
QKV_DEVICE MergeState merge_pieces(const MergeRow &row, int32_t channel) {
  MergeState state = {negative_infinity(), 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
  const bool inside = channel < row.list.value_stride;
  const int32_t count = row.merge.num_pieces, lane = lane_index();
  float weight = 0.0f;  // of piece base + lane
  uint32_t used = 0;    // pieces that saw a key: others have no part in the result, whatever products with zero gave
  QKV_NO_UNROLL
  for (int32_t base = 0; base < count; base += kMergePieces) {
    Words<4> values[kMergePieces];
    QKV_UNROLL
    for (int i = 0; i < kMergePieces; i++) {
      values[i] = Words<4>{{0, 0, 0, 0}};
      if (inside && base + i < count) values[i] = row.values(base + i, channel);
    }
    if (base % kWarp == 0) {
      float max = negative_infinity(), sum = 0.0f;
      if (base + lane < count) {
        const Words<2> words = row.state(base + lane);
        max = float_of(words.w[0]);
        sum = float_of(words.w[1]);
      }
      const bool none = saw_no_key(max, sum);
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

// Grid: x any, y the number of lists.
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kMergeThreads, 1) merge_attention(AttentionLists call) {
  const WorkList &list = call.lists[block_index_y()];
  if (list.merges_itself) {
    // This kernel's end must not be before the other's.
    wait_for_previous_kernel();
    return;
  }
  // The plan is there: the kernel before this one had waited for it before it let this one start.
  const int64_t items_a_merge = (list.rows + kMergeWarps - 1) / kMergeWarps, items = items_a_merge * list.workers;
  Merge merge = {};
  if (block_index_x() < items) merge = list.merges[block_index_x() / items_a_merge];
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int64_t item = block_index_x(); item < items; item += grid_size_x()) {
    if (item != block_index_x()) merge = list.merges[item / items_a_merge];
    if (!is_sound(call.params, list, merge)) continue;
    const MergeRow row = {list, merge, static_cast<int32_t>(item % items_a_merge) * kMergeWarps + warp_index()};
    if (row.row >= merge.num_queries * merge.num_heads) continue;
    for (int32_t base = 0; base < call.params.op.cache.v.head_dim; base += kMergeChannels) {
      const int32_t channel = base + 4 * lane_index();
      write_merged(call.params, row, merge_pieces(row, channel), channel);
    }
  }
}

} // namespace quantkv
