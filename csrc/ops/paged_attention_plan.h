// paged_attention's plan: lengths to groups, shares of workers, and what is to be merged. Once a step, for all layers.
//
// One block a work list. It goes through the sequences kPlanThreads at a time, and through the groups of those the
// same way; prefix sums over the block give every group its place and the units before it. Then each worker's share
// is a division, and its first group a binary search; or, where groups are about alike, all get the same number of pieces.
//
// What nobody has checked is checked here: query starts that decrease, leave the rows, reach back into rows claimed
// before or are too far apart make a sequence be skipped, lengths are clamped to the block table; both set a fault.
#pragma once
#include "paged_attention.h"

namespace quantkv {

constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / kWarp;

QKV_DEVICE int64_t shuffle_up_64(int64_t value, int delta) {
  uint32_t low = shuffle_up(static_cast<uint32_t>(value), delta);
  uint32_t high = shuffle_up(static_cast<uint32_t>(value >> 32), delta);
  return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
}

QKV_DEVICE int64_t shuffle_64(int64_t value, int lane) {
  uint32_t low = shuffle(static_cast<uint32_t>(value), lane), high = shuffle(static_cast<uint32_t>(value >> 32), lane);
  return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
}

// The sum of `value` over the threads before this one, and over all. Two barriers.
QKV_DEVICE int64_t block_prefix(int64_t value, int64_t *warp_sums /* shared [kPlanWarps] */, int64_t &total) {
  int64_t sum = value;
  QKV_UNROLL
  for (int delta = 1; delta < kWarp; delta *= 2) {
    int64_t before = shuffle_up_64(sum, delta);
    if (lane_index() >= delta) sum += before;
  }
  if (lane_index() == kWarp - 1) warp_sums[warp_index()] = sum;
  sync_threads();
  // Every warp adds the warps' sums up, one a lane.
  static_assert(kPlanWarps <= kWarp, "a lane has one sum");
  int64_t warps = lane_index() < kPlanWarps ? warp_sums[lane_index()] : 0;
  QKV_UNROLL
  for (int delta = 1; delta < kPlanWarps; delta *= 2) {
    const int64_t before = shuffle_up_64(warps, delta);
    if (lane_index() >= delta) warps += before;
  }
  total = shuffle_64(warps, kPlanWarps - 1);
  const int64_t through = shuffle_64(warps, warp_index()), own = warp_sums[warp_index()];
  sync_threads();
  return through - own + sum - value;
}

// kPlanThreads sequences, one a thread.
struct SequenceBatch {
  int32_t first[kPlanThreads], last[kPlanThreads]; // query rows; an empty range if it is to be skipped
  int32_t length[kPlanThreads];                    // cached tokens
  int64_t groups_before[kPlanThreads];             // of the batch
  int64_t first_units[kPlanThreads];               // of the first groups, so that most searches stay on the chip
  int64_t warp_sums[kPlanWarps];
  int32_t claimed; // rows below belong to sequences before
  int32_t is_bad;  // whether some query start is
  int32_t largest[kPlanWarps]; // units of a warp's longest group
};

// Whether a sequence may have the rows `first` .. `last`, where those below `claimed` are others'.
QKV_DEVICE bool rows_are_good(const AttentionParams &params, int32_t claimed, int32_t first, int32_t last) {
  return first >= claimed && first <= last && last <= params.op.num_tokens && last - first <= params.max_query_len;
}

// Reads the query starts of sequences base .. base + kPlanThreads and makes bad ranges empty. A range counts as bad
// only against good ones before it, so that one thread walks the batch if it holds any bad one.
QKV_DEVICE void read_query_starts(const AttentionParams &params, int64_t base, SequenceBatch &batch) {
  int thread = thread_index();
  int64_t seq = base + thread;
  int32_t first = 0, last = 0, claimed = batch.claimed;
  if (thread == 0) batch.is_bad = 0;
  sync_threads();
  if (seq < params.op.num_seqs) {
    first = params.op.query_starts[seq];
    last = params.op.query_starts[seq + 1];
    if (!rows_are_good(params, claimed, first, last)) batch.is_bad = 1;
  }
  batch.first[thread] = first;
  batch.last[thread] = last;
  sync_threads();
  int count = params.op.num_seqs - base < kPlanThreads ? static_cast<int>(params.op.num_seqs - base) : kPlanThreads;
  if (thread == 0) {
    if (batch.is_bad) {
      for (int i = 0; i < count; i++) {
        if (rows_are_good(params, claimed, batch.first[i], batch.last[i])) {
          claimed = batch.last[i];
        } else {
          batch.first[i] = batch.last[i] = 0;
        }
      }
      set_fault(params.paging.faults, QUANTKV_FAULT_QUERY_START);
      batch.claimed = claimed;
    } else {
      batch.claimed = batch.last[count - 1];
    }
  }
  sync_threads();
}

// Group `index` of a sequence's, but for first_unit.
QKV_DEVICE WorkGroup group_of(const AttentionParams &params, const WorkList &list, int32_t seq, int32_t first_token,
                              int32_t end_token, int32_t length, int64_t index) {
  WorkGroup group = {};
  group.seq = seq;
  group.first_token = first_token + static_cast<int32_t>(index * list.queries_per_group);
  int32_t queries_left = end_token - group.first_token;
  group.num_queries = smaller_of(list.queries_per_group, queries_left);
  group.first_position = larger_of(length - queries_left, -list.queries_per_group);
  group.end = larger_of(0, group.first_position + group.num_queries);
  group.begin = smaller_of(group.end, larger_of(0, larger_of(0, group.first_position) + 1 - params.window));
  return group;
}

// The record of a (group, column) that several workers share.
QKV_DEVICE void write_merge(const AttentionParams &params, const WorkList &list, const WorkGroup &group, int32_t column,
                            int32_t first_worker, int32_t num_pieces, int32_t first_slot) {
  const ColumnHeads heads(params, list, column);
  Merge merge = {};
  merge.first_token = group.first_token;
  merge.num_queries = group.num_queries;
  merge.first_head = heads.first_head;
  merge.num_heads = heads.num_heads;
  merge.kv_head = heads.kv_head;
  merge.first_worker = first_worker;
  merge.num_pieces = num_pieces;
  merge.first_slot = first_slot;
  list.merges[first_worker] = merge;
}

// Groups of about the same length are shared out evenly: every (group, column) in the same number of pieces, or several whole
// ones a worker. Pieces then begin together, and all heads of a sequence are read at a time.
struct EvenShares {
  int32_t pieces; // of a (group, column), each a worker's; 0: not to be shared out like this
  int32_t groups; // or so many whole ones a worker, of one column

