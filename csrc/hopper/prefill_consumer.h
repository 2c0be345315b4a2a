// The consumers of the prefill kernel: a warpgroup's 64 query rows against the keys and values in the ring.
// See paged_attention_prefill.h.
#pragma once
#include "prefill_shared.h"

namespace quantkv {

#if QKV_HAS_WARPGROUP_PRODUCTS

template <class T> struct WarpgroupProducts;
template <> struct WarpgroupProducts<f16> {
  template <int kTiles> static QKV_DEVICE void by_rows(float (&sums)[kTiles][4], PanelMatrix a, PanelMatrix b, bool adds) {
    multiply_rows_f16(sums, a, b, adds);
  }
  template <int kTiles>
  static QKV_DEVICE void by_columns(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b) {
    multiply_columns_f16(sums, a, b);
  }
  static QKV_DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
};
template <> struct WarpgroupProducts<bf16> {
  template <int kTiles> static QKV_DEVICE void by_rows(float (&sums)[kTiles][4], PanelMatrix a, PanelMatrix b, bool adds) {
    multiply_rows_bf16(sums, a, b, adds);
  }
  template <int kTiles>
  static QKV_DEVICE void by_columns(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b) {
    multiply_columns_bf16(sums, a, b);
  }
  static QKV_DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
};

// Scores s * factor, in base 2, to weights relative to the row's max. Accumulators are to be multiplied by `rescale`.
template <int kTiles>
QKV_DEVICE void weigh_scores(PrefillRows &rows, const float (&factor)[2], float (&s)[kTiles][4], float (&rescale)[2]) {
  QKV_UNROLL
  for (int half = 0; half < 2; half++) {
    const int i = 2 * half;
    float tops[2] = {s[0][i], s[0][i + 1]};
    QKV_UNROLL
    for (int n = 1; n < kTiles; n++) {
      tops[0] = maximum(tops[0], s[n][i]);
      tops[1] = maximum(tops[1], s[n][i + 1]);
    }
    float top = maximum(tops[0], tops[1]);
    top = maximum(top, shuffle_xor(top, 1));
    top = maximum(top, shuffle_xor(top, 2));
    const float before = rows.max[half];
    top = maximum(before, top * factor[half]);
    if (top - before <= kMostAbove) top = before;
    const float reference = softmax_reference(top);
    float totals[2] = {0.0f, 0.0f};
    QKV_UNROLL
    for (int n = 0; n < kTiles; n++) {
      QKV_UNROLL
      for (int j = 0; j < 2; j++) {
        s[n][i + j] = exp2_approx(fused_multiply_add(s[n][i + j], factor[half], -reference));
        totals[j] += s[n][i + j];
      }
    }
    rescale[half] = exp2_approx(before - reference);
    rows.max[half] = top;
    rows.sum[half] = rows.sum[half] * rescale[half] + (totals[0] + totals[1]);
  }
}

// What a consumer warpgroup needs to know of a piece, in registers.
struct HopperTiles {
  int32_t first, end;   // tiles' first positions: first, first + kKeys .. below end
  int32_t masked_below; // tiles that begin below this one are masked, for the window
  int32_t masked_from;  // tiles that end after this position are masked, for causality
};

template <int kKeys> QKV_DEVICE HopperTiles hopper_tiles(const AttentionParams &params, const Piece &piece) {
  HopperTiles tiles;
  tiles.first = first_tile_of<kKeys>(piece);
  tiles.end = larger_of(piece.end, tiles.first + 1);
  tiles.masked_from = piece.first_position;
  tiles.masked_below = visible_to(params, piece.first_position + piece.num_queries - 1).first;
  return tiles;
}

// Products of a tile to weights: dynamic scales of K, scores, masks, softmax. Where `is_plain`, scores are products times a positive
// factor, which is applied with the exponential.
template <bool kDynamic, int kKeys>
QKV_DEVICE void weigh_tile(const AttentionParams &params, PrefillRows &rows, const HopperTiles &tiles, int32_t first, uint32_t holes,
                           bool is_plain, const HopperScales<kDynamic, kKeys> &scales, float (&s)[kKeys / 8][4], float (&rescale)[2]) {
  if constexpr (kDynamic) scale_products<kKeys>(scales.k, s);
  const bool is_masked = first < tiles.masked_below || first + kKeys - 1 > tiles.masked_from;
  float factor[2] = {rows.factor[0], rows.factor[1]};
  if (!is_plain) {
    score_products<kKeys>(params, rows, first, s);
    factor[0] = factor[1] = 1.0f;
  }
  if (is_masked) mask_tile<kKeys>(rows, first, s);
  if (holes != 0) {
    uint32_t present[kKeys / 32];
    QKV_UNROLL
    for (int i = 0; i < kKeys / 32; i++) {
      // A bit of eight keys to a bit each.
      present[i] = ~(((holes >> 8 * i & 0xf) * 0x00204081u & 0x01010101u) * 0xffu);
    }
    mask_holes<kKeys>(present, s);
  }
  weigh_scores(rows, factor, s, rescale);
}

template <class T, class Shared> struct HopperConsumer {
  static constexpr int kDim = Shared::kDim, kPanels = kDim / 64, kKeys = Shared::kKeys, kTiles = kKeys / 8;
  static constexpr int kColumns = kDim < 128 ? kDim : 128; // that one product sums
  using P = WarpgroupProducts<T>;

  // s = Q K^T, in the background.
  static QKV_DEVICE void start_scores(Shared &shared, int slot, float (&s)[kTiles][4]) {
    const int warpgroup = (Shared::kReadsThread ? reread_thread_index() : thread_index()) / (4 * kWarp);
    products_begin();
    QKV_UNROLL
    for (int panel = 0; panel < kPanels; panel++) {
      const PanelMatrix queries = matrix_by_rows(shared.query[panel] + warpgroup * 64 * kPanelRow);
      const PanelMatrix keys = matrix_by_rows(shared.slots[slot][panel]);
      QKV_UNROLL
      for (int step = 0; step < 4; step++) P::by_rows(s, queries + 32 * step, keys + 32 * step, panel + step > 0);
    }
    products_commit();
  }

  // o += P V, in the background.
  static QKV_DEVICE void start_outputs(Shared &shared, int slot, const uint32_t (&p)[kTiles / 2][4],
                                       float (&o)[kDim / 8][4]) {
    products_begin();
    QKV_UNROLL
    for (int at = 0; at < kDim / kColumns; at++) {
      float(&sums)[kColumns / 8][4] = *reinterpret_cast<float(*)[kColumns / 8][4]>(&o[at * kColumns / 8]);
      if constexpr (Shared::kPacked) {
        const PanelMatrix values = matrix_by_rows(shared.slots[slot][0] + at * kColumns * kPanelRow);
        QKV_UNROLL
        for (int step = 0; step < kTiles / 2; step++) {
          multiply_rows_f16(sums, p[step], values + (step / 4 * (kDim * kPanelRow) + step % 4 * 32), true);
        }
        continue;
      }
      const PanelMatrix values = matrix_by_columns(shared.slots[slot][at * kColumns / 64], kKeys * kPanelRow);
      QKV_UNROLL
      for (int step = 0; step < kTiles / 2; step++) P::by_columns(sums, p[step], values + 16 * kPanelRow * step);
    }
    products_commit();
  }

  static QKV_DEVICE void pack(const float (&s)[kTiles][4], uint32_t (&p)[kTiles / 2][4]) {
    QKV_UNROLL
    for (int step = 0; step < kTiles / 2; step++) {
      const float(&low)[4] = s[2 * step], (&high)[4] = s[2 * step + 1];
      p[step][0] = P::pack(low[0], low[1]);
      p[step][1] = P::pack(low[2], low[3]);
      p[step][2] = P::pack(high[0], high[1]);
      p[step][3] = P::pack(high[2], high[3]);
    }
  }

  // What the producers wrote to the slot can then be seen by products.
  static QKV_DEVICE void wait_for_slot(Shared &shared, const RingPosition &ring) {
    phase_barrier_wait(&shared.full[ring.slot()], ring.parity());
    fence_for_products();
  }

  static QKV_DEVICE void slot_is_used(Shared &shared, int slot) {
    sync_warp();
    if (lane_index() == 0) phase_barrier_arrive(&shared.empty[slot]);
  }

  // What accumulators are to be multiplied by once weights have the tile's dynamic scales of V.
  static QKV_DEVICE void rescale_unit(const Shared &shared, uint32_t fill_of_keys, PrefillRows &rows, float (&rescale)[2]) {
    if constexpr (Shared::kDynamic) {
      const float factor = grow_unit(rows, shared.scales[ScalesPosition(fill_of_keys).slot()].tops);
      rescale[0] *= factor;
      rescale[1] *= factor;
    }
  }

  // Gives them weights, when no products are under way: they are an operand's registers more.
  static QKV_DEVICE void use_scales(Shared &shared, uint32_t fill_of_keys, const PrefillRows &rows, float (&s)[kTiles][4]) {
    if constexpr (Shared::kDynamic) {
      scale_weights<kKeys>(rows, shared.scales[ScalesPosition(fill_of_keys).slot()].v, s);
      sync_warp();
      if (lane_index() == 0) phase_barrier_arrive(&shared.scales_empty[ScalesPosition(fill_of_keys).slot()]);
    }
  }

  static QKV_DEVICE void attend(const AttentionParams &params, const WorkList &list, const Piece &piece,
                                RingPosition &ring, Shared &shared) {
    const int warpgroup = warp_index() / 4;
    const auto query_chunk = [&](int row, int chunk) {
      return shared.query[0] + chunk / 8 * (kHopperRows * kPanelRow) + panel_offset(row, chunk % 8);
    };
    const auto store_query = [&](int row, int chunk, const Words<4> &words) {
      *reinterpret_cast<Words<4> *>(query_chunk(row, chunk)) = words;
    };
    const float k_scale = load_prefill_queries<T, kDim>(params, piece, store_query, shared.query_factors);
    fence_for_products();
    named_barrier_sync(kBarrierWarpgroup + warpgroup, 4 * kWarp);

    PrefillRows rows = start_prefill_rows(params, piece, k_scale, shared.query_factors);
    const HopperTiles tiles = hopper_tiles<kKeys>(params, piece);
    const bool is_plain = params.cap == 0.0f && params.op.alibi_slopes == nullptr && !any(!(rows.factor[0] > 0.0f && rows.factor[1] > 0.0f));
    float o[kDim / 8][4], s[kTiles][4], rescale[2];
    uint32_t p[kTiles / 2][4];
    QKV_UNROLL
    for (int c = 0; c < kDim / 8; c++) {
      QKV_UNROLL
      for (int i = 0; i < 4; i++) o[c][i] = 0.0f;
    }

    const auto holes_of = [&](int slot) { return *reinterpret_cast<const uint32_t *>(shared.holes[slot]); };
    wait_for_slot(shared, ring);
    start_scores(shared, ring.slot(), s);
    uint32_t holes = holes_of(ring.slot());
    products_wait<0>(s);
    slot_is_used(shared, ring.slot());
    ring.fill++;
    weigh_tile(params, rows, tiles, tiles.first, holes, is_plain, shared.scales[ScalesPosition(ring.fill - 1).slot()], s, rescale);
    rescale_unit(shared, ring.fill - 1, rows, rescale);
    use_scales(shared, ring.fill - 1, rows, s);
    pack(s, p);

    for (int32_t first = tiles.first + kKeys; first < tiles.end; first += kKeys) {
      const int k_slot = ring.slot();
      wait_for_slot(shared, ring);
      ring.fill++;
      // The first warpgroup begins, then they take turns: one starts products, the other has weights to compute.
      if (warpgroup != 0 || first != tiles.first + kKeys) {
        named_barrier_sync(kBarrierTurn + warpgroup, kHopperConsumers);
      }
      start_scores(shared, k_slot, s);
      const int v_slot = ring.slot();
      wait_for_slot(shared, ring);
      ring.fill++;
      start_outputs(shared, v_slot, p, o);
      if (warpgroup == 0 || first + kKeys < tiles.end) {
        named_barrier_arrive(kBarrierTurn + (warpgroup ^ 1), kHopperConsumers);
      }
      holes = holes_of(k_slot);
      products_wait<1>(s);
      slot_is_used(shared, k_slot);
      weigh_tile(params, rows, tiles, first, holes, is_plain, shared.scales[ScalesPosition(ring.fill - 2).slot()], s, rescale);
      products_wait<0>(o);
      slot_is_used(shared, v_slot);
      rescale_unit(shared, ring.fill - 2, rows, rescale);
      if (any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
        QKV_UNROLL
        for (int c = 0; c < kDim / 8; c++) {
          QKV_UNROLL
          for (int i = 0; i < 4; i++) o[c][i] *= rescale[i / 2];
        }
      }
      use_scales(shared, ring.fill - 2, rows, s);
      pack(s, p);
    }

    wait_for_slot(shared, ring);
    start_outputs(shared, ring.slot(), p, o);
    products_wait<0>(o);
    slot_is_used(shared, ring.slot());
    ring.fill++;

    QKV_UNROLL
    for (int half = 0; half < 2; half++) {
      rows.sum[half] += shuffle_xor(rows.sum[half], 1);
      rows.sum[half] += shuffle_xor(rows.sum[half], 2);
    }
    if (piece.slot >= 0) {
      store_prefill_partial<kDim>(params, list, piece, rows, o);
    } else {
      // The outputs go where the queries were, which all warps of the group are done with.
      named_barrier_sync(kBarrierWarpgroup + warpgroup, 4 * kWarp);
      store_prefill_output<kDim>(params, piece, rows, o, query_chunk);
    }
  }

  static QKV_DEVICE void run(const AttentionParams &params, const WorkList &list, Shared &shared) {
    RingPosition ring;
    for (uint32_t n = 0;; n++) {
      const Piece *piece = piece_of(n, shared);
      if (piece == nullptr) break;
      attend(params, list, *piece, ring, shared);
      piece_is_done(n, shared);
    }
  }
};

#endif // QKV_HAS_WARPGROUP_PRODUCTS

} // namespace quantkv
