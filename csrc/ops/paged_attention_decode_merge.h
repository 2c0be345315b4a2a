// The decode kernel's own merge: the block that stores the last piece of a (group, column) puts the pieces together.
//
// It is the end of the call, and nothing hides it. Its code has not run before on that multiprocessor, so that an
// instruction costs 10 to 20 clocks: what can be worked out before is (prepare), and the rest is short. A thread has four
// channels of a row and kAtOnce pieces on their way; where threads are left, several share a row, and take its pieces in
// turn. Every thread works out the weights of its pieces itself, which costs less than to wait for somebody. Many pieces
// are merged in two steps: runs of them, each by the block that stores its last one, then what came of the runs, which
// lies where their first pieces were.
#pragma once
#include "paged_attention_merge.h"

namespace quantkv {

// Pieces first, first + stride .. of a merge, `count` of them.
struct PieceRange {
  int32_t first, stride, count;
};

// The merges that a block has a piece of: at most two, of its first piece and of its last one. In shared memory.
struct PendingMerges {
  alignas(16) Merge merges[2];
  int32_t index[2];        // in list.merges; -1: none
  float v_scale[2];        // of the KV head, unless scales are by channel
  PieceRange ranges[2][2]; // [merge][step]; an empty one: there is no such step
  int32_t tickets[2][2];   // of all that is in the range, for `count` blocks
  bool is_last[2];

  QKV_DEVICE void begin() { index[0] = index[1] = -1; }

