// cache_write: quantize keys and values and scatter them to their slots, K and V in one launch.
//
//   for t:  slot = slot_mapping[t]; negative: padding; past the cache: skipped, QUANTKV_FAULT_SLOT
//     for h, d:  codes[block, h, offset, d] = encode(x[t, h, d] / scale(h, d))
//
// A row is a (token, half, head): row r of a token is K head r, then V head r - heads. With dynamic scales the row's
// own scale comes from max |x / static| over its lanes and is stored beside the block.
//
//   cache_write_vectors   rows in vectors of 8 channels, see rows.h: several tokens' loads are under way at once, and
//                         the slot is looked up beside them, not before
//   cache_write_elements  a warp a row, an element a lane: any stride, alignment, chunk and head dim
#pragma once
#include "../core/rows.h"

namespace quantkv {

struct CacheWriteParams {
  quantkv_cache_write op;
  Paging paging;
  RowShare share;
};

// max |x| of 8 channels, NaN ignored.
template <Format A> QKV_DEVICE float vector_absmax(const Vector<A> &v) {
  float x[kVector], absmax = 0.0f;
  unpack_vector<A>(v, x);
  QKV_UNROLL
  for (int i = 0; i < kVector; i++) absmax = maximum(absmax, float_of(bits_of(x[i]) & 0x7fffffffu));
  return absmax;
}

constexpr int kRowVectors = 2; // a lane has of a row: rows of up to 512 channels

// What a thread keeps of its row, all in bytes.
struct RowToWrite {
  const char *source; // of the lane's first vector of token 0
  char *codes;        // of the same in (block 0, slot 0)
  int64_t token_bytes, block_bytes;
  int32_t slot_bytes;
  int32_t next_codes; // from the lane's first vector to its second
  int32_t vectors;    // the lane has, 0 .. kRowVectors

  QKV_DEVICE RowToWrite(const quantkv_half &half, const quantkv_rows &rows, Format activation, int head, int lane,
                        int lanes) {
    const int size = bytes_of(half), channel = lane * kVector, next = channel + lanes * kVector;
    const int64_t at = channel_index(half, channel);
    source = static_cast<const char *>(rows.data) + (row_index(rows, 0, head) + channel) * bytes_of(activation);
    codes = keep(static_cast<char *>(half.codes) + (row_index(half.map, 0, head, 0) + at) * size);
    token_bytes = rows.token_stride * bytes_of(activation);
    block_bytes = keep(half.map.block_stride * size);
    slot_bytes = keep(static_cast<int32_t>(half.map.slot_stride) * size);
    next_codes = keep(static_cast<int32_t>(channel_index(half, next) - at) * size);
    vectors = (channel < half.head_dim) + (next < half.head_dim);
  }

