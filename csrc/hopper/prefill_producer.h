// The producers of the prefill kernel: K and V from their blocks to the slots of the ring, as f16 or bf16.
// See paged_attention_prefill.h.
#pragma once
#include "prefill_shared.h"

namespace quantkv {

#if QKV_HAS_WARPGROUP_PRODUCTS

// A producer warp has kRowsOfWarp keys of every tile, of K or of V.
QKV_DEVICE int producer_warp() { return warp_index() - kHopperConsumerWarps; }
QKV_DEVICE bool produces_keys() { return producer_warp() < kHopperWarpsOfFill; }
template <int kRowsOfWarp> QKV_DEVICE int first_produced_row() { return producer_warp() % kHopperWarpsOfFill * kRowsOfWarp; }

QKV_DEVICE uint64_t shuffle_64(uint64_t value, int lane) {
  return static_cast<uint64_t>(shuffle(static_cast<uint32_t>(value >> 32), lane)) << 32 |
         shuffle(static_cast<uint32_t>(value), lane);
}

// Where a warp's rows of K or of V lie. Lane l knows the block of rows 8 (l % kGroups) .. + 8; the table is read a tile
// ahead, and what it says is looked at when its turn comes. kBytes: of an element.
template <int kBytes, int kPanels, int kRowsOfWarp> struct RowSource {
  static constexpr int32_t kHole = -1;   // the table names no block of the cache
  static constexpr int32_t kUnseen = -2; // no query sees these rows
  static constexpr int kGroups = kRowsOfWarp / 8;
  static constexpr int kLanes = 4 * kBytes, kRowsAtOnce = kWarp / kLanes; // lanes that share the 64 channels of a panel

  const AttentionParams &params;
  const quantkv_half &half;
  int32_t begin, end;        // positions that are seen, from this warp's first row of a tile at 0 on
  const int32_t *table;      // of the sequence
  const unsigned char *head; // of block 0, where this lane's channels of its row of a panel begin
  int32_t panel_bytes[kPanels]; // the launcher sees that they fit
  int channels;               // of the head dim from this lane's first on

  QKV_DEVICE RowSource(const AttentionParams &params, const quantkv_half &half, const Piece &piece)
      : params(params), half(half), begin(piece.begin - first_produced_row<kRowsOfWarp>()), end(piece.end - first_produced_row<kRowsOfWarp>()),
        table(params.op.block_tables + piece.seq * params.op.block_table_stride) {
    const int lane = forget(lane_index()), channel = lane % kLanes * (16 / kBytes);
    head = static_cast<const unsigned char *>(half.codes) +
           (row_index(half.map, 0, piece.kv_head, lane / kLanes) + channel_index(half, channel)) * kBytes;
    channels = half.head_dim - channel;
    QKV_UNROLL
    for (int panel = 0; panel < kPanels; panel++) {
      const bool exists = 64 * panel < channels;
      const int64_t distance = channel_index(half, 64 * panel + channel) - channel_index(half, channel);
      panel_bytes[panel] = exists ? static_cast<int32_t>(distance) * kBytes : 0;
    }
  }
  QKV_DEVICE bool is_seen(int32_t tile) const {
    const int32_t at = tile + lane_index() % kGroups * 8;
    return at + 8 > begin && at < end;
  }
  QKV_DEVICE int32_t entry_of(int32_t tile) const {
    if (!is_seen(tile)) return kUnseen;
    return table[(tile + first_produced_row<kRowsOfWarp>() + lane_index() % kGroups * 8) >> params.paging.block_shift];
  }
  QKV_DEVICE int32_t block_of_entry(int32_t entry, int32_t tile) const {
    if (!is_seen(tile)) return kUnseen;
    return checked_block(params.paging, entry) ? entry : kHole;
  }
  // Starts copying the rows in the background, 16 bytes a lane: row i * kRowsAtOnce + lane / kLanes of the warp to
  // to(i, panel). Zeros where nobody sees a row, or there is none.
  template <class To> QKV_DEVICE void copy(int32_t tile, int32_t block, To to) const {
    const int32_t position = tile + first_produced_row<kRowsOfWarp>() + lane_index() % kGroups * 8;
    const int32_t slot = position & (params.paging.block_size() - 1);
    const int64_t place = block < 0 ? -1 : (block * half.map.block_stride + slot * half.map.slot_stride) * kBytes;
    const int64_t row_bytes = half.map.slot_stride * kBytes;
    const uint32_t before = static_cast<uint32_t>(begin - tile - lane_index() / kLanes);
    const uint32_t seen = static_cast<uint32_t>(end - begin);
    QKV_UNROLL
    for (int i = 0; i < kRowsOfWarp / kRowsAtOnce; i++) {
      const int row = i * kRowsAtOnce;
      const int64_t group = static_cast<int64_t>(shuffle_64(static_cast<uint64_t>(place), row / 8));
      const bool is_there = group >= 0 && static_cast<uint32_t>(row) - before < seen;
      const unsigned char *from = head + (is_there ? group + row % 8 * row_bytes : 0);
      QKV_UNROLL
      for (int panel = 0; panel < kPanels; panel++) {
        copy_async_16(to(i, panel), from + panel_bytes[panel], is_there && 64 * panel < channels);
      }
    }
  }
};

// The ring's number of tile j's K or V, of `tiles`, after the piece's first.
QKV_DEVICE uint32_t fill_of_tile(bool is_key, int32_t j, int32_t tiles) {
  const int32_t fill = is_key ? larger_of(0, 2 * j - 1) : smaller_of(2 * j + 2, 2 * tiles - 1);
  return static_cast<uint32_t>(fill);
}

// Notes blocks that are missing, a bit for each 8 rows: of K only, as its scores are masked then.
template <int kRowsOfWarp> QKV_DEVICE void store_holes(unsigned char (&holes)[4], uint32_t bits) {
  constexpr int kBytes = kRowsOfWarp / 32;
  const int lane = lane_index();
  if (lane < kBytes) {
    holes[producer_warp() * kBytes + lane] = static_cast<unsigned char>(bits >> 4 * lane & 0xf);
  }
}

// The warp says that a slot is full.
QKV_DEVICE void slot_is_full(uint64_t *full) {
  sync_warp();
  if (lane_index() == 0) phase_barrier_arrive(full);
}

// Dynamic scales of this lane's rows of a tile, lane and every 32nd after it of the warp's: K's producers look them up, and V's too, whose
// turn comes with K's. Where there is no row V's is 0.
template <int kRowsOfWarp> struct ScalesOfRows {
  static constexpr int kRows = kRowsOfWarp / kWarp;
  float k[kRows], v[kRows];

  // `block` as RowSource has it.
  template <class Source> QKV_DEVICE void read(const AttentionParams &params, const Source &source, int32_t head, int32_t tile, int32_t block) {
    const quantkv_cache &cache = params.op.cache;
    QKV_UNROLL
    for (int i = 0; i < kRows; i++) {
      const int32_t row = forget(lane_index()) + kWarp * i, own = shuffle(block, row / 8), slot = tile + first_produced_row<kRowsOfWarp>() + row;
      const bool is_there = own >= 0 && tile + row >= source.begin && tile + row < source.end;
      const int64_t index = dynamic_scale_index(params.paging, is_there ? own : 0, head, slot & (params.paging.block_size() - 1));
      k[i] = cache.k.dynamic == nullptr ? 1.0f : is_there ? cache.k.dynamic[index] : 0.0f;
      v[i] = cache.v.dynamic == nullptr ? 1.0f : is_there ? cache.v.dynamic[index] : 0.0f;
    }
  }

  template <class Scales> QKV_DEVICE void store(Scales &scales) const {
    const int thread = reread_thread_index(), first_row = (thread - kHopperConsumers) / kWarp * kRowsOfWarp + thread % kWarp;
    float top = 0.0f;
    QKV_UNROLL
    for (int i = 0; i < kRows; i++) {
      const int row = first_row + kWarp * i;
      scales.k[row] = k[i];
      scales.v[row] = v[i];
      top = maximum(top, v[i]);
    }
    QKV_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) top = maximum(top, shuffle_xor(top, mask));
    if (thread % kWarp == 0) scales.tops[first_row / kRowsOfWarp] = top;
  }
};

