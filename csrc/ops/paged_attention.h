// paged_attention: what its kernels share. How the work is cut, handed out and put together again.
//
//   group   up to queries_per_group consecutive queries of one sequence, that attend to the same keys together
//   column  a KV head and heads_per_column of the query heads that share it (all of them, if rows allow)
//   rows    of a (group, column): row r is query r / num_heads of the group and head r % num_heads of the column
//   tile    `tile` positions of a group's keys, counted from position 0; a group has at least one, empty or not
//   unit    the cost of a tile. A (group, column) is `piece_cost` units, for starting and ending it, and then one for
//           each tile; the work is the units in the order group, column, tile
//
// A worker (a block of a persistent grid: block b is worker starts[b].worker) does starts[b].units units, from the place on that
// is said there: in the order above, or with a group_step one column of every so many groups. Of a (group, column) that
// several share, worker w + 1 does what comes after worker w's. What a worker does of one (group, column) is a *piece*. A
// piece that is all of it is finished at once; another one leaves its softmax state in a slot of the workspace (two a worker:
// for its first piece and for its last one), and the pieces are combined in order by the merge kernel. A kernel that merges
// itself (_decode_merge.h) has a slot a worker, for its first piece. Which worker does what depends on the lengths and the
// device, never on timing.
//
//   plan kernel          (paged_attention_plan.h)      lengths -> groups, starts, merges
//   an attention kernel  (_decode.h, _prefill.h, _portable.h)  pieces -> outputs or states
//   merge kernel         (paged_attention_merge.h)     states -> outputs
//
// A call has up to two work lists, of sequences with few and with many query rows, each with a plan of its own.
//
// Workspace of a list, each part aligned to 256 bytes:
//   WorkGroup [max_groups]   WorkerStart [workers]   Merge [workers]
//   float values [slots, rows, value_stride]     accumulators, relative to max, without the static scale of V
//   float states [slots, rows, 2]                max (base 2) and sum
//
// The plan may be stale or garbage (plan_is_ready): whoever reads it checks it, and stops where it makes no sense.
#pragma once
#include "../core/address.h"
#include "../core/softmax.h"