  // Groups that workers begin with.
  QKV_DEVICE int32_t starts(int32_t num_groups) const { return (num_groups + groups - 1) / groups; }
};

constexpr int kMostEvenGroups = 16, kEvenTolerance = 32; // the longest share may be 1/32 longer than otherwise

// `largest`: units of the longest group; `share`: those of a worker otherwise.
QKV_DEVICE EvenShares even_shares(const WorkList &list, int32_t num_groups, int64_t share, int32_t largest) {
  const int64_t pairs = static_cast<int64_t>(num_groups) * list.columns;
  EvenShares even = {1, 1};
  int64_t cost;
  if (pairs > list.workers) {
    const int64_t groups = (pairs + list.workers - 1) / list.workers;
    if (groups > kMostEvenGroups) return {0, 0};
    even.groups = static_cast<int32_t>(groups);
    if (even.starts(num_groups) * list.columns > list.workers) return {0, 0};
    cost = groups * largest;
  } else {
    const int32_t tiles = largest - list.piece_cost;
    even.pieces = smaller_of(list.workers / static_cast<int32_t>(pairs), larger_of(tiles / list.min_tiles, 1));
    cost = (tiles + even.pieces - 1) / even.pieces + list.piece_cost;
  }
  // Other shares begin and end anywhere, a piece more each.
  return cost * kEvenTolerance <= (share + list.piece_cost) * (kEvenTolerance + 1) ? even : EvenShares{0, 0};
}

// Puts down a worker's start for the block that is to be it. A kernel that merges itself has workers wait for workers after them,
// so of the `busy` ones the last is block 0, which begins first.
QKV_DEVICE void write_start(const WorkList &list, int32_t worker, int64_t busy, WorkerStart start) {
  start.worker = worker;
  list.starts[list.merges_itself && worker < busy ? busy - 1 - worker : worker] = start;
}

// The worker's part of that, and where it is the first of several, their record.
QKV_DEVICE void even_start(const AttentionParams &params, const WorkList &list, int32_t num_groups, const EvenShares &even, int32_t worker) {
  WorkerStart start = {};
  start.merge = -1;
  const int32_t pair = worker / even.pieces, piece = worker - pair * even.pieces, starts = even.starts(num_groups);
  const int32_t group = pair / list.columns, column = pair - group * list.columns;
  if (group < starts) {
    const WorkGroup found = list.groups[group];
    start.group = group;
    start.column = column;
    const int32_t tiles = tiles_of(found, list.tile), pieces = smaller_of(even.pieces, tiles);
    if (even.pieces == 1) {
      start.group_step = starts;
      start.units = units_of(found, list);
      for (int32_t other = group + starts; other < num_groups; other += starts) start.units += units_of(list.groups[other], list);
    } else if (piece < pieces) {
      const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(tiles) * piece / pieces);
      const int32_t end = static_cast<int32_t>(static_cast<int64_t>(tiles) * (piece + 1) / pieces);
      start.first = piece == 0 ? 0 : list.piece_cost + begin;
      start.units = list.piece_cost + end - start.first;
      start.merge = piece == 0 ? -1 : worker - piece;
      if (piece == 0 && pieces > 1) write_merge(params, list, found, column, worker, pieces, 2 * worker);
    }
  }
  write_start(list, worker, static_cast<int64_t>(starts) * list.columns * even.pieces, start);
}