// Where a lane's codes come from and go to: 16 of a row, which become 32 bytes of that in a panel of 64 channels; what eight lanes store
// meets all banks.
template <class Shared> struct CodesOfRows : RowSource<1, Shared::kPanels, Shared::kRowsOfWarp> {
  using Source = RowSource<1, Shared::kPanels, Shared::kRowsOfWarp>;
  static constexpr int kLoads = Shared::kRowsOfWarp / 8 * Shared::kPanels;
  static QKV_DEVICE bool are_keys() { return produces_keys(); }

  QKV_DEVICE CodesOfRows(const AttentionParams &params, const Piece &piece)
      : Source(params, are_keys() ? params.op.cache.k : params.op.cache.v, piece) {}
  // Of the first 16 bytes of this lane's first load, in row lane / 4 of the warp's first eight, and how much further on those of others
  // are. The second 16 bytes are their neighbour.
  static QKV_DEVICE int offset() { return panel_offset(first_produced_row<Shared::kRowsOfWarp>() + lane_index() / 4, lane_index() % 4 * 2); }
  static QKV_DEVICE int offset_of(int load) { return (load % Shared::kPanels * Shared::kKeys + load / Shared::kPanels * 8) * kPanelRow; }
  QKV_DEVICE void copy(int32_t tile, int32_t block, unsigned char *codes, int stride) const {
    Source::copy(tile, block, [&](int i, int panel) { return codes + (i * Shared::kPanels + panel) * stride; });
  }
  QKV_DEVICE void drop_unseen(int32_t, unsigned char *, int) const {} // copied as zeros
};