  QKV_DEVICE char *at(int64_t slot, const Paging &paging) const {
    const uint32_t block = static_cast<uint32_t>(slot >> paging.block_shift);
    const int32_t offset = static_cast<int32_t>(slot) & (paging.block_size() - 1);
    return codes + block * static_cast<uint64_t>(block_bytes) + static_cast<int64_t>(offset) * slot_bytes;
  }
};

// Which scales a launch has. Where both halves differ, the larger one; dynamic scales over static ones by channel are
// left to cache_write_elements.
enum class Scales { One, Channel, Dynamic };

// Blocks of a multiprocessor that the registers are shared by: as many as need no spills.
template <Format A, Scales kScales>
constexpr int kBlocksForRegisters =
    (kScales == Scales::Channel ? 2 : A == Format::F32 ? 3 : 4) - (kScales == Scales::Dynamic && A != Format::F32 ? 2 : 1) * QKV_NEEDS_MORE_REGISTERS;

// The vectors of a token that a lane has, to `codes`; a bit for each that store_elements is to do.
template <Format A, bool kEach, int kScaleSets>
QKV_DEVICE uint32_t store_token(Store store, char *codes, int32_t next_codes, bool has_second,
                                const Vector<A> (&x)[kRowVectors], const EasyScales<kEach> (&easy)[kScaleSets]) {
  auto both = [&](Store what) {
    uint32_t left = store_fast(what, codes, x[0], easy[0]) ? 0 : 1;
    if (has_second && !store_fast(what, codes + next_codes, x[1], easy[kScaleSets - 1])) left |= 2;
    return left;
  };
  // Which it is, is asked once for both.
  switch (store) {
  case Store::Copy: return both(Store::Copy);
  case Store::E4M3: return both(Store::E4M3);
  case Store::E5M2: return both(Store::E5M2);
  default: return has_second ? 3 : 1;
  }
}

// kTokens: tokens a thread has in flight. The grid covers all rows.
template <Format A, Scales kScales, int kTokens>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, (kBlocksForRegisters<A, kScales>))
cache_write_vectors(const CacheWriteParams p) {
  using T = Stored<A>;
  wait_for_previous_kernel();
  const RowPlace place(p.share);
  const int lanes = p.share.lanes(), side = p.share.side, row = place.row;
  const bool is_key = row < p.paging.num_kv_heads, is_row = row < p.share.rows;
  const int head = is_row ? (is_key ? row : row - p.paging.num_kv_heads) : 0;
  const Format format = static_cast<Format>(is_key ? p.op.cache.k.format : p.op.cache.v.format);
  const RowToWrite to(choose_half(p.op.cache, is_key), choose_rows(p.op.key, p.op.value, is_key), A, head, place.lane,
                      lanes);
  const int next_source = keep(lanes * kVector * bytes_of(A));
  const uint64_t num_slots = static_cast<uint64_t>(p.paging.num_blocks) << p.paging.block_shift;
  float *const dynamic = is_key ? p.op.cache.k.dynamic : p.op.cache.v.dynamic;
  auto channel_of = [&](int j) { return (place.lane + j * lanes) * kVector; };

  const auto static_scale_of_row = [&] {
    RowScale scale = {1.0f, nullptr, 0, 0.0f};
    if (is_quantized(format)) scale = static_row_scale(choose_half(p.op.cache, is_key).scale, head);
    return scale;
  };
  const RowScale fixed = static_scale_of_row();
  constexpr bool kEach = kScales == Scales::Channel;
  EasyScales<kEach> easy[kEach ? kRowVectors : 1];
  QKV_UNROLL
  for (int j = 0; j < (kEach ? kRowVectors : 1); j++) {
    QKV_UNROLL
    for (int i = 0; i < (kEach ? kVector : 1); i++) {
      easy[j].set(i, kEach && j < to.vectors ? fixed.at(channel_of(j) + i) : fixed.one);
    }
  }
  Store store = store_of<A>(format, easy[0].are_easy() && easy[kEach ? 1 : 0].are_easy());

  // Tokens first_token + offset, offset a multiple of `side` below `limit`.
  const int64_t remaining = is_row && to.vectors > 0 ? p.op.num_tokens - place.first_token : 0;
  const int all = p.share.steps * side, limit = keep(remaining < all ? static_cast<int>(remaining) : all);
  const int has_second = keep(static_cast<int>(to.vectors == kRowVectors));
  const int64_t step_bytes = keep(side * to.token_bytes); // from one token of the thread to the next
  const char *source = keep(to.source + place.first_token * to.token_bytes);
  const int64_t *slot_of = p.op.slot_mapping + place.first_token;
  bool is_outside = false;

  QKV_NO_UNROLL
  for (int offset = 0; offset < all; offset += kTokens * side) {
    // All loads first. A token that is not there counts as padding.
    Vector<A> x[kTokens][kRowVectors];
    int64_t slots[kTokens];
    QKV_UNROLL
    for (int i = 0; i < kTokens; i++) {
      slots[i] = -1;
      if (kScales == Scales::Dynamic) {
        QKV_UNROLL
        for (int j = 0; j < kRowVectors; j++) x[i][j] = zero_vector<A>(); // every lane takes part in the maximum
      }
      if (offset + i * side < limit) {
        slots[i] = slot_of[i * side];
        x[i][0] = stream_vector<A>(source + i * step_bytes);
        if (has_second) x[i][1] = stream_vector<A>(source + i * step_bytes + next_source);
      }
    }

    float dynamics[kTokens];
    uint32_t left = 0; // a bit for each vector that the fast path leaves
    QKV_UNROLL
    for (int i = 0; i < kTokens; i++) {
      const bool inside = static_cast<uint64_t>(slots[i]) < num_slots;
      is_outside |= !inside && slots[i] >= 0;
      if constexpr (kScales == Scales::Dynamic) {
        float absmax = maximum(vector_absmax(x[i][0]), vector_absmax(x[i][1]));
        for (int mask = lanes / 2; mask > 0; mask /= 2) absmax = maximum(absmax, shuffle_xor(absmax, mask));
        // Order survives a division by the one static scale: max |x / s| = max |x| / s.
        dynamics[i] = dynamic_scale(divide(absmax, fixed.one), format);
        if (dynamic != nullptr) {
          easy[0].set(0, combined_scale(fixed.one, dynamics[i]));
          store = store_of<A>(format, easy[0].are_easy());
          if (inside && place.lane == 0) dynamic[dynamic_scale_of_slot(p.paging, slots[i], head)] = dynamics[i];
        }
      }
      if (inside) {
        char *const codes = to.at(slots[i], p.paging);
        left |= store_token(store, codes, to.next_codes, has_second, x[i], easy) << (i * kRowVectors);
      }
    }

    // One element at a time, read again: code and registers for what is rare are not multiplied.
    QKV_NO_UNROLL
    for (int k = 0; left != 0; k++, left >>= 1) {
      if ((left & 1) == 0) continue;
      const int i = k / kRowVectors, j = k % kRowVectors;
      const int64_t slot = slot_of[i * side];
      if (static_cast<uint64_t>(slot) >= num_slots) continue; // nobody should have changed it
      // Dynamic scales leave no registers for what is this rare.
      RowScale scale = kScales == Scales::Dynamic ? static_scale_of_row() : fixed;
      if (kScales == Scales::Dynamic && dynamic != nullptr) {
        float own = dynamics[0];
        QKV_UNROLL
        for (int n = 1; n < kTokens; n++) own = n == i ? dynamics[n] : own;
        scale = with_dynamic(scale, own);
      }
      const T *from = reinterpret_cast<const T *>(source + i * step_bytes + j * next_source);
      store_elements(format, to.at(slot, p.paging) + j * to.next_codes, from, scale, channel_of(j));
    }
    source += kTokens * step_bytes;
    slot_of += kTokens * side;
  }
  if (any(is_outside) && forget(lane_index()) == 0) set_fault(p.paging.faults, QUANTKV_FAULT_SLOT);
}

