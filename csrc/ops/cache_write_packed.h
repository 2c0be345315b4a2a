// cache_write where the slots of a channel of V lie side by side (vLLM's packed rows): 16-bit activations, static scales.
//
// A warp has a row, which is kKeySpan channels of a head of K or kSpan of V, and takes kPackedTokens tokens of it at a time. Lane l has
//   K   of token l % 8 every 4th vector of 8 channels, from l / 8 on, of kKeySpan: the eight tokens of a run are 128 bytes
//   V   two channels of all tokens, of kSpan: a load is two channels of a token, a store eight slots of a channel. Where the
//       slots of the tokens are side by side, as those of a prompt are, a store is a vector; else each code goes its way
#pragma once
#include "cache_write.h"

namespace quantkv {

constexpr int kPackedTokens = 8;
static_assert(kPackedTokens == kVector, "a vector of V is a channel's");
// Of K a lane has so many vectors of a token, kKeyStep channels apart; a warp has kKeySpan channels of a head.
constexpr int kKeyStep = kWarp / kPackedTokens * kVector;
template <bool kByChannel> constexpr int kKeyVectors = kByChannel ? 1 : 4; // scales by channel are kept
template <bool kByChannel> constexpr int kKeySpan = kKeyVectors<kByChannel> * kKeyStep;

QKV_HOST_DEVICE int packed_spans(int head_dim, int span) { return (head_dim + span - 1) / span; }

// Where a warp's tokens go; lane l knows that of token l % 8.
struct PackedPlace {
  int32_t block, offset;
  uint32_t inside;   // a bit for each token that has a slot
  bool side_by_side; // all have, one after the other from a multiple of 8 on

  QKV_DEVICE bool has(int token) const { return (inside >> token & 1) != 0; }
};

QKV_DEVICE PackedPlace packed_place(const CacheWriteParams &p, int64_t slot, bool reports) {
  const int own = lane_index() % kPackedTokens;
  Paging paging = p.paging;
  if (!reports) paging.faults = nullptr;
  int64_t block = 0;
  PackedPlace place = {0, 0, 0, false};
  place.inside = ballot(checked_slot(paging, slot, block, place.offset)) & ((1u << kPackedTokens) - 1);
  place.block = static_cast<int32_t>(block); // fewer than 2^31
  const int32_t first_offset = shuffle(place.offset, 0), first_block = shuffle(place.block, 0);
  const bool follows = place.block == first_block && place.offset == first_offset + own && first_offset % kPackedTokens == 0;
  place.side_by_side = place.inside == (1u << kPackedTokens) - 1 && ballot(!follows) == 0;
  return place;
}

// A warp's way through the tokens, kPackedTokens at a time: those at hand and the next ones, which are loaded meanwhile. All lanes.
struct PackedWalk {
  const CacheWriteParams &p;
  bool reports;
  int64_t first_token, slot; // of those at hand; this lane's of those after the next
  PackedPlace place, next;

