// The decode kernel's own merge: pieces of a (group, column) are put together by the block of the first one, as it ends.
//
// It is the end of the call, and nothing hides it: no counter, no fence, one trip to memory. The other blocks leave their
// states in their slots of the workspace and go on. A slot's words are their own signal: between calls each is kNotThere,
// which no state holds, and who reads words looks again until all are something else, then makes them kNotThere for the
// next call with this plan. The plan kernel does for the first one.
//
// Who waits must not keep those it waits for from running, so it only waits for blocks that have begun before it: blocks
// begin in the order of their index, and the last worker is block 0. A worker's piece that is the first of a (group,
// column) is its last piece, and those of the workers after it are their first, so it rarely waits for long.
//
// Many pieces are merged in two steps: runs of them, each by the worker of its first one, then what came of the runs.
#pragma once
#include "paged_attention_merge.h"

namespace quantkv {

// A word of a state that is not kNotThere: that bit pattern is a NaN, of which another one does as well.
QKV_DEVICE uint32_t state_word(float x) { return bits_of(x) == kNotThere ? 0x7fffffffu : bits_of(x); }

// What a worker has to do about a piece that is not all of its (group, column).
struct MergeRole {
  int32_t members, runs; // that it merges: workers `1 ..` after it, and every `1 << shift`-th worker after it
  int32_t shift;
  bool is_first;         // writes the output, else its slot
  bool is_sound;         // the plan makes sense