  // Works out what is to be done about merge `i`, whose record is there; more than `most` pieces are merged in two steps. For
  // one thread.
  QKV_DEVICE void prepare(const AttentionParams &params, const WorkList &list, int i, int32_t most) {
    const Merge &merge = merges[i];
    const int32_t pieces = merge.num_pieces, piece = static_cast<int32_t>(block_index_x()) - merge.first_worker;
    const bool sound = is_sound(params, list, merge) && piece >= 0 && piece < pieces;
    // Pieces of a run: a power of two near the square root of all, unless those are few.
    const int shift = pieces <= most ? 30 : pieces <= 96 ? 3 : pieces <= 256 ? 4 : 5;
    const int32_t first = piece >> shift << shift, runs = ((pieces - 1) >> shift) + 1;
    ranges[i][0] = PieceRange{first, 1, sound ? smaller_of(1 << shift, pieces - first) : 0};
    ranges[i][1] = PieceRange{0, 1 << shift, sound && runs > 1 ? runs : 0};
    // A worker's slots may both begin a run.
    tickets[i][0] = first == 0 ? merge.first_slot : 2 * (merge.first_worker + first);
    tickets[i][1] = 2 * list.workers + merge.first_worker;
  }
};

// Another state of the same row and channels.
QKV_DEVICE void add_state(MergeState &state, float max, float sum, const float (&acc)[4]) {
  // A piece that saw no key has no part in the result, whatever its products with zero gave.
  if (max == negative_infinity() && sum == 0.0f) return;
  const float top = maximum(state.max, max), mine = softmax_rescale(state.max, top), others = softmax_rescale(max, top);
  state.max = top;
  state.sum = state.sum * mine + sum * others;
  QKV_UNROLL
  for (int i = 0; i < 4; i++) state.acc[i] = state.acc[i] * mine + acc[i] * others;
}

// Of the block's shared memory, what threads that share a row tell each other: 6 floats each.
template <class Shape> constexpr int kMergeExchangeBytes = 6 * 4 * Shape::kThreads;

// Four values of each of kAtOnce pieces of kRows rows, on their way to a thread: in registers, or for several rows in shared
// memory, since of 64 registers ptxas makes four, and waits for each load.
template <class Shape> struct PieceValues {
  static constexpr int kRows = Shape::kRowTiles;
  static constexpr bool kInRegisters = kRows == 1;
  static constexpr int kFits = (Shape::kSharedBytes - kMergeExchangeBytes<Shape>) / (16 * Shape::kThreads * kRows);
  static constexpr int kAtOnce = kInRegisters ? 12 : kFits < 8 ? kFits : 8;
  static_assert(kAtOnce > 0, "a piece of each row");
  Words<4> registers[kInRegisters ? kAtOnce : 1];
  Words<4> *shared; // [kRows, kAtOnce, threads], this thread's

  QKV_DEVICE explicit PieceValues(float *block_shared)
      : shared(reinterpret_cast<Words<4> *>(block_shared + kMergeExchangeBytes<Shape> / 4) + reread_thread_index()) {}

  QKV_DEVICE void fetch(int row, int piece, const Words<4> *from) {
    if constexpr (kInRegisters) registers[piece] = *from;
    else copy_async_16(shared + (row * kAtOnce + piece) * Shape::kThreads, from, true);
  }
  QKV_DEVICE void wait() {
    if constexpr (kInRegisters) return;
    copy_async_commit();
    copy_async_wait<0>();
  }
  QKV_DEVICE Words<4> get(int row, int piece) const {
    if constexpr (kInRegisters) return registers[piece];
    else return shared[(row * kAtOnce + piece) * Shape::kThreads];
  }
};

// Rows of a merge, for a thread that has channels `channel` .. + 4 of kRows of them, `row_step` apart.
template <class Shape> struct OwnRows {
  static constexpr int kRows = PieceValues<Shape>::kRows, kAtOnce = PieceValues<Shape>::kAtOnce;
  float *values, *states; // of what would be piece 0 in the first slot of its worker
  uint32_t piece_rows;    // from a piece to the next
  uint32_t first_row;     // .. from there to piece 0's
  int32_t row_step;

  QKV_DEVICE OwnRows(const WorkList &list, const Merge &merge, int32_t row, int32_t row_step, int32_t channel) : row_step(row_step) {
    const uint32_t at = static_cast<uint32_t>(2 * merge.first_worker * list.rows + row);
    values = list.values + static_cast<uint64_t>(at) * Shape::kDim + channel;
    states = list.states + static_cast<uint64_t>(at) * 2;
    piece_rows = static_cast<uint32_t>(2 * list.rows);
    first_row = static_cast<uint32_t>((merge.first_slot & 1) * list.rows);
  }

  QKV_DEVICE uint64_t row_of(int32_t piece, int i) const {
    return (piece == 0 ? first_row : static_cast<uint32_t>(piece) * piece_rows) + static_cast<uint32_t>(i * row_step);
  }
  QKV_DEVICE Words<2> *state_at(uint64_t row) const { return reinterpret_cast<Words<2> *>(states + row * 2); }
  QKV_DEVICE Words<4> *values_at(uint64_t row) const { return reinterpret_cast<Words<4> *>(values + row * Shape::kDim); }

  // Pieces part, part + parts .. of the range, of the first `rows` rows. part < range.count.
  QKV_DEVICE void merge(MergeState (&merged)[kRows], int32_t rows, const PieceRange &range, int32_t part, int32_t shift,
                        float *shared) const {
    PieceValues<Shape> values(shared);
    const int32_t count = ((range.count - 1 - part) >> shift) + 1, step = range.stride << shift, first = range.first + part * range.stride;
    QKV_NO_UNROLL
    for (int32_t base = 0; base < count; base += kAtOnce) {
      Words<2> states[kRows][kAtOnce];
      QKV_UNROLL
      for (int i = 0; i < kRows; i++) {
        QKV_UNROLL
        for (int j = 0; j < kAtOnce; j++) {
          // Beyond the last one the last again, which does not count then; instead of a row that is not there, the first.
          const int32_t piece = first + smaller_of(base + j, count - 1) * step;
          const uint64_t row = row_of(piece, i < rows ? i : 0);
          states[i][j] = *state_at(row);
          values.fetch(i, j, values_at(row));
        }
      }
      values.wait();
      QKV_UNROLL
      for (int i = 0; i < kRows; i++) add(merged[i], states[i], values, i, count - base);
    }
  }

  // Adds the first `count` pieces of row `row`.
  static QKV_DEVICE void add(MergeState &state, const Words<2> (&states)[kAtOnce], const PieceValues<Shape> &values, int row, int32_t count) {
    float top = state.max, max[kAtOnce];
    QKV_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      max[i] = i < count ? float_of(states[i].w[0]) : negative_infinity();
      top = maximum(top, max[i]);
    }
    const float rescale = softmax_rescale(state.max, top);
    state.max = top;
    state.sum *= rescale;
    QKV_UNROLL
    for (int j = 0; j < 4; j++) state.acc[j] *= rescale;
    QKV_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      const float sum = i < count ? float_of(states[i].w[1]) : 0.0f, weight = softmax_rescale(max[i], top);
      // A piece that saw no key has no part in the result, whatever its products with zero gave.
      const bool none = max[i] == negative_infinity() && sum == 0.0f;
      state.sum += sum * weight;
      const Words<4> words = values.get(row, i);
      QKV_UNROLL
      for (int j = 0; j < 4; j++) state.acc[j] += (none ? 0.0f : float_of(words.w[j])) * weight;
    }
  }
};

// Writes channels `channel` .. + 4 of a merged row to the output.
QKV_DEVICE void write_own_row(const AttentionParams &params, const Merge &merge, int32_t row, int32_t channel, const MergeState &state,
                              float v_scale) {
  const quantkv_half &v = params.op.cache.v;
  const bool by_channel = is_quantized(format_of(v)) && v.scale.channel_stride != 0;
  const int32_t query = merge.num_queries == 1 ? 0 : row / merge.num_heads, head = merge.first_head + row - query * merge.num_heads;
  const int32_t token = merge.first_token + query;
  const SoftmaxEnd end = end_of_row(params, head, state.max, state.sum);
  float x[4];
  QKV_UNROLL
  for (int i = 0; i < 4; i++) {
    x[i] = softmax_result(state.acc[i], end) * (by_channel ? static_scale(v, merge.kv_head, channel + i) : v_scale);
  }
  store_activation_x4(params.op, row_index(params.op.output, token, head) + channel, x);
  if (channel == 0) store_lse(params, token, head, end.lse);
}