// Those of packed V: 16 slots of a channel, which are 16 tokens of one block, and the same of every kLanes-th channel on. They become 32
// bytes of the channel's row in a panel of 64 tokens. What eight lanes copy are eight channels of a block.
template <class Shared> struct CodesOfChannels {
  static constexpr int32_t kHole = -1;
  static constexpr int kRun = 16, kLanes = kWarp / (Shared::kRowsOfWarp / kRun), kLoads = Shared::kDim / kLanes;
  static QKV_DEVICE bool are_keys() { return false; }
  static QKV_DEVICE int first_token() { return first_produced_row<Shared::kRowsOfWarp>() + forget(lane_index()) / kLanes * kRun; }

  const AttentionParams &params;
  const quantkv_half &half;
  int32_t begin, end;        // positions that are seen, from this lane's first token of a tile at 0 on
  const int32_t *table;      // of the sequence
  const unsigned char *head; // of block 0, this lane's first channel

  QKV_DEVICE CodesOfChannels(const AttentionParams &params, const Piece &piece)
      : params(params), half(params.op.cache.v), begin(piece.begin - first_token()), end(piece.end - first_token()),
        table(params.op.block_tables + piece.seq * params.op.block_table_stride) {
    head = static_cast<const unsigned char *>(half.codes) + row_index(half.map, 0, piece.kv_head, 0) +
           channel_index(half, forget(lane_index()) % kLanes);
  }
  static QKV_DEVICE int offset() {
    const int token = first_token();
    return token / 64 * (Shared::kDim * kPanelRow) + panel_offset(lane_index() % kLanes, token % 64 / 8);
  }
  static QKV_DEVICE int offset_of(int load) { return load * kLanes * kPanelRow; }
  QKV_DEVICE bool is_seen(int32_t tile) const { return tile + kRun > begin && tile < end; }
  QKV_DEVICE int32_t entry_of(int32_t tile) const { return is_seen(tile) ? table[(tile + first_token()) >> params.paging.block_shift] : kHole; }
  QKV_DEVICE int32_t block_of_entry(int32_t entry, int32_t tile) const {
    return is_seen(tile) && checked_block(params.paging, entry) ? entry : kHole;
  }
  QKV_DEVICE void copy(int32_t tile, int32_t block, unsigned char *codes, int stride) const {
    const int32_t slot = (tile + first_token()) & (params.paging.block_size() - 1);
    const unsigned char *from = head + (block < 0 ? 0 : block * half.map.block_stride + slot);
    const int64_t step = kLanes * half.map.chunk_stride;
    const int channels = half.head_dim - forget(lane_index()) % kLanes; // from this lane's first on
    QKV_UNROLL
    for (int i = 0; i < kLoads; i++, from += step) copy_async_16(codes + i * stride, from, block >= 0 && i * kLanes < channels);
  }
  // Makes zeros of tokens that nobody sees beside some that are seen: they may hold anything.
  QKV_DEVICE void drop_unseen(int32_t tile, unsigned char *codes, int stride) const {
    if (tile >= begin && tile + kRun <= end) return;
    QKV_NO_UNROLL
    for (int i = 0; i < kLoads * kRun; i++) {
      const int32_t at = tile + i % kRun;
      if (at < begin || at >= end) codes[i / kRun * stride + i % kRun] = 0;
    }
  }
};