namespace quantkv {

// Positions are below this, so that sums of a few of them with small numbers fit an int32_t.
constexpr int32_t kMaxPositions = 0x7fffff00;

// Query rows a block of the prefill kernel holds, and such blocks on a multiprocessor.
constexpr int32_t kPrefillRows = 64, kPrefillBlocks = 2;

// A call as kernels take it: the caller's struct and what follows from it.
struct AttentionParams {
  quantkv_paged_attention op;
  Paging paging;
  int32_t group_size; // query heads that share a KV head
  int32_t capacity;   // positions one row of the block table holds, at most kMaxPositions
  int32_t max_query_len; // no sequence has more queries
  int32_t window;     // keys a query sees at most; kMaxPositions if there is no window
  // score in base 2 = qk * score_factor, or with a cap  cap * tanh(qk * score_factor)
  float score_factor; // softmax_scale * log2(e), or softmax_scale / soft_cap
  float cap;          // soft_cap * log2(e); 0: none
};

struct alignas(16) WorkGroup {
  int64_t first_unit;     // units of one column of all groups before it
  int32_t seq;
  int32_t first_token;    // row of `query` of its first query
  int32_t num_queries;
  int32_t first_position; // of its first query; negative ones see nothing
  int32_t begin, end;     // positions that some query of it sees
};

// Where a worker begins and how far it goes: it divides nothing to find its pieces.
struct alignas(16) WorkerStart {
  int64_t units;         // it does
  int32_t group, column; // of the first
  int32_t first;         // unit of that (group, column)
  int32_t merge;         // index of the (group, column) it begins in the middle of; -1: it does not
  int32_t group_step;    // from a (group, column) that is done to the next one: as many groups on, same column; 0: the next column
  int32_t worker;
};

// A (group, column) that several workers share: what the merge kernel needs of it, and of num_pieces who merges itself.
struct alignas(16) Merge {
  int32_t first_token, num_queries;
  int32_t first_head, num_heads; // query heads of kv_head
  int32_t kv_head;
  int32_t first_worker, num_pieces; // pieces of first_worker and of those after it
  int32_t first_slot;               // of the first piece; the others are the first of their workers
};

struct WorkList {
  // Sequences with min_queries .. max_queries queries are in this list.
  int32_t min_queries, max_queries;
  int32_t tile;
  int32_t queries_per_group;
  int32_t heads_per_column;
  int32_t columns_per_kv_head; // ceil(group_size / heads_per_column)
  int32_t columns;             // num_kv_heads * columns_per_kv_head
  int32_t rows;                // queries_per_group * heads_per_column
  int32_t workers;
  int32_t piece_cost;
  int32_t min_tiles;           // a worker is not given less, unless there is not more
  int32_t max_groups;
  int32_t value_stride;        // v.head_dim, rounded up to 4
  WorkGroup *groups;
  WorkerStart *starts;
  bool merges_itself;          // the attention kernel does, and the merge kernel has nothing to do; the plan empties its slots
  Merge *merges;               // [w]: of the shared (group, column) whose first tiles worker w does; no pieces: none
  float *values;
  float *states;
};

// A word of a slot that nobody has written, for kernels that merge themselves: between calls all are.
constexpr uint32_t kNotThere = 0xffffffffu;

constexpr int kMaxWorkLists = 2;

// For kernels that treat all lists alike; lists beyond the grid are not looked at.
struct AttentionLists {
  AttentionParams params;
  WorkList lists[kMaxWorkLists];
};

// How blocks hold the rows of a head: each row side by side, or as vLLM packed them, K in runs of 16 bytes of all slots, V in
// runs of all slots a channel.
enum class Order { Rows, Packed };

// What a worker does in one go.
struct Piece {
  int32_t seq;
  int32_t first_token;    // row of `query` of the first query
  int32_t num_queries;
  int32_t first_position; // of the first query
  int32_t kv_head;
  int32_t first_head;     // query heads first_head .. first_head + num_heads
  int32_t num_heads;
  int32_t begin, end;     // positions to attend to; begin / tile .. is tile aligned but for the first visible key
  int32_t slot;           // where the state goes; -1: the piece is all there is, finish it
  int32_t merge;          // index of the merge it is a piece of; -1: none

  QKV_DEVICE int rows() const { return num_queries * num_heads; }
  // row / num_heads, without a division of integers, which takes long: both are small, and the quotient's error far below 0.5 / num_heads.
  QKV_DEVICE int query_of(int row) const {
    if (num_queries == 1) return 0;
    return static_cast<int>((static_cast<float>(row) + 0.5f) * divide(1.0f, static_cast<float>(num_heads)));
  }
};

QKV_DEVICE int32_t smaller_of(int32_t a, int32_t b) { return a < b ? a : b; }
QKV_DEVICE int32_t larger_of(int32_t a, int32_t b) { return a > b ? a : b; }
QKV_DEVICE uint32_t larger_unsigned(uint32_t a, uint32_t b) { return a > b ? a : b; }

QKV_DEVICE int32_t tiles_of(const WorkGroup &group, int32_t tile) {
  return larger_of(1, (group.end + tile - 1) / tile - group.begin / tile);
}

// Of one column.
QKV_DEVICE int32_t units_of(const WorkGroup &group, const WorkList &list, int32_t tile) { return tiles_of(group, tile) + list.piece_cost; }
QKV_DEVICE int32_t units_of(const WorkGroup &group, const WorkList &list) { return units_of(group, list, list.tile); }

// The query heads of a column.
struct ColumnHeads {
  int32_t kv_head, first_head, num_heads;

  QKV_DEVICE ColumnHeads(const AttentionParams &params, const WorkList &list, int32_t column)
      : kv_head(list.columns_per_kv_head == 1 ? column : column / list.columns_per_kv_head) {
    int32_t in_group = (column - kv_head * list.columns_per_kv_head) * list.heads_per_column;
    first_head = kv_head * params.group_size + in_group;
    num_heads = smaller_of(list.heads_per_column, params.group_size - in_group);
  }
};

// Whether the group is one that the plan of this call could hold.
QKV_DEVICE bool is_sound(const AttentionParams &params, const WorkList &list, const WorkGroup &group) {
  return group.seq >= 0 && group.seq < params.op.num_seqs && group.first_token >= 0 && group.num_queries > 0 &&
         group.num_queries <= list.queries_per_group &&
         group.first_token <= params.op.num_tokens - group.num_queries &&
         group.first_position >= -list.queries_per_group && group.first_position <= params.capacity &&
         group.begin >= 0 && group.begin <= group.end && group.end <= params.capacity;
}

// The pieces of one worker. Every thread of the block steps through them alike.
//
//   WorkIterator work(params, list, block_index_x());
//   for (Piece piece; work.next(piece);) ...
struct WorkIterator {
  const AttentionParams &params;
  const WorkList &list;
  WorkerStart place; // of what is left
  bool is_first;