// Merges a range of pieces to the rows of the output, or to where its first piece is. To be called by all threads of the
// block; `shared`: the block's Shape::kSharedBytes.
template <class Shape>
QKV_DEVICE void merge_range(const AttentionParams &params, const WorkList &list, const Merge &merge, const PieceRange &range,
                            bool to_output, float v_scale, float *shared) {
  using Rows = OwnRows<Shape>;
  constexpr int kLanes = Shape::kDim / 4, kPlaces = Shape::kThreads / kLanes; // threads a row; rows at once
  static_assert(kPlaces > 0 && kMergeExchangeBytes<Shape> <= Shape::kSharedBytes, "a row is for part of a block");
  const int32_t rows = merge.num_queries * merge.num_heads, thread = reread_thread_index();
  const int32_t place = thread / kLanes, channel = thread % kLanes * 4;
  int shift = 0; // log2 of the threads that share four channels of a row
  while ((rows << (shift + 1)) <= kPlaces) shift++;
  const int32_t part = place & ((1 << shift) - 1), row_step = kPlaces >> shift;
  QKV_NO_UNROLL
  for (int32_t base = 0; base < rows; base += row_step * Rows::kRows) {
    const int32_t row = base + (place >> shift), mine = place < kPlaces ? (rows - row + row_step - 1) / row_step : 0;
    const Rows own(list, merge, row, row_step, channel);
    MergeState states[Rows::kRows];
    QKV_UNROLL
    for (int i = 0; i < Rows::kRows; i++) states[i] = {negative_infinity(), 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
    if (mine > 0 && part < range.count) own.merge(states, mine, range, part, shift, shared);
    if (shift > 0) { // then all rows are here at once
      const MergeState &state = states[0];
      const float words[6] = {state.max, state.sum, state.acc[0], state.acc[1], state.acc[2], state.acc[3]};
      QKV_UNROLL
      for (int i = 0; i < 6; i++) shared[i * Shape::kThreads + thread] = words[i];
      sync_threads();
      for (int32_t other = 1; other < 1 << shift && part == 0; other++) {
        const float *from = shared + thread + other * kLanes;
        const float acc[4] = {from[2 * Shape::kThreads], from[3 * Shape::kThreads], from[4 * Shape::kThreads], from[5 * Shape::kThreads]};
        if (mine > 0) add_state(states[0], from[0], from[Shape::kThreads], acc);
      }
      sync_threads();
    }
    // Others may still be reading the state of the first piece.
    if (!to_output && shift == 0) sync_threads();
    QKV_UNROLL
    for (int i = 0; i < Rows::kRows; i++) {
      const MergeState &state = states[i];
      if (i >= mine || part != 0) continue;
      if (to_output) {
        write_own_row(params, merge, row + i * row_step, channel, state, v_scale);
        continue;
      }
      const uint64_t to = own.row_of(range.first, i);
      *own.values_at(to) = Words<4>{{bits_of(state.acc[0]), bits_of(state.acc[1]), bits_of(state.acc[2]), bits_of(state.acc[3])}};
      if (channel == 0) *own.state_at(to) = Words<2>{{bits_of(state.max), bits_of(state.sum)}};
    }
  }
}

// To be called by all threads of a block when all its pieces are stored: the block that is the last to store a piece of
// a run merges the run, and if its is the last run, what came of the runs. Which block that is does not show.
template <class Shape>
QKV_DEVICE void merge_when_last(const AttentionParams &params, const WorkList &list, PendingMerges &pending, float *shared) {
  if (pending.index[0] < 0 && pending.index[1] < 0) return;
  const int thread = reread_thread_index();
  QKV_NO_UNROLL
  for (int step = 0; step < 2; step++) {
    sync_threads(); // all threads have stored what is to be merged
    if (thread < 2) {
      const int32_t count = pending.index[thread] < 0 ? 0 : pending.ranges[thread][step].count;
      bool is_last = count > 0 && (step == 0 || pending.is_last[thread]);
      if (is_last) {
        uint32_t *ticket = &list.tickets[pending.tickets[thread][step]];
        is_last = atomic_add_ordered(ticket, 1) + 1 == static_cast<uint32_t>(count);
        if (is_last) *ticket = 0; // for the next call with this plan
      }
      pending.is_last[thread] = is_last;
    }
    sync_threads();
    if (!pending.is_last[0] && !pending.is_last[1]) return;
    QKV_NO_UNROLL
    for (int i = 0; i < 2; i++) {
      if (!pending.is_last[i]) continue;
      const bool to_output = step == 1 || pending.ranges[i][1].count == 0;
      merge_range<Shape>(params, list, pending.merges[i], pending.ranges[i][step], to_output, pending.v_scale[i], shared);
    }
  }
}

} // namespace quantkv