// 8-bit codes: copied in the background, a tile ahead (or while consumers use the tile before), to where the thread that asked for
// them finds them again; then decoded to the slot. Codes: of rows or of channels.
template <class Codes, class Shared>
QKV_DEVICE void produce_codes(const AttentionParams &params, const Piece &piece, int32_t tiles, uint32_t first_fill, Shared &shared) {
  constexpr int kKeys = Shared::kKeys, kStages = Shared::kCodeStages, kLoads = Codes::kLoads, kStride = kHopperProducers * 16;
  constexpr int kAtOnce = Shared::kPanels == 4 ? 2 : 4; // for registers
  const bool is_key = Codes::are_keys();
  const Codes source(params, piece);
  const auto own_codes = [&](int stage) {
    const int thread = Shared::kReadsThread ? reread_thread_index() : thread_index();
    return shared.codes[0][0] + (thread - kHopperConsumers) * 16 + stage * kLoads * kStride;
  };
  const int offset = Codes::offset();

  int32_t tile = first_tile_of<kKeys>(piece);
  int32_t block = source.block_of_entry(source.entry_of(tile), tile), entry = source.entry_of(tile + kKeys);
  source.copy(tile, block, own_codes(0), kStride);
  copy_async_commit();
  QKV_NO_UNROLL
  for (int32_t j = 0; j < tiles; j++) {
    const uint32_t holes = ballot(block == Codes::kHole);
    const int32_t own_tile = tile, own_block = block;
    const auto copy_next = [&] {
      if (j + 1 < tiles) {
        tile += kKeys;
        block = source.block_of_entry(entry, tile);
        entry = source.entry_of(tile + kKeys);
        source.copy(tile, block, own_codes((j + 1) % kStages), kStride);
      }
      copy_async_commit();
    };
    if constexpr (kStages == 2) copy_next();
    const RingPosition ring = {first_fill + fill_of_tile(is_key, j, tiles)};
    phase_barrier_wait(&shared.empty[ring.slot()], ring.parity() ^ 1);
    if (is_key) store_holes<Shared::kRowsOfWarp>(shared.holes[ring.slot()], holes);
    if constexpr (Shared::kDynamic) {
      if (is_key) {
        ScalesOfRows<Shared::kRowsOfWarp> scales;
        scales.read(params, source, piece.kv_head, own_tile, own_block);
        const ScalesPosition at(ring.fill);
        phase_barrier_wait(&shared.scales_empty[at.slot()], at.parity() ^ 1);
        scales.store(shared.scales[at.slot()]);
      }
    }
    copy_async_wait<kStages - 1>();
    unsigned char *even = shared.slots[ring.slot()][0] + offset, *odd = shared.slots[ring.slot()][0] + (offset ^ 16);
    unsigned char *const codes = own_codes(j % kStages);
    source.drop_unseen(own_tile, codes, kStride);
    dispatch_format(format_of(source.half), [&](auto tag) {
      constexpr Format F = decltype(tag)::value;
      if constexpr (is_quantized(F)) {
        QKV_UNROLL
        for (int first = 0; first < kLoads; first += kAtOnce) {
          Words<4> raw[kAtOnce];
          QKV_UNROLL
          for (int i = 0; i < kAtOnce; i++) {
            raw[i] = *reinterpret_cast<const Words<4> *>(codes + (first + i) * kStride);
          }
          QKV_UNROLL
          for (int i = 0; i < kAtOnce; i++) {
            const int at = Codes::offset_of(first + i);
            Words<4> low, high;
            decode4_to_f16<F>(raw[i].w[0], low.w[0], low.w[1]);
            decode4_to_f16<F>(raw[i].w[1], low.w[2], low.w[3]);
            decode4_to_f16<F>(raw[i].w[2], high.w[0], high.w[1]);
            decode4_to_f16<F>(raw[i].w[3], high.w[2], high.w[3]);
            *reinterpret_cast<Words<4> *>(even + at) = low;
            *reinterpret_cast<Words<4> *>(odd + at) = high;
          }
        }
      }
    });
    slot_is_full(&shared.full[ring.slot()]);
    if constexpr (kStages == 1) copy_next();
  }
}