template <class T> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 4) cache_write_elements(const CacheWriteParams p) {
  wait_for_previous_kernel();
  const int64_t first = global_warp(), warps = global_warps();
  const int64_t rows = p.op.num_tokens * p.share.rows;
  for (int64_t i = first; i < rows; i += warps) {
    const int64_t token = i / p.share.rows;
    const int row = static_cast<int>(i - token * p.share.rows);
    const bool is_key = row < p.paging.num_kv_heads;
    const int head = is_key ? row : row - p.paging.num_kv_heads;
    Paging paging = p.paging;
    if (row != 0 || lane_index() != 0) paging.faults = nullptr;
    int64_t block = 0;
    int offset = 0;
    if (!checked_slot(paging, p.op.slot_mapping[token], block, offset)) continue; // the same for the warp

    const quantkv_half half = choose_half(p.op.cache, is_key);
    const quantkv_rows from = choose_rows(p.op.key, p.op.value, is_key);
    const Format format = format_of(half);
    const T *x = static_cast<const T *>(from.data) + row_index(from, token, head);
    RowScale scale = {1.0f, nullptr, 0, 0.0f};
    if (is_quantized(format)) scale = static_row_scale(half.scale, head);
    if (is_quantized(format) && half.dynamic != nullptr) {
      float absmax = 0.0f;
      for (int d = lane_index(); d < half.head_dim; d += kWarp) {
        const float scaled = divide(to_f32(x[d]), scale.at(d));
        absmax = maximum(absmax, float_of(bits_of(scaled) & 0x7fffffffu));
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) absmax = maximum(absmax, shuffle_xor(absmax, mask));
      const float own = dynamic_scale(absmax, format);
      if (lane_index() == 0) half.dynamic[dynamic_scale_index(paging, block, head, offset)] = own;
      scale = with_dynamic(scale, own);
    }
    dispatch_format(format, [&](auto tag) {
      constexpr Format F = decltype(tag)::value;
      QKV_NO_UNROLL
      for (int d = lane_index(); d < half.head_dim; d += kWarp) {
        store_element<F>(half.codes, element_index(half, block, head, offset, d), x[d], scale.at(d));
      }
    });
  }
}

} // namespace quantkv