  QKV_DEVICE WorkIterator(const AttentionParams &params, const WorkList &list, int block)
      : params(params), list(list), place(list.starts[block]), is_first(true) {}

  // One that has given a piece, and how far it had come.
  QKV_DEVICE WorkIterator(const AttentionParams &params, const WorkList &list, const WorkerStart &place)
      : params(params), list(list), place(place), is_first(false) {}

  // kTile: that of the list, where it is known; divisions cost.
  template <int kTile = 0> QKV_DEVICE bool next(Piece &piece) {
    const int32_t tile = kTile > 0 ? kTile : list.tile;
    int64_t &units = place.units;
    int32_t &group = place.group, &column = place.column, &first = place.first;
    while (units > 0 && group >= 0 && group < list.max_groups) {
      const WorkGroup found = list.groups[group];
      if (!is_sound(params, list, found)) return false;
      const int32_t cost = units_of(found, list, tile), tiles = cost - list.piece_cost;
      if (column < 0 || column >= list.columns || first < 0 || first >= cost) return false;
      const int32_t stop = units < cost - first ? first + static_cast<int32_t>(units) : cost;
      const int32_t first_tile = larger_of(0, first - list.piece_cost), end_tile = larger_of(0, stop - list.piece_cost);
      const ColumnHeads heads(params, list, column);
      units -= stop - first;
      first = stop;
      if (stop == cost) {
        first = 0;
        if (place.group_step > 0) {
          group += smaller_of(place.group_step, list.max_groups - group);
        } else if (++column == list.columns) {
          column = 0;
          group++;
        }
      }
      if (first_tile == end_tile) continue; // of the cost alone

      piece.seq = found.seq;
      piece.first_token = found.first_token;
      piece.num_queries = found.num_queries;
      piece.first_position = found.first_position;
      piece.kv_head = heads.kv_head;
      piece.first_head = heads.first_head;
      piece.num_heads = heads.num_heads;
      const int32_t origin = found.begin / tile;
      piece.begin = larger_of(found.begin, (origin + first_tile) * tile);
      // The last tile may end past the largest int32_t.
      piece.end = end_tile == tiles ? found.end : (origin + end_tile) * tile;
      const bool is_whole = end_tile - first_tile == tiles;
      if (place.worker < 0 || place.worker >= list.workers) return false;
      piece.slot = is_whole ? -1 : 2 * place.worker + (is_first ? 0 : 1);
      piece.merge = is_whole ? -1 : first_tile == 0 ? place.worker : place.merge;
      if (piece.merge >= list.workers) return false;
      is_first = false;
      return true;
    }
    return false;
  }
};

// The same in shared memory, for kernels that have no registers for it: one thread steps, all read the piece.
struct SharedWork {
  WorkerStart place;
  bool started, found;
  Piece piece;

  // To be called by all threads of the block; two barriers. The first call has `is_first`.
  QKV_DEVICE bool next(const AttentionParams &params, const WorkList &list, bool is_first) {
    return next(params, list, is_first, thread_index() == 0, [] { sync_threads(); });
  }