// 16-bit elements: copied to the slot in the background; it is said to be full when the next one is on its way.
template <class Shared>
QKV_DEVICE void produce_copies(const AttentionParams &params, const Piece &piece, int32_t tiles, uint32_t first_fill, Shared &shared) {
  constexpr int kKeys = Shared::kKeys, kPanels = Shared::kPanels;
  const bool is_key = produces_keys();
  using Source = RowSource<2, kPanels, Shared::kRowsOfWarp>;
  const Source source(params, is_key ? params.op.cache.k : params.op.cache.v, piece);
  // Of this lane's chunk in row lane / 8 of the warp's first four, and of every other four on; between those.
  const int offset = panel_offset(first_produced_row<Shared::kRowsOfWarp>() + lane_index() / 8, lane_index() % 8);
  int32_t tile = first_tile_of<kKeys>(piece), entry = source.entry_of(tile);
  RingPosition before = {first_fill};
  QKV_NO_UNROLL
  for (int32_t j = 0; j < tiles; j++, tile += kKeys) {
    const int32_t block = source.block_of_entry(entry, tile);
    entry = source.entry_of(tile + kKeys);
    const RingPosition ring = {first_fill + fill_of_tile(is_key, j, tiles)};
    phase_barrier_wait(&shared.empty[ring.slot()], ring.parity() ^ 1);
    if (is_key) store_holes<Shared::kRowsOfWarp>(shared.holes[ring.slot()], ballot(block == Source::kHole));
    unsigned char *even = shared.slots[ring.slot()][0] + offset, *odd = shared.slots[ring.slot()][0] + (offset ^ 64);
    source.copy(tile, block, [&](int i, int panel) {
      return (i % 2 == 0 ? even : odd) + (panel * kKeys + 4 * i) * kPanelRow;
    });
    copy_async_commit();
    if (j > 0) {
      copy_async_wait<1>();
      slot_is_full(&shared.full[before.slot()]);
    }
    before = ring;
  }
  copy_async_wait<0>();
  slot_is_full(&shared.full[before.slot()]);
}

template <bool kIsCodes, class Shared>
QKV_DEVICE void produce(const AttentionParams &params, const WorkList &list, Shared &shared) {
  uint32_t fill = 0;
  for (uint32_t n = 0;; n++) {
    if (reread_thread_index() == kHopperConsumers) step_pieces(params, list, n, shared); // of K, whose last tile is done first
    sync_warp();
    const Piece *piece = piece_of(n, shared);
    if (piece == nullptr) break;
    const int32_t tiles = tiles_of<Shared::kKeys>(*piece);
    if constexpr (!kIsCodes) {
      produce_copies(params, *piece, tiles, fill, shared);
    } else if constexpr (!Shared::kPacked) {
      produce_codes<CodesOfRows<Shared>>(params, *piece, tiles, fill, shared);
    } else if (produces_keys()) {
      produce_codes<CodesOfRows<Shared>>(params, *piece, tiles, fill, shared);
    } else {
      produce_codes<CodesOfChannels<Shared>>(params, *piece, tiles, fill, shared);
    }
    fill += static_cast<uint32_t>(2 * tiles);
    piece_is_done(n, shared);
  }
}

#endif // QKV_HAS_WARPGROUP_PRODUCTS

} // namespace quantkv