// The share of each worker and the pieces to be merged. `units` > 0.
QKV_DEVICE void hand_out(const AttentionParams &params, const WorkList &list, int32_t num_groups, int64_t units,
                         int32_t largest, const int64_t *first_units /* shared [kPlanThreads] */) {
  int64_t most = units / list.min_tiles;
  int64_t busy = most < 1 ? 1 : most < list.workers ? most : list.workers;
  const EvenShares even = list.merges_itself ? even_shares(list, num_groups, units / busy, largest) : EvenShares{0, 0};
  if (even.pieces > 0) {
    for (int32_t worker = thread_index(); worker < list.workers; worker += kPlanThreads) even_start(params, list, num_groups, even, worker);
    return;
  }
  for (int32_t worker = thread_index(); worker < list.workers; worker += kPlanThreads) {
    if (worker >= busy) {
      write_start(list, worker, busy, WorkerStart{});
      continue;
    }
    const int64_t unit = worker * units / busy, next_unit = (worker + 1) * units / busy;
    // The last group that begins at this unit or before.
    int32_t group = 0, beyond = num_groups;
    while (beyond - group > 1) {
      int32_t middle = group + (beyond - group) / 2;
      int64_t first;
      if (middle < kPlanThreads) {
        // Behind forget(), or clang chooses between addresses, which are then generic ones.
        const int32_t *words = reinterpret_cast<const int32_t *>(&first_units[middle]);
        const uint32_t low = static_cast<uint32_t>(forget(words[0])), high = static_cast<uint32_t>(forget(words[1]));
        first = static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
      } else {
        first = list.groups[middle].first_unit;
      }
      if (first * list.columns <= unit) {
        group = middle;
      } else {
        beyond = middle;
      }
    }
    const WorkGroup found = list.groups[group];
    const int64_t size = units_of(found, list), local = unit - found.first_unit * list.columns;
    const int64_t column = local / size, column_start = unit - local + column * size;
    const int64_t tiles_start = column_start + list.piece_cost;
    // The last worker that begins at `at` or before: worker * units / busy <= at, rounded down.
    const auto worker_at = [&](int64_t at) { return static_cast<int32_t>(((at + 1) * busy + units - 1) / units - 1); };
    const int32_t first = worker_at(tiles_start);
    WorkerStart start = {};
    start.units = next_unit - unit;
    start.group = group;
    start.column = static_cast<int32_t>(column);
    start.first = static_cast<int32_t>(unit - column_start);
    start.merge = tiles_start < unit ? first : -1;
    write_start(list, worker, busy, start);

    // The second worker of a (group, column) writes its record.
    if (tiles_start < unit && first == worker - 1) {
      write_merge(params, list, found, static_cast<int32_t>(column), first, worker_at(column_start + size - 1) - first + 1,
                  2 * first + (first * units / busy < column_start ? 1 : 0));
    }
  }
}

// Empties the slots of kernels that merge themselves: block `part` of `parts`.
QKV_DEVICE void empty_slots(const WorkList &list, int32_t part, int32_t parts) {
  if (!list.merges_itself) return;
  const Words<4> nothing = {{kNotThere, kNotThere, kNotThere, kNotThere}};
  const int64_t rows = static_cast<int64_t>(list.workers) * list.rows, values = rows * list.value_stride / 4;
  for (int64_t i = part * kPlanThreads + thread_index(); i < values; i += static_cast<int64_t>(parts) * kPlanThreads) {
    reinterpret_cast<Words<4> *>(list.values)[i] = nothing;
    if (2 * i < rows) reinterpret_cast<Words<4> *>(list.states)[i] = nothing; // two rows'; parts end on 256 bytes
  }
}

