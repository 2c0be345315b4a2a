// paged_attention of many query rows on sm_90a: products of warpgroups (wgmma), f32 sums, one block a multiprocessor.
//
//   warps 0-7    two warpgroups of consumers, 64 of 128 query rows each:  S = Q K^T, softmax in registers, O += P V
//   warps 8-9    producers of K: rows of the blocks that the table names to panels (prim_hopper.h) of f16 or bf16
//   warps 10-11  the same of V
//
// Rows are (query, head) pairs, so that the heads of a KV head share its tiles. A tile is kHopperKeys<kDim> positions; its K
// and its V each fill a slot of a ring, in the order in which they are used:
//
//   K0  K1 V0  K2 V1  ..  V_last      full[slot]: filled, by its producer warps;  empty[slot]: used, by all consumers
//
// Producers. 16-bit elements are copied to their slot in the background. 8-bit codes are copied in the background too,
// a tile ahead, to where the thread that asked for them decodes them from, exactly, to f16 in the slot.
//
// Consumers. A warpgroup starts the scores of tile j + 1 and the outputs of tile j together, and computes weights while
// the outputs are summed. The two warpgroups take turns at starting products: one's softmax runs while the other's
// products do. V is used as it lies, tokens along k (`by columns`; packed V, whose channels are rows, `by rows`); P goes
// from accumulators to the A operand in registers.
//
// Scores, range and scales: as in ops/paged_attention_prefill.h. Dynamic scales of a tile, K's and V's,
// come with its K: scores are multiplied by K's, weights by V's. A row's max follows its scores only when they outgrow it by
// 2^8: weights are at most 2^8, accumulators seldom rescaled.
//
// docs/kernels/cuda-prefill.md has the clock budget, and what else was tried.
#pragma once
#include "prefill_consumer.h"
#include "prefill_producer.h"

namespace quantkv {

// T: the type of the products. kIsCodes: of an 8-bit cache. kDim: 64, 128 or 256, not below either head dim. kDynamic: scales of a half at least.
// O: how V lies. Shared: HopperShared.
template <class T, bool kIsCodes, int kDim, bool kDynamic, Order O>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kHopperThreads, 1) attend_prefill_hopper(
    QKV_GRID_CONSTANT const AttentionParams params, QKV_GRID_CONSTANT const WorkList list) {
#if QKV_HAS_WARPGROUP_PRODUCTS
  static_assert(kIsCodes || !kDynamic, "only codes have scales");
  static_assert(kIsCodes || O == Order::Rows, "packed 16-bit elements are ops/paged_attention_prefill.h's");
  QKV_PANELS_SHARED(memory);
  using Shared = HopperShared<kDim, kDynamic, O>;
  Shared &shared = *reinterpret_cast<Shared *>(memory);
  if (thread_index() == 0) {
    for (int slot = 0; slot < kHopperSlots; slot++) {
      phase_barrier_init(&shared.full[slot], kHopperWarpsOfFill);
      phase_barrier_init(&shared.empty[slot], kHopperConsumerWarps);
    }
    for (int slot = 0; slot < kHopperSlots; slot++) *reinterpret_cast<uint32_t *>(shared.holes[slot]) = 0; // all of it is read
    for (int at = 0; at < 2; at++) phase_barrier_init(&shared.scales_empty[at], kHopperConsumerWarps);
    for (int at = 0; at < kHopperPieces; at++) {
      phase_barrier_init(&shared.piece_full[at], 1);
      phase_barrier_init(&shared.piece_empty[at], kHopperThreads / kWarp);
    }
  }
  wait_for_previous_kernel();
  sync_threads();
  if (warp_index() >= kHopperConsumerWarps) {
    give_registers<kHopperProducerRegisters<kDynamic>>();
    produce<kIsCodes>(params, list, shared);
  } else {
    take_registers<kHopperConsumerRegisters<kDynamic>>();
    HopperConsumer<T, Shared>::run(params, list, shared);
  }
#endif
}

} // namespace quantkv