  QKV_DEVICE MergeRole(const WorkList &list, int32_t worker, int32_t first, int32_t pieces, int32_t most) {
    const int32_t piece = worker - first;
    is_sound = piece >= 0 && piece < pieces && first >= 0 && first <= list.workers - pieces;
    is_first = piece == 0;
    // Pieces of a run: a power of two near the square root of all, unless those are few.
    shift = pieces <= most ? 15 : pieces <= 96 ? 3 : pieces <= 256 ? 4 : 5;
    const bool begins_run = (piece & ((1 << shift) - 1)) == 0;
    members = is_sound && begins_run ? smaller_of(1 << shift, pieces - piece) - 1 : 0;
    runs = is_sound && is_first ? (pieces - 1) >> shift : 0;
  }
};

// Row `row` of a worker's slot.
QKV_DEVICE Words<4> *slot_values(const WorkList &list, int32_t worker, int32_t row) {
  return reinterpret_cast<Words<4> *>(partial_values(list, worker, row));
}
QKV_DEVICE Words<2> *slot_state(const WorkList &list, int32_t worker, int32_t row) {
  return reinterpret_cast<Words<2> *>(list.states) + static_cast<uint32_t>(worker * list.rows + row);
}

// Adds rows `rows` of the slots of `count` workers, first, first + step .., channels 4 * run .. + 4 of them, to `states`, and
// empties them. All lanes of a warp take the same rows, and call this; a lane that is not `inside` only follows. `is_last`:
// no more channels of these rows are to come. False: a slot was never filled.
template <int kAtOnce, int kRows>
QKV_DEVICE bool merge_slots(MergeState (&states)[kRows], const WorkList &list, int32_t first, int32_t step, int32_t count,
                            const int32_t (&rows)[kRows], int32_t run, bool inside, bool is_last) {
  QKV_NO_UNROLL
  for (int32_t base = 0; base < count; base += kAtOnce) {
    Words<2> of_slot[kRows][kAtOnce];
    Words<4> values[kRows][kAtOnce];
    bool missing = true;
    QKV_NO_UNROLL
    for (int look = 0; look < kMostLooks && missing; look++) {
      uint32_t most = 0;
      QKV_UNROLL
      for (int r = 0; r < kRows; r++) {
        QKV_UNROLL
        for (int i = 0; i < kAtOnce; i++) {
          // Beyond the last one the last again, which does not count then.
          const int32_t worker = first + smaller_of(base + i, count - 1) * step;
          of_slot[r][i] = load_relaxed(slot_state(list, worker, rows[r]));
          values[r][i] = load_relaxed(slot_values(list, worker, rows[r]) + run);
        }
      }
      QKV_UNROLL
      for (int r = 0; r < kRows; r++) {
        QKV_UNROLL
        for (int i = 0; i < kAtOnce; i++) {
          QKV_UNROLL
          for (int j = 0; j < 4; j++) most = larger_unsigned(most, values[r][i].w[j]);
          most = larger_unsigned(most, larger_unsigned(of_slot[r][i].w[0], of_slot[r][i].w[1]));
        }
      }
      missing = any(inside && most == kNotThere);
    }
    if (missing) return false;

    QKV_UNROLL
    for (int r = 0; r < kRows; r++) {
      MergeState &state = states[r];
      float top = state.max, max[kAtOnce];
      QKV_UNROLL
      for (int i = 0; i < kAtOnce; i++) {
        max[i] = base + i < count ? float_of(of_slot[r][i].w[0]) : negative_infinity();
        top = maximum(top, max[i]);
      }
      const float rescale = softmax_rescale(state.max, top);
      state.max = top;
      state.sum *= rescale;
      QKV_UNROLL
      for (int j = 0; j < 4; j++) state.acc[j] *= rescale;
      QKV_UNROLL
      for (int i = 0; i < kAtOnce; i++) {
        const float sum = base + i < count ? float_of(of_slot[r][i].w[1]) : 0.0f, weight = softmax_rescale(max[i], top);
        // A piece that saw no key has no part in the result, whatever its products with zero gave.
        const bool none = saw_no_key(max[i], sum);
        state.sum += sum * weight;
        QKV_UNROLL
        for (int j = 0; j < 4; j++) state.acc[j] += (none ? 0.0f : float_of(values[r][i].w[j])) * weight;
      }
    }
  }
  for (int32_t i = 0; i < count; i++) {
    const int32_t worker = first + i * step;
    QKV_UNROLL
    for (int r = 0; r < kRows; r++) {
      if (inside) store_relaxed(slot_values(list, worker, rows[r]) + run, Words<4>{{kNotThere, kNotThere, kNotThere, kNotThere}});
      if (is_last && lane_index() == 0) store_relaxed(slot_state(list, worker, rows[r]), Words<2>{{kNotThere, kNotThere}});
    }
  }
  return true;
}

// Adds what others have of rows of a piece of `worker`.
template <int kAtOnce, int kRows>
QKV_DEVICE bool merge_rows(MergeState (&states)[kRows], const WorkList &list, int32_t worker, const MergeRole &role,
                           const int32_t (&rows)[kRows], int32_t run, bool inside, bool is_last) {
  QKV_UNROLL
  for (int r = 0; r < kRows; r++) {
    // What saw no key has no part in the result, whatever its products with zero gave. saw_no_key() would cost an instruction
    // and, of one kernel, a register.
    const bool none = states[r].max == negative_infinity() && states[r].sum == 0.0f;
    QKV_UNROLL
    for (int i = 0; i < 4; i++) states[r].acc[i] = none ? 0.0f : states[r].acc[i];
  }
  QKV_NO_UNROLL
  for (int step = 0; step < 2; step++) {
    const int32_t distance = step == 0 ? 1 : 1 << role.shift, count = step == 0 ? role.members : role.runs;
    if (!merge_slots<kAtOnce>(states, list, worker + distance, distance, count, rows, run, inside, is_last)) return false;
  }
  return true;
}

// Where a row of a piece goes when the piece ends. A warp has the row, a lane channels `channel` .. + 4 if it is `inside`; `is_last`: no
// more channels of the row are to come.
struct RowEnd {
  const AttentionParams &params;
  const WorkList &list;
  const Piece &piece;
  int32_t worker, row, channel;
  bool inside, is_last;

  // `v_scale`: of V, unless scales are by channel.
  QKV_DEVICE void to_output(MergeState &state, bool by_channel, float v_scale) const {
    const int query = piece.query_of(row), head = piece.first_head + row - query * piece.num_heads, token = piece.first_token + query;
    const SoftmaxEnd end = end_of_row(params, head, state.max, state.sum);
    float scales[4] = {v_scale, v_scale, v_scale, v_scale};
    if (by_channel) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) scales[i] = static_scale(params.op.cache.v, piece.kv_head, channel + i);
    }
    QKV_UNROLL
    for (int i = 0; i < 4; i++) state.acc[i] = softmax_result(state.acc[i], end) * scales[i];
    if (inside) store_activation_x4(params.op, row_index(params.op.output, token, head) + channel, state.acc);
    if (is_last && lane_index() == 0) store_lse(params, token, head, end.lse);
  }

  QKV_DEVICE void to_slot(const MergeState &state) const {
    Words<4> values;
    QKV_UNROLL
    for (int i = 0; i < 4; i++) values.w[i] = state_word(state.acc[i]);
    if (inside) store_relaxed(slot_values(list, worker, row) + channel / 4, values);
    const Words<2> words = {{state_word(state.max), state_word(state.sum)}};
    if (is_last && lane_index() == 0) store_relaxed(slot_state(list, worker, row), words);
  }
};

} // namespace quantkv