  QKV_DEVICE PackedWalk(const CacheWriteParams &p, bool reports)
      : p(p), reports(reports), first_token(static_cast<int64_t>(block_index_x()) * kPackedTokens), place(packed_place(p, slot_of(0), reports)) {
    slot = slot_of(1);
  }
  static QKV_DEVICE int64_t step() { return static_cast<int64_t>(grid_size_x()) * kPackedTokens; }
  // `turn`: 0 for those at hand.
  QKV_DEVICE int64_t slot_of(int turn) const {
    const int64_t token = first_token + turn * step() + lane_index() % kPackedTokens;
    return token < p.op.num_tokens ? p.op.slot_mapping[token] : -1;
  }
  QKV_DEVICE bool has() const { return first_token < p.op.num_tokens; }
  QKV_DEVICE void look_ahead() {
    next = {0, 0, 0, false};
    if (first_token + step() >= p.op.num_tokens) return;
    next = packed_place(p, slot, reports);
    slot = slot_of(2);
  }
  QKV_DEVICE void go_on() {
    first_token += step();
    place = next;
  }
};

// What is not done by vectors: one channel of V of the tokens that have a slot, read again.
template <Format F, class T>
QKV_DEVICE void write_channel(const CacheWriteParams &p, const quantkv_half &half, int head, int64_t first_token, int channel, float scale) {
  const quantkv_rows &from = p.op.value;
  Paging paging = p.paging;
  paging.faults = nullptr; // they have been reported
  QKV_NO_UNROLL
  for (int64_t token = first_token; token < first_token + kPackedTokens && token < p.op.num_tokens; token++) {
    int64_t block = 0;
    int offset = 0;
    if (!checked_slot(paging, p.op.slot_mapping[token], block, offset)) continue;
    const T x = static_cast<const T *>(from.data)[row_index(from, token, head) + channel];
    store_element<F>(half.codes, element_index(half, block, head, offset, channel), x, scale);
  }
}

// Codes of 8 tokens to the slots of a channel: `to` is where the channel has slot 0 of block 0. All lanes come here.
template <Format F>
QKV_DEVICE void store_slots(char *to, const Vector<F> &codes, const PackedPlace &place, int64_t block_stride, bool is_there) {
  if (place.side_by_side) {
    if (is_there) store_vector(to + (static_cast<int64_t>(place.block) * block_stride + place.offset - lane_index() % kPackedTokens) * bytes_of(F), codes);
    return;
  }
  QKV_UNROLL
  for (int token = 0; token < kPackedTokens; token++) {
    const int64_t slot = static_cast<int64_t>(shuffle(place.block, token)) * block_stride + shuffle(place.offset, token);
    const uint32_t word = codes.w[token * bytes_of(F) / 4] >> token * bytes_of(F) % 4 * 8;
    if (!is_there || !place.has(token)) continue;
    if constexpr (bytes_of(F) == 1) reinterpret_cast<uint8_t *>(to)[slot] = static_cast<uint8_t>(word);
    else reinterpret_cast<uint16_t *>(to)[slot] = static_cast<uint16_t>(word);
  }
}

// A channel's codes are made by lane channel / 2 of the kSpan that a warp takes, and stored by lane channel % kWarp, so that what a
// warp stores lies side by side: there the channels lane and lane + kWarp.
constexpr int kSpan = 2 * kWarp;

template <Format F> QKV_DEVICE Vector<F> stored_codes(const Vector<F> (&made)[2], int half) {
  const int lane = lane_index(), from = half * (kWarp / 2) + lane / 2;
  Vector<F> codes;
  QKV_UNROLL
  for (int i = 0; i < Vector<F>::kWords; i++) {
    const uint32_t even = shuffle(made[0].w[i], from), odd = shuffle(made[1].w[i], from);
    codes.w[i] = lane % 2 == 0 ? even : odd;
  }
  return codes;
}

// kSpan channels of V of a head, from `first_channel` on, of all tokens of this warp.
template <Format F, Format A, bool kByChannel>
QKV_DEVICE void write_packed_span(const CacheWriteParams &p, const quantkv_half &half, int head, int first_channel) {
  using T = Stored<A>;
  const quantkv_rows &from = p.op.value;
  const int own = first_channel + 2 * lane_index();
  RowScale scales = {1.0f, nullptr, 0, 0.0f};
  if (is_quantized(F)) scales = static_row_scale(half.scale, head);
  EasyScales<false> easy[kByChannel ? 2 : 1];
  QKV_UNROLL
  for (int i = 0; i < (kByChannel ? 2 : 1); i++) easy[i].set(0, !kByChannel ? scales.one : own < half.head_dim ? scales.at(own + i) : 1.0f);
  uint32_t pairs[kPackedTokens], next[kPackedTokens]; // channels own, own + 1 of each token
  const auto load = [&](int64_t first_token, const PackedPlace &place, uint32_t(&to)[kPackedTokens]) {
    const T *x = static_cast<const T *>(from.data) + row_index(from, first_token, head) + own;
    QKV_UNROLL
    for (int token = 0; token < kPackedTokens; token++, x += from.token_stride) {
      to[token] = own < half.head_dim && place.has(token) ? load_stream(reinterpret_cast<const Words<1> *>(x)).w[0] : 0;
    }
  };
  PackedWalk walk(p, false);
  load(walk.first_token, walk.place, pairs);
  QKV_NO_UNROLL
  for (; walk.has(); walk.go_on()) {
    walk.look_ahead();
    load(walk.first_token + walk.step(), walk.next, next);
    Vector<F> made[2];
    uint32_t good[2]; // a bit for each lane that made them
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      Vector<A> x;
      QKV_UNROLL
      for (int j = 0; j < kPackedTokens / 2; j++) x.w[j] = byte_permute(pairs[2 * j], pairs[2 * j + 1], i == 0 ? 0x5410 : 0x7632);
      if constexpr (F == A) {
        made[i] = x;
        good[i] = ~0u;
      } else {
        const EasyScales<false> &scale = easy[kByChannel ? i : 0];
        good[i] = ballot(quotient_codes<F>(made[i], x, scale) && scale.are_easy());
      }
    }
    uint32_t left = 0; // a bit for each channel of this lane's that is to be done element by element
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      const int lane = lane_index(), maker = i * (kWarp / 2) + lane / 2, channel = first_channel + i * kWarp + lane;
      const bool is_there = channel < half.head_dim, is_good = ((lane % 2 == 0 ? good[0] : good[1]) >> maker & 1) != 0;
      char *const to = static_cast<char *>(half.codes) + (head * half.map.head_stride + channel * half.map.chunk_stride) * bytes_of(F);
      store_slots(to, stored_codes(made, i), walk.place, half.map.block_stride, is_there && is_good);
      if (is_there && !is_good) left |= 1u << i;
    }
    QKV_NO_UNROLL
    for (int i = 0; left >> i != 0; i++) {
      const int channel = first_channel + i * kWarp + lane_index();
      if ((left >> i & 1) != 0) write_channel<F, T>(p, half, head, walk.first_token, channel, scales.at(channel));
    }
    QKV_UNROLL
    for (int token = 0; token < kPackedTokens; token++) pairs[token] = next[token];
  }
}

