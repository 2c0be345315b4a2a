// gather: paged to dense, dequantized or as raw codes.
//
//   for sequence s, row r of cu_seq_lens[s] .. cu_seq_lens[s+1]:   position = starts[s] + r - cu_seq_lens[s]
//     block = block_tables[s, position / block_size];   output[r, h, :] = cache[block, h, position % block_size, :]
//
// A block of threads owns tiles of consecutive output rows. It first finds where each comes from (GatherTile), then
// copies as cache_write does: in vectors of 8 channels, or element by element.
//
// A position outside the table and a block outside the cache give a row of zeros and a fault. A sequence whose bounds
// decrease, pass num_tokens or reach back into rows an earlier one has claimed is skipped with a fault; rows that none
// claims stay as they are. That rule is sequential: whether it matters, every block finds out by looking at all
// bounds at once, and only if it does are they walked through in order.
#pragma once
#include "../core/rows.h"

namespace quantkv {

constexpr int kMaxTile = 32;
constexpr int kGatherTokens = 2; // a thread has in flight

struct GatherParams {
  quantkv_gather op;
  Paging paging;
  RowShare share;
  int32_t tile; // output rows of a block's turn, at most kMaxTile
};

// Where the rows of a tile come from.
struct GatherTile {
  int32_t seq[kMaxTile];   // -1: no sequence claims it
  int32_t first[kMaxTile]; // the sequence's first output row
  int32_t block[kMaxTile]; // -1: zeros
  int32_t slot[kMaxTile];
  int32_t is_malformed;    // of the bounds, all of them
};

QKV_DEVICE void check_bounds(const quantkv_gather &op, uint32_t *faults, GatherTile &tile) {
  if (thread_index() == 0) tile.is_malformed = 0;
  sync_threads();
  bool malformed = false;
  for (int64_t i = thread_index(); i < op.num_seqs; i += block_threads()) {
    const int32_t start = op.cu_seq_lens[i], end = op.cu_seq_lens[i + 1];
    malformed |= start < 0 || end < start || end > op.num_tokens;
  }
  if (malformed) tile.is_malformed = 1; // whoever writes it writes the same
  sync_threads();
  if (tile.is_malformed && block_index_x() == 0 && thread_index() == 0) set_fault(faults, QUANTKV_FAULT_QUERY_START);
}

// The sequence of an output row, by bisection of bounds that do not decrease; -1 if there is none.
QKV_DEVICE int32_t sequence_of(const quantkv_gather &op, int64_t row) {
  int64_t low = 0, high = op.num_seqs + 1; // the first bound past `row` lies in low ..= high
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (op.cu_seq_lens[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low >= 1 && low <= op.num_seqs ? static_cast<int32_t>(low - 1) : -1;
}

// The same for all rows of a tile, of any bounds, by one thread.
QKV_DEVICE void claim_in_order(const quantkv_gather &op, int64_t first_row, int count, GatherTile &tile) {
  int64_t unclaimed = 0;
  for (int64_t seq = 0; seq < op.num_seqs && unclaimed < first_row + count; seq++) {
    const int64_t start = op.cu_seq_lens[seq], end = op.cu_seq_lens[seq + 1];
    if (start < unclaimed || end < start || end > op.num_tokens) continue;
    unclaimed = end;
    for (int64_t row = start < first_row ? first_row : start; row < end && row < first_row + count; row++) {
      tile.seq[row - first_row] = static_cast<int32_t>(seq);
      tile.first[row - first_row] = static_cast<int32_t>(start);
    }
  }
}

// Fills the tile; barriers around it are inside.
QKV_DEVICE void locate_rows(const GatherParams &p, int64_t first_row, int count, GatherTile &tile) {
  const quantkv_gather &op = p.op;
  const int t = thread_index();
  sync_threads(); // the tile before is done with
  if (t < kMaxTile) tile.seq[t] = -1;
  if (tile.is_malformed) {
    sync_threads();
    if (t == 0) claim_in_order(op, first_row, count, tile);
    sync_threads();
  } else if (t < count) {
    tile.seq[t] = sequence_of(op, first_row + t);
    tile.first[t] = tile.seq[t] < 0 ? 0 : op.cu_seq_lens[tile.seq[t]];
  }
  if (t < count && tile.seq[t] >= 0) {
    const int64_t seq = tile.seq[t], start = op.starts == nullptr ? 0 : op.starts[seq];
    const int64_t position = start + first_row + t - tile.first[t];
    const int64_t logical = position >> p.paging.block_shift;
    tile.block[t] = -1;
    tile.slot[t] = static_cast<int32_t>(position & (p.paging.block_size() - 1));
    if (position < 0 || logical >= op.block_table_stride) {
      set_fault(p.paging.faults, QUANTKV_FAULT_SEQ_LEN);
    } else {
      const int32_t block = op.block_tables[seq * op.block_table_stride + logical];
      if (checked_block(p.paging, block)) tile.block[t] = block;
    }
  }
  sync_threads();
}

// What becomes of a row of codes: activations of format A, or the codes themselves (kRaw; A is of no account).
template <bool kRaw, Format A, Format F> constexpr Format kOutput = kRaw ? F : A;

template <bool kRaw, Format A>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 3) gather_vectors(const GatherParams p) {
  QKV_SHARED(GatherTile, tile, 1);
  wait_for_previous_kernel();
  check_bounds(p.op, p.paging.faults, *tile);

  const RowPlace place(p.share);
  const bool is_key = place.row < p.paging.num_kv_heads;
  const int head = is_key ? place.row : place.row - p.paging.num_kv_heads;
  const quantkv_half half = choose_half(p.op.cache, is_key);
  const quantkv_rows to = choose_rows(p.op.key, p.op.value, is_key);
  const int side = p.share.side, first_token = place.row < p.share.rows ? place.side_token : kMaxTile;

  for (int64_t first = static_cast<int64_t>(block_index_x()) * p.tile; first < p.op.num_tokens;
       first += static_cast<int64_t>(grid_size_x()) * p.tile) {
    const int count = p.op.num_tokens - first < p.tile ? static_cast<int>(p.op.num_tokens - first) : p.tile;
    locate_rows(p, first, count, *tile);
    dispatch_format(format_of(half), [&](auto tag) {
      constexpr Format F = decltype(tag)::value;
      constexpr Format Out = kOutput<kRaw, A, F>;
      constexpr bool kScaled = is_quantized(F) && !kRaw;
      for (int channel = place.lane * kVector; channel < half.head_dim; channel += p.share.lanes() * kVector) {
        const char *column = static_cast<const char *>(half.codes) +
                             (row_index(half.map, 0, head, 0) + channel_index(half, channel)) * bytes_of(F);
        char *out = static_cast<char *>(to.data) + (row_index(to, first, head) + channel) * bytes_of(Out);
        float fixed[kVector];
        QKV_UNROLL
        for (int i = 0; i < kVector; i++) {
          fixed[i] = kScaled && first_token < count ? static_scale(half.scale, head, channel + i) : 1.0f;
        }
        for (int t = first_token; t < count; t += kGatherTokens * side) {
          Vector<F> codes[kGatherTokens];
          float dynamic[kGatherTokens];
          QKV_UNROLL
          for (int i = 0; i < kGatherTokens; i++) {
            const int token = t + i * side;
            codes[i] = zero_vector<F>();
            dynamic[i] = 1.0f;
            if (token < count && tile->seq[token] >= 0 && tile->block[token] >= 0) {
              const int64_t block = tile->block[token];
              const int64_t at = row_index(half.map, block, 0, tile->slot[token]);
              codes[i] = stream_vector<F>(column + at * bytes_of(F));
              if (kScaled && half.dynamic != nullptr) {
                dynamic[i] = half.dynamic[dynamic_scale_index(p.paging, block, head, tile->slot[token])];
              }
            }
          }
          QKV_UNROLL
          for (int i = 0; i < kGatherTokens; i++) {
            const int token = t + i * side;
            if (token >= count || tile->seq[token] < 0) continue;
            char *const row = out + row_index(to, token, 0) * bytes_of(Out);
            if constexpr (kRaw) {
              store_vector(row, codes[i]);
            } else if (tile->block[token] < 0) {
              store_vector(row, zero_vector<Out>());
            } else {
              float scale[kVector];
              QKV_UNROLL
              for (int n = 0; n < kVector; n++) {
                scale[n] = half.dynamic == nullptr ? fixed[n] : combined_scale(fixed[n], dynamic[i]);
              }
              store_vector(row, from_stored_vector<Out>(codes[i], scale));
            }
          }
        }
      }
    });
  }
}

// A warp a row, an element a lane: any stride, alignment, chunk and head dim.
template <bool kRaw, Format A>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) gather_elements(const GatherParams p) {
  QKV_SHARED(GatherTile, tile, 1);
  wait_for_previous_kernel();
  check_bounds(p.op, p.paging.faults, *tile);
  for (int64_t first = static_cast<int64_t>(block_index_x()) * p.tile; first < p.op.num_tokens;
       first += static_cast<int64_t>(grid_size_x()) * p.tile) {
    const int count = p.op.num_tokens - first < p.tile ? static_cast<int>(p.op.num_tokens - first) : p.tile;
    locate_rows(p, first, count, *tile);
    for (int i = warp_index(); i < count * p.share.rows; i += kRowThreads / kWarp) {
      const int token = i / p.share.rows, row = i - token * p.share.rows;
      if (tile->seq[token] < 0) continue;
      const bool is_key = row < p.paging.num_kv_heads;
      const int head = is_key ? row : row - p.paging.num_kv_heads;
      const quantkv_half half = choose_half(p.op.cache, is_key);
      const quantkv_rows to = choose_rows(p.op.key, p.op.value, is_key);
      const int64_t block = tile->block[token];
      const int slot = tile->slot[token];
      dispatch_format(format_of(half), [&](auto tag) {
        constexpr Format F = decltype(tag)::value;
        using Out = Stored<kOutput<kRaw, A, F>>;
        Out *out = static_cast<Out *>(to.data) + row_index(to, first + token, head);
        RowScale scale = {1.0f, nullptr, 0, 0.0f};
        if (is_quantized(F) && !kRaw && block >= 0) {
          scale = static_row_scale(half.scale, head);
          if (half.dynamic != nullptr) {
            scale = with_dynamic(scale, half.dynamic[dynamic_scale_index(p.paging, block, head, slot)]);
          }
        }
        for (int d = lane_index(); d < half.head_dim; d += kWarp) {
          Out y = {};
          if (block >= 0) {
            const int64_t at = element_index(half, block, head, slot, d);
            if constexpr (kRaw) {
              y = static_cast<const Out *>(half.codes)[at];
            } else {
              y = load_element_as<Out, F>(half.codes, at, scale.at(d));
            }
          }
          out[d] = y;
        }
      });
    }
  }
}

} // namespace quantkv
