// Query rows of a piece in the wide decode kernel: their state, in accumulators and shared memory, and where it goes when the piece
// ends: to the output, to a slot of the workspace, or together with what others left there.
// See paged_attention_decode_wide.h.
#pragma once
#include "../ops/paged_attention_decode_merge.h"
#include "../ops/paged_attention_prefill_rows.h"
#include "wide_shared.h"

namespace quantkv {

template <class Shape> struct WideRows {
  static constexpr int kRowTiles = Shape::kRowTiles;

  const AttentionParams &params;
  const WorkList &list;
  WideShared<Shape> &shared;
  WideWork &work;
  // O^T of this lane: of rows 8j + 2t + i, i 0 and 1, channels first_channel() + 2m + h in o[m][j][2h + i]. Nothing yet, if the tile is the
  // first of its piece.
  float o[2][kRowTiles][4];
  float sum[kRowTiles][2]; // of this lane's tokens
  int version;             // of shared.rows and shared.v_inverse

  QKV_DEVICE WideRows(const AttentionParams &params, const WorkList &list, WideShared<Shape> &shared)
      : params(params), list(list), shared(shared), work(shared.works[warp_index()]), version(0) {}

  static QKV_DEVICE int first_channel(int thread) { return 32 * (thread / kWarp) + thread % kWarp / 4 * 4; }

  // For each of this lane's rows that exist: its number, and the four channels that this lane has of it.
  template <class Use> QKV_DEVICE void each_row(const Piece &piece, Use use) const {
    const int t = reread_thread_index() % 4;
    const float unit = Shape::kDynamic ? inverse_of(shared.v_inverse[version]) : 1.0f;
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        const int row = 8 * j + 2 * t + i;
        float x[4];
        QKV_UNROLL
        for (int c = 0; c < 4; c++) x[c] = o[c / 2][j][c % 2 * 2 + i] * unit;
        if (row < piece.rows()) use(row, x);
      }
    }
  }

  // Sums of all lanes and warps; a thread a row has its state then.
  QKV_DEVICE void share_sums() {
    const int thread = reread_thread_index(), lane = thread % kWarp, g = lane / 4, t = lane % 4;
    QKV_UNROLL
    for (int j = 0; j < kRowTiles; j++) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        float all = sum[j][i];
        QKV_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) all += shuffle_xor(all, mask);
        if (g == 0) shared.of_warps[thread / kWarp][8 * j + 2 * t + i] = all;
      }
    }
    sync_threads();
  }

  // Leaves the rows of a piece that others' are to be merged with, or a run of pieces, where K and V were: it is its worker's last, so that
  // no copies are under way. `max`, `all`: a thread a row's state.
  QKV_DEVICE void lay_out(const Piece &piece, float max, float all) {
    const int thread = reread_thread_index();
    float *const rows = reinterpret_cast<float *>(shared.values[0]) + first_channel(thread);
    static_assert(Shape::kRows * Shape::kDim * 4 <= sizeof(shared.values) + sizeof(shared.keys), "they follow each other");
    if (thread < piece.rows()) {
      shared.of_warps[0][thread] = max;
      shared.of_warps[1][thread] = all;
    }
    each_row(piece, [&](int row, const float(&x)[4]) {
      *reinterpret_cast<Words<4> *>(rows + row * Shape::kDim) = Words<4>{{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
    });
  }

  // Then merges them, a warp two rows at a time.
  QKV_DEVICE void merge(const Piece &piece) const {
    sync_threads();
    const int thread = reread_thread_index(), lane = thread % kWarp;
    const float *rows = reinterpret_cast<const float *>(shared.values[0]);
    const int32_t worker = work.place.worker;
    const MergeRole role(list, worker, piece.merge, list.merges[larger_of(piece.merge, 0)].num_pieces, Shape::kMostPieces);
    const quantkv_scale &scales = params.op.cache.v.scale;
    const float v_scale = static_scale(scales, piece.kv_head, 0);
    constexpr int kRowsAtOnce = 2, kPiecesAtOnce = 3;
    QKV_NO_UNROLL
    for (int base = thread / kWarp; base < piece.rows(); base += kRowsAtOnce * Shape::kWarps) {
      MergeState states[kRowsAtOnce];
      int32_t row[kRowsAtOnce];
      QKV_UNROLL
      for (int i = 0; i < kRowsAtOnce; i++) {
        row[i] = base + i * Shape::kWarps < piece.rows() ? base + i * Shape::kWarps : base; // the same twice, if there is one only
        const Words<4> words = *reinterpret_cast<const Words<4> *>(rows + row[i] * Shape::kDim + 4 * lane);
        states[i] = {shared.of_warps[0][row[i]], shared.of_warps[1][row[i]], {}};
        QKV_UNROLL
        for (int j = 0; j < 4; j++) states[i].acc[j] = float_of(words.w[j]);
      }
      if (!merge_rows<kPiecesAtOnce>(states, list, worker, role, row, lane, true, true)) {
        return set_fault(params.paging.faults, QUANTKV_FAULT_PLAN); // and writes nothing
      }
      QKV_UNROLL
      for (int i = 0; i < kRowsAtOnce; i++) {
        const RowEnd end = {params, list, piece, worker, row[i], 4 * lane, true, true};
        if (role.is_first) end.to_output(states[i], scales.channel_stride != 0, v_scale);
        else end.to_slot(states[i]);
      }
    }
  }

  // Rows of the piece, or its partial state. Or what merge() needs: then it answers true.
  QKV_DEVICE bool finish(const Piece &piece) {
    const int row = reread_thread_index();
    const bool is_whole = piece.slot < 0;
    share_sums();
    float max = negative_infinity(), all = 0.0f; // of the row
    if (row < piece.rows()) {
      const float reference = shared.rows[version][0][row].reference;
      max = reference == kUnseen ? negative_infinity() : reference;
      QKV_UNROLL
      for (int warp = 0; warp < Shape::kWarps; warp++) all += shared.of_warps[warp][row];
    }
    const int32_t worker = work.place.worker;
    if (!is_whole) {
      const MergeRole role(list, worker, piece.merge, list.merges[larger_of(piece.merge, 0)].num_pieces, Shape::kMostPieces);
      if (!role.is_sound) {
        set_fault(params.paging.faults, QUANTKV_FAULT_PLAN);
        return false; // and writes nothing
      }
      if (role.members + role.runs > 0) {
        lay_out(piece, max, all);
        return true;
      }
      if (row < piece.rows()) store_relaxed(slot_state(list, worker, row), Words<2>{{state_word(max), state_word(all)}});
    } else {
      if (row < piece.rows()) {
        const int query = piece.query_of(row), token = piece.first_token + query, head = piece.first_head + row - query * piece.num_heads;
        const SoftmaxEnd end = end_of_row(params, head, max, all);
        store_lse(params, token, head, end.lse);
        shared.ends[row] = {row_index(params.op.output, token, head), end.factor};
      }
      sync_threads();
    }
    if (is_whole) store_outputs(piece);
    else store_slot(piece);
    return false;
  }

  // To the worker's slot.
  QKV_DEVICE void store_slot(const Piece &piece) const {
    Words<4> *const slot = slot_values(list, work.place.worker, 0) + first_channel(reread_thread_index()) / 4;
    const uint32_t words_of_row = static_cast<uint32_t>(list.value_stride) / 4;
    each_row(piece, [&](int row, const float(&x)[4]) {
      store_relaxed(slot + row * words_of_row, Words<4>{{state_word(x[0]), state_word(x[1]), state_word(x[2]), state_word(x[3])}});
    });
  }

  // To the call's output, by shared.ends. Written for few instructions: a piece runs them once, and cold.
  QKV_DEVICE void store_outputs(const Piece &piece) const {
    const int channel = first_channel(reread_thread_index());
    float scales[4];
    QKV_UNROLL
    for (int c = 0; c < 4; c++) scales[c] = static_scale(params.op.cache.v.scale, piece.kv_head, channel + c);
    const auto each_result = [&](auto use) {
      each_row(piece, [&](int row, float(&x)[4]) {
        const WideEnd end = shared.ends[row];
        QKV_UNROLL
        for (int c = 0; c < 4; c++) x[c] = softmax_result(x[c], SoftmaxEnd{end.factor, 0.0f}) * scales[c];
        use(end.at + channel, x);
      });
    };
    uint16_t *const data = static_cast<uint16_t *>(params.op.output.data);
    const auto store_packed = [&](auto pack) {
      each_result([&](int64_t at, const float(&x)[4]) { *reinterpret_cast<Words<2> *>(data + at) = Words<2>{{pack(x[0], x[1]), pack(x[2], x[3])}}; });
    };
    if (params.op.activation == QUANTKV_F16) {
      store_packed([](float low, float high) { return pack_f16(low, high); });
    } else {
      store_packed([](float low, float high) { return pack_bf16(low, high); });
    }
  }
};

} // namespace quantkv