template <Format A, bool kByChannel> QKV_DEVICE void write_packed_values(const CacheWriteParams &p, int head, int first_channel) {
  const quantkv_half half = choose_half(p.op.cache, false);
  switch (format_of(half)) {
  case Format::E4M3: return write_packed_span<Format::E4M3, A, kByChannel>(p, half, head, first_channel);
  case Format::E5M2: return write_packed_span<Format::E5M2, A, kByChannel>(p, half, head, first_channel);
  default: return write_packed_span<A, A, kByChannel>(p, half, head, first_channel);
  }
}

// kVectors * kKeyStep channels of K of a head, from `first_channel` on, of all tokens of this warp.
template <Format A, bool kByChannel, int kVectors> QKV_DEVICE void write_packed_keys(const CacheWriteParams &p, int head, int first_channel) {
  using T = Stored<A>;
  const quantkv_half half = choose_half(p.op.cache, true);
  const Format format = format_of(half);
  const int token = lane_index() % kPackedTokens, own = first_channel + lane_index() / kPackedTokens * kVector;
  // Of this lane's first vector in a row, and from one of its vectors to the next; bytes.
  const int64_t first = channel_index(half, own) * bytes_of(half);
  const int64_t step = (row_is_contiguous(half) ? kKeyStep : kKeyStep / half.map.chunk * half.map.chunk_stride) * bytes_of(half);
  RowScale scales = {1.0f, nullptr, 0, 0.0f};
  if (is_quantized(format)) scales = static_row_scale(half.scale, head);
  EasyScales<kByChannel> easy;
  static_assert(!kByChannel || kVectors == 1, "scales of one vector are kept");
  QKV_UNROLL
  for (int i = 0; i < (kByChannel ? kVector : 1); i++) easy.set(i, !kByChannel ? scales.one : own < half.head_dim ? scales.at(own + i) : 1.0f);
  const auto row_of = [&](int64_t first_token) {
    return static_cast<const T *>(p.op.key.data) + row_index(p.op.key, first_token + token, head) + own;
  };
  const int vectors = (half.head_dim - own + kKeyStep - 1) / kKeyStep; // of a row, from own on; kVectors of them are this lane's
  Vector<A> x[kVectors];
  const auto load = [&](const T *row, const PackedPlace &place, int j) {
    if (place.has(token) && j < vectors) x[j] = stream_vector<A>(row + j * kKeyStep);
  };
  PackedWalk walk(p, head == 0 && first_channel == 0);
  QKV_UNROLL
  for (int j = 0; j < kVectors; j++) load(row_of(walk.first_token), walk.place, j);
  QKV_NO_UNROLL
  for (; walk.has(); walk.go_on()) {
    walk.look_ahead();
    const T *const next_row = row_of(walk.first_token + walk.step());
    char *const codes = static_cast<char *>(half.codes) + row_index(half.map, walk.place.block, head, walk.place.offset) * bytes_of(half) + first;
    uint32_t left = 0; // a bit for each vector that is to be done element by element
    QKV_UNROLL
    for (int j = 0; j < kVectors; j++) {
      const Vector<A> now = x[j];
      load(next_row, walk.next, j);
      if (!walk.place.has(token) || j >= vectors) continue;
      if (!store_fast(store_of<A>(format, easy.are_easy()), codes + j * step, now, easy)) left |= 1u << j;
    }
    QKV_NO_UNROLL
    for (int j = 0; left >> j != 0; j++) {
      if ((left >> j & 1) == 0) continue;
      store_elements(format, codes + j * step, row_of(walk.first_token) + j * kKeyStep, scales, own + j * kKeyStep);
    }
  }
}

// Blocks of a multiprocessor: three, unless the compiler would spill some registers for them.
constexpr int packed_blocks(int compute_capability) { return compute_capability == 89 || compute_capability >= 100 ? 2 : 3; }

// Grid: groups of tokens, of which a block has every grid_size_x()-th; rows, a warp each, spans of heads of K before those of V.
// p.share.rows: rows.
template <Format A, bool kByChannel>
QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, packed_blocks(QKV_COMPUTE_CAPABILITY)) cache_write_packed(const CacheWriteParams p) {
  wait_for_previous_kernel();
  const quantkv_cache &cache = p.op.cache;
  const int row = block_index_y() * (kRowThreads / kWarp) + warp_index();
  if (row >= p.share.rows) return;
  const int spans_of_keys = packed_spans(cache.k.head_dim, kKeySpan<kByChannel>), spans = packed_spans(cache.v.head_dim, kSpan);
  const int of_values = row - spans_of_keys * p.paging.num_kv_heads;
  if (of_values < 0) write_packed_keys<A, kByChannel, kKeyVectors<kByChannel>>(p, row / spans_of_keys, row % spans_of_keys * kKeySpan<kByChannel>);
  else write_packed_values<A, kByChannel>(p, of_values / spans, of_values % spans * kSpan);
}

} // namespace quantkv
