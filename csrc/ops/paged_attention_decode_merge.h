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

// Adds row `row` of the slots of `count` workers, first, first + step .., channels 4 * run .. + 4 of it, to `state`, and
// empties them. All lanes of a warp take the same row, and call this; a lane that is not `inside` only follows. `is_last`:
// no more channels of this row are to come. False: a slot was never filled.
template <int kAtOnce>
QKV_DEVICE bool merge_slots(MergeState &state, const WorkList &list, int32_t first, int32_t step, int32_t count, int32_t row, int32_t run,
                            bool inside, bool is_last) {
  QKV_NO_UNROLL
  for (int32_t base = 0; base < count; base += kAtOnce) {
    Words<2> states[kAtOnce];
    Words<4> values[kAtOnce];
    bool missing = true;
    QKV_NO_UNROLL
    for (int look = 0; look < kMostLooks && missing; look++) {
      uint32_t most = 0;
      QKV_UNROLL
      for (int i = 0; i < kAtOnce; i++) {
        // Beyond the last one the last again, which does not count then.
        const int32_t worker = first + smaller_of(base + i, count - 1) * step;
        states[i] = load_relaxed(slot_state(list, worker, row));
        values[i] = load_relaxed(slot_values(list, worker, row) + run);
      }
      QKV_UNROLL
      for (int i = 0; i < kAtOnce; i++) {
        QKV_UNROLL
        for (int j = 0; j < 4; j++) most = larger_unsigned(most, values[i].w[j]);
        most = larger_unsigned(most, larger_unsigned(states[i].w[0], states[i].w[1]));
      }
      missing = any(inside && most == kNotThere);
    }
    if (missing) return false;

    float top = state.max, max[kAtOnce];
    QKV_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      max[i] = base + i < count ? float_of(states[i].w[0]) : negative_infinity();
      top = maximum(top, max[i]);
    }
    const float rescale = softmax_rescale(state.max, top);
    state.max = top;
    state.sum *= rescale;
    QKV_UNROLL
    for (int j = 0; j < 4; j++) state.acc[j] *= rescale;
    QKV_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      const float sum = base + i < count ? float_of(states[i].w[1]) : 0.0f, weight = softmax_rescale(max[i], top);
      // A piece that saw no key has no part in the result, whatever its products with zero gave.
      const bool none = max[i] == negative_infinity() && sum == 0.0f;
      state.sum += sum * weight;
      QKV_UNROLL
      for (int j = 0; j < 4; j++) state.acc[j] += (none ? 0.0f : float_of(values[i].w[j])) * weight;
    }
  }
  for (int32_t i = 0; i < count; i++) {
    const int32_t worker = first + i * step;
    if (inside) store_relaxed(slot_values(list, worker, row) + run, Words<4>{{kNotThere, kNotThere, kNotThere, kNotThere}});
    if (is_last && lane_index() == 0) store_relaxed(slot_state(list, worker, row), Words<2>{{kNotThere, kNotThere}});
  }
  return true;
}

} // namespace quantkv