// Grid: lists, 1 and then a block for each kSlotBytes to empty, kSlotBlocks at most; the first row plans, the others empty slots
// meanwhile.
constexpr int kSlotBlocks = 16, kSlotBytes = 1 << 16;

QKV_KERNEL void QKV_LAUNCH_BOUNDS(kPlanThreads, 1) plan_attention(AttentionLists call) {
  QKV_SHARED(SequenceBatch, batches, 1);
  SequenceBatch &batch = batches[0];
  const AttentionParams &params = call.params;
  const WorkList list = call.lists[block_index_x()];
  int thread = thread_index();
  // The kernel after this one may come, to wait: it reads nothing before this one has ended.
  allow_next_kernel();
  wait_for_previous_kernel();
  if (block_index_y() > 0) {
    empty_slots(list, block_index_y() - 1, grid_size_y() - 1);
    return;
  }
  if (thread == 0) {
    batch.claimed = 0;
  }
  for (int32_t worker = thread; worker < list.workers; worker += kPlanThreads) {
    list.merges[worker].num_pieces = 0;
  }
  sync_threads();

  int64_t num_groups = 0, num_units = 0;
  int32_t largest = 0; // units of this thread's groups
  for (int64_t base = 0; base < params.op.num_seqs; base += kPlanThreads) {
    const int32_t given = base + thread < params.op.num_seqs ? params.op.seq_lens[base + thread] : 0;
    read_query_starts(params, base, batch);
    int32_t queries = batch.last[thread] - batch.first[thread], length = 0;
    if (queries > 0) {
      length = smaller_of(larger_of(given, 0), params.capacity);
      if (length != given) set_fault(params.paging.faults, QUANTKV_FAULT_SEQ_LEN);
    }
    bool is_ours = queries > 0 && queries >= list.min_queries && queries <= list.max_queries;
    int64_t groups = is_ours ? (queries - 1) / list.queries_per_group + 1 : 0, batch_groups = 0;
    batch.length[thread] = length;
    batch.groups_before[thread] = block_prefix(groups, batch.warp_sums, batch_groups);
    sync_threads();

    for (int64_t group_base = 0; group_base < batch_groups; group_base += kPlanThreads) {
      int64_t index = group_base + thread, units = 0, new_units = 0;
      WorkGroup group = {};
      if (index < batch_groups) {
        // The last sequence whose groups begin at this one or before.
        int i = 0, beyond = kPlanThreads;
        while (beyond - i > 1) {
          int middle = (i + beyond) / 2;
          if (batch.groups_before[middle] <= index) {
            i = middle;
          } else {
            beyond = middle;
          }
        }
        group = group_of(params, list, static_cast<int32_t>(base + i), batch.first[i], batch.last[i], batch.length[i],
                         index - batch.groups_before[i]);
        units = units_of(group, list);
        largest = larger_of(largest, static_cast<int32_t>(units));
      }
      group.first_unit = num_units + block_prefix(units, batch.warp_sums, new_units);
      if (index < batch_groups && num_groups + index < list.max_groups) list.groups[num_groups + index] = group;
      if (index < batch_groups && num_groups + index < kPlanThreads) batch.first_units[num_groups + index] = group.first_unit;
      num_units += new_units;
    }
    num_groups += batch_groups;
    sync_threads();
  }

  QKV_UNROLL
  for (int mask = 1; mask < kWarp; mask *= 2) largest = larger_of(largest, static_cast<int32_t>(shuffle_xor(static_cast<uint32_t>(largest), mask)));
  if (lane_index() == 0) batch.largest[warp_index()] = largest;
  sync_threads();
  largest = batch.largest[lane_index() % kPlanWarps];
  QKV_UNROLL
  for (int mask = 1; mask < kWarp; mask *= 2) largest = larger_of(largest, static_cast<int32_t>(shuffle_xor(static_cast<uint32_t>(largest), mask)));
  if (num_groups > 0) {
    hand_out(params, list, static_cast<int32_t>(num_groups), num_units * list.columns, largest, batch.first_units);
  } else {
    for (int32_t worker = thread; worker < list.workers; worker += kPlanThreads) write_start(list, worker, 0, WorkerStart{});
  }
}

} // namespace quantkv
