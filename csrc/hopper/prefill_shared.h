// What the warps of a block of the prefill kernel share: sizes, shared memory, the ring of slots, the ring of pieces.
// See paged_attention_prefill.h.
#pragma once
#include "../core/prim_hopper.h"
#include "../ops/paged_attention_prefill_rows.h"

namespace quantkv {

constexpr int kHopperRows = 128, kHopperKeys = 128, kHopperSlots = 4, kHopperPieces = 4;
constexpr int kHopperConsumerWarps = kHopperRows / 16, kHopperProducerWarps = 4;
constexpr int kHopperWarpsOfFill = kHopperProducerWarps / 2, kHopperRowsOfWarp = kHopperKeys / kHopperWarpsOfFill;
constexpr int kHopperConsumers = kHopperConsumerWarps * kWarp, kHopperProducers = kHopperProducerWarps * kWarp;
constexpr int kHopperThreads = kHopperConsumers + kHopperProducers;
// Of 168 a thread, which is what a block of this size has.
constexpr int kHopperConsumerRegisters = 216, kHopperProducerRegisters = 72;

template <int kDim> struct HopperShared {
  static constexpr int kPanels = kDim / 64;
  alignas(1024) unsigned char query[kPanels][kHopperRows * kPanelRow]; // at the end the outputs
  alignas(1024) unsigned char slots[kHopperSlots][kPanels][kHopperKeys * kPanelRow];
  // 8-bit codes on their way: two tiles of K and V, in the order of the threads that copy and decode them.
  alignas(16) unsigned char codes[2][2][kHopperKeys * kDim];
  alignas(16) uint64_t full[kHopperSlots];
  uint64_t empty[kHopperSlots];
  // Of K's slots: byte w, bit i: keys 32w + 8i .. + 8 are in a block that the table does not name.
  alignas(4) unsigned char holes[kHopperSlots][4];
  float query_factors[kHopperRows];
  // Pieces, in a ring too: one producer steps through the work, everyone takes them from here.
  SharedWork work;
  Piece pieces[kHopperPieces];
  bool is_piece[kHopperPieces];
  alignas(8) uint64_t piece_full[kHopperPieces];
  uint64_t piece_empty[kHopperPieces];
};

// The panels begin at a multiple of 1024 bytes.
template <int kDim> constexpr size_t kHopperSharedBytes = sizeof(HopperShared<kDim>) + 1024;

#if QKV_HAS_WARPGROUP_PRODUCTS

// Named barriers.
constexpr int kBarrierWarpgroup = 1, kBarrierTurn = 3;

// The n-th fill of the ring, of all that a block makes: its slot, and the parity of the slot's phases.
struct RingPosition {
  uint32_t fill = 0;
  QKV_DEVICE int slot() const { return static_cast<int>(fill % kHopperSlots); }
  QKV_DEVICE int parity() const { return static_cast<int>(fill / kHopperSlots % 2); }
};

// Tiles of a piece; one at least.
QKV_DEVICE int32_t first_tile_of(const Piece &piece) { return piece.begin / kHopperKeys * kHopperKeys; }
QKV_DEVICE int32_t tiles_of(const Piece &piece) {
  return larger_of(1, (piece.end + kHopperKeys - 1) / kHopperKeys - piece.begin / kHopperKeys);
}

// Publishes piece n, or that there is none. One thread.
template <int kDim>
QKV_DEVICE void step_pieces(const AttentionParams &params, const WorkList &list, uint32_t n,
                            HopperShared<kDim> &shared) {
  const int at = static_cast<int>(n % kHopperPieces);
  phase_barrier_wait(&shared.piece_empty[at], static_cast<int>(n / kHopperPieces % 2) ^ 1);
  shared.is_piece[at] = shared.work.next(params, list, n == 0, true, [] {});
  shared.pieces[at] = shared.work.piece;
  phase_barrier_arrive(&shared.piece_full[at]);
}

// Waits for piece n; null if there is none.
template <int kDim> QKV_DEVICE const Piece *piece_of(uint32_t n, HopperShared<kDim> &shared) {
  const int at = static_cast<int>(n % kHopperPieces);
  phase_barrier_wait(&shared.piece_full[at], static_cast<int>(n / kHopperPieces % 2));
  return shared.is_piece[at] ? &shared.pieces[at] : nullptr;
}

// The warp needs piece n no more.
template <int kDim> QKV_DEVICE void piece_is_done(uint32_t n, HopperShared<kDim> &shared) {
  sync_warp();
  if (lane_index() == 0) phase_barrier_arrive(&shared.piece_empty[n % kHopperPieces]);
}

#endif // QKV_HAS_WARPGROUP_PRODUCTS

} // namespace quantkv