  // The same for some warps of the block: `sync` is their barrier, one thread of theirs `steps`. `worker`: the block's number.
  template <class Sync>
  QKV_DEVICE bool next(const AttentionParams &params, const WorkList &list, bool is_first, bool steps, Sync sync, int worker = block_index_x()) {
    sync();
    if (steps) {
      WorkIterator work = is_first ? WorkIterator(params, list, worker) : WorkIterator(params, list, place);
      if (!is_first) work.is_first = !started;
      found = work.next(piece);
      started = !work.is_first;
      place = work.place;
    }
    sync();
    return found;
  }
};

// Block of the positions logical_block << block_shift and on, or -1 and a fault if the table names none of the cache.
// logical_block < block_table_stride.
QKV_DEVICE int32_t block_of(const AttentionParams &params, int32_t seq, int32_t logical_block) {
  int32_t block = params.op.block_tables[seq * params.op.block_table_stride + logical_block];
  return checked_block(params.paging, block) ? block : -1;
}

// Positions a query at `position` sees: first .. last, if any.
struct Visible {
  int32_t first, last;
  QKV_DEVICE bool operator()(int32_t key) const { return key >= first && key <= last; }
};
QKV_DEVICE Visible visible_to(const AttentionParams &params, int32_t position) {
  return {position + 1 - params.window, position};
}

// The score in base 2, but for ALiBi's bias: slope * log2(e) * (key - position).
QKV_DEVICE float score_of(const AttentionParams &params, float qk) {
  float score = qk * params.score_factor;
  return params.cap == 0.0f ? score : params.cap * tanh_of(score);
}
QKV_DEVICE float alibi_slope(const AttentionParams &params, int32_t head) {
  return params.op.alibi_slopes == nullptr ? 0.0f : params.op.alibi_slopes[head] * kLog2E;
}

// The static scale of a half; 1 for unquantized formats.
QKV_DEVICE float static_scale(const quantkv_half &half, int32_t kv_head, int32_t channel) {
  return is_quantized(format_of(half)) ? static_scale(half.scale, kv_head, channel) : 1.0f;
}

QKV_DEVICE SoftmaxEnd end_of_row(const AttentionParams &params, int32_t head, float max, float sum) {
  return softmax_end(max, sum, params.op.sinks == nullptr ? negative_infinity() : params.op.sinks[head]);
}

QKV_DEVICE void store_lse(const AttentionParams &params, int32_t token, int32_t head, float lse) {
  if (params.op.lse != nullptr) params.op.lse[static_cast<int64_t>(token) * params.op.num_heads + head] = lse;
}

// Elements of an activation type known only at run time.
QKV_DEVICE float load_activation(const void *data, int32_t activation, int64_t index) {
  switch (static_cast<Format>(activation)) {
  case Format::F32: return static_cast<const float *>(data)[index];
  case Format::F16: return to_f32(static_cast<const f16 *>(data)[index]);
  default: return to_f32(static_cast<const bf16 *>(data)[index]);
  }
}
QKV_DEVICE void store_activation(void *data, int32_t activation, int64_t index, float value) {
  switch (static_cast<Format>(activation)) {
  case Format::F32: static_cast<float *>(data)[index] = value; break;
  case Format::F16: static_cast<f16 *>(data)[index] = to_f16(value); break;
  default: static_cast<bf16 *>(data)[index] = to_bf16(value); break;
  }
}

// Four neighbouring activations of 16 bits.
QKV_DEVICE void store_activation_x4(const quantkv_paged_attention &op, int64_t index, const float (&x)[4]) {
  uint16_t *to = static_cast<uint16_t *>(op.output.data) + index;
  Words<2> words;
  QKV_UNROLL
  for (int i = 0; i < 2; i++) {
    words.w[i] = op.activation == QUANTKV_F16 ? pack_f16(x[2 * i], x[2 * i + 1]) : pack_bf16(x[2 * i], x[2 * i + 1]);
  }
  if (reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<Words<2> *>(to) = words;
  } else {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) to[i] = static_cast<uint16_t>(words.w[i / 2] >> 16 * (i % 2));
  }
}

// Accumulators of a row in a slot, value_stride floats; and its max and sum. There are fewer than 2^32 floats.
QKV_DEVICE float *partial_values(const WorkList &list, int32_t slot, int32_t row) {
  return list.values + static_cast<uint32_t>(slot * list.rows + row) * static_cast<uint32_t>(list.value_stride);
}
QKV_DEVICE void store_partial_state(const WorkList &list, int32_t slot, int32_t row, float max, float sum) {
  float *state = list.states + (static_cast<int64_t>(slot) * list.rows + row) * 2;
  state[0] = max;
  state[1] = sum;
}

} // namespace quantkv
