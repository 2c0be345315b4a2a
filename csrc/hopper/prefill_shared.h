// What the warps of a block of the prefill kernel share: sizes, shared memory, the ring of slots, the ring of pieces.
// See paged_attention_prefill.h.
#pragma once
#include "../core/prim_hopper.h"
#include "../ops/paged_attention_prefill_rows.h"

namespace quantkv {

constexpr int kHopperRows = 128, kHopperSlots = 4, kHopperPieces = 4;
constexpr int kHopperConsumerWarps = kHopperRows / 16, kHopperProducerWarps = 4;
constexpr int kHopperWarpsOfFill = kHopperProducerWarps / 2;
// Keys of a tile: as many as there are registers for, beside outputs of kDim channels.
template <int kDim> constexpr int kHopperKeys = kDim == 256 ? 64 : 128;
constexpr int kHopperConsumers = kHopperConsumerWarps * kWarp, kHopperProducers = kHopperProducerWarps * kWarp;
constexpr int kHopperThreads = kHopperConsumers + kHopperProducers;
// Of 168 a thread, which is what a block of this size has. Producers that look dynamic scales up need more.
template <bool kDynamic> constexpr int kHopperConsumerRegisters = kDynamic ? 208 : 216;
template <bool kDynamic> constexpr int kHopperProducerRegisters = kDynamic ? 88 : 72;

// Dynamic scales of a tile: of K's rows and of V's, the largest of V's that each of K's producers has.
template <bool kDynamic, int kKeys> struct HopperScales {};
template <int kKeys> struct HopperScales<true, kKeys> {
  alignas(8) float k[kKeys];
  alignas(8) float v[kKeys];
  float tops[kHopperWarpsOfFill];
};

// From 128 channels on nearly all of a multiprocessor's 227 KB. Of 256, a tile has half the keys, and there is room for the codes of
// one alone.
// Order of V: rows of channels, or packed, runs of slots of each channel. Rows go to panels as they are [tokens, channels], packed ones
// as their transpose [channels, tokens].
template <int Dim, bool Dynamic, Order O> struct HopperShared {
  static constexpr int kDim = Dim, kPanels = kDim / 64, kKeys = kHopperKeys<kDim>;
  static constexpr int kRowsOfWarp = kKeys / kHopperWarpsOfFill; // of a producer
  static constexpr int kCodeStages = kDim == 256 ? 1 : 2;
  static constexpr bool kDynamic = Dynamic;
  static constexpr bool kPacked = O == Order::Packed;
  static constexpr bool kReadsThread = kDynamic || kPacked || kDim == 256; // again where it is needed: no register is left to keep it in
  using Scales = HopperScales<kDynamic, kKeys>;
  alignas(1024) unsigned char query[kPanels][kHopperRows * kPanelRow]; // at the end the outputs
  alignas(1024) unsigned char slots[kHopperSlots][kPanels][kKeys * kPanelRow];
  // 8-bit codes on their way: tiles of K and V, in the order of the threads that copy and decode them.
  alignas(16) unsigned char codes[kCodeStages][2][kKeys * kDim];
  alignas(16) uint64_t full[kHopperSlots];
  uint64_t empty[kHopperSlots];
  uint64_t scales_empty[2];
  // Of K's slots: byte w, bit i: keys 32w + 8i .. + 8 are in a block that the table does not name.
  alignas(4) unsigned char holes[kHopperSlots][4];
  float query_factors[kHopperRows];
  Scales scales[2]; // in turn
  // Pieces, in a ring too: one producer steps through the work, everyone takes them from here.
  SharedWork work;
  Piece pieces[kHopperPieces];
  bool is_piece[kHopperPieces];
  alignas(8) uint64_t piece_full[kHopperPieces];
  uint64_t piece_empty[kHopperPieces];
};

#if QKV_HAS_WARPGROUP_PRODUCTS

// Named barriers.
constexpr int kBarrierWarpgroup = 1, kBarrierTurn = 3;

// The n-th fill of the ring, of all that a block makes: its slot, and the parity of the slot's phases.
struct RingPosition {
  uint32_t fill = 0;
  QKV_DEVICE int slot() const { return static_cast<int>(fill % kHopperSlots); }
  QKV_DEVICE int parity() const { return static_cast<int>(fill / kHopperSlots % 2); }
};

// Which of the scales are those of the tile whose K is the ring's fill, and the parity of their phases.
struct ScalesPosition {
  uint32_t number; // of all tiles of the block: two fills are one tile's
  QKV_DEVICE explicit ScalesPosition(uint32_t fill_of_keys) : number((fill_of_keys + 1) / 2) {}
  QKV_DEVICE int slot() const { return static_cast<int>(number % 2); }
  QKV_DEVICE int parity() const { return static_cast<int>(number / 2 % 2); }
};

// Tiles of a piece; one at least.
template <int kKeys> QKV_DEVICE int32_t first_tile_of(const Piece &piece) { return piece.begin / kKeys * kKeys; }
template <int kKeys> QKV_DEVICE int32_t tiles_of(const Piece &piece) {
  return larger_of(1, (piece.end + kKeys - 1) / kKeys - piece.begin / kKeys);
}

// Publishes piece n, or that there is none. One thread.
template <class Shared>
QKV_DEVICE void step_pieces(const AttentionParams &params, const WorkList &list, uint32_t n, Shared &shared) {
  const int at = static_cast<int>(n % kHopperPieces);
  phase_barrier_wait(&shared.piece_empty[at], static_cast<int>(n / kHopperPieces % 2) ^ 1);
  shared.is_piece[at] = shared.work.next(params, list, n == 0, true, [] {}, forget(block_index_x())); // once: not kept
  shared.pieces[at] = shared.work.piece;
  phase_barrier_arrive(&shared.piece_full[at]);
}

// Waits for piece n; null if there is none.
template <class Shared> QKV_DEVICE const Piece *piece_of(uint32_t n, Shared &shared) {
  const int at = static_cast<int>(n % kHopperPieces);
  phase_barrier_wait(&shared.piece_full[at], static_cast<int>(n / kHopperPieces % 2));
  return shared.is_piece[at] ? &shared.pieces[at] : nullptr;
}

// The warp needs piece n no more.
template <class Shared> QKV_DEVICE void piece_is_done(uint32_t n, Shared &shared) {
  sync_warp();
  if (lane_index() == 0) phase_barrier_arrive(&shared.piece_empty[n % kHopperPieces]);
}

#endif // QKV_HAS_WARPGROUP_PRODUCTS

} // namespace quantkv
