// cache_write where the slots of a channel of V lie side by side (vLLM's packed rows): 16-bit activations, static scales.
//
// A warp takes kPackedTokens tokens of one (half, head), see cache_write.h. Lane l has
//   K   of token l % 8 every 4th vector of 8 channels, from l / 8 on: the eight tokens of a run are 128 bytes
//   V   two channels of all tokens, of kSpan: a load is two channels of a token, a store eight slots of a channel. Where the
//       slots of the tokens are side by side, as those of a prompt are, a store is a vector; else each code goes its way
#pragma once
#include "cache_write.h"

namespace quantkv {

constexpr int kPackedTokens = 8;
static_assert(kPackedTokens == kVector, "a vector of V is a channel's");

// Where a warp's tokens go; lane l knows that of token l % 8.
struct PackedPlace {
  int64_t block;
  int32_t offset;
  uint32_t inside; // a bit for each token that has a slot
  bool side_by_side; // all have, one after the other from a multiple of 8 on

  QKV_DEVICE bool has(int token) const { return (inside >> token & 1) != 0; }
};

QKV_DEVICE PackedPlace packed_place(const CacheWriteParams &p, int64_t first_token, bool reports) {
  const int own = lane_index() % kPackedTokens;
  const int64_t slot = first_token + own < p.op.num_tokens ? p.op.slot_mapping[first_token + own] : -1;
  Paging paging = p.paging;
  if (!reports) paging.faults = nullptr;
  PackedPlace place = {0, 0, 0, false};
  place.inside = ballot(checked_slot(paging, slot, place.block, place.offset)) & ((1u << kPackedTokens) - 1);
  const int32_t first_offset = shuffle(place.offset, 0);
  const uint32_t low = shuffle(static_cast<uint32_t>(place.block), 0);
  const bool follows = static_cast<uint32_t>(place.block) == low && place.offset == first_offset + own && first_offset % kPackedTokens == 0;
  place.side_by_side = place.inside == (1u << kPackedTokens) - 1 && ballot(!follows) == 0;
  return place;
}

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
    if (is_there) store_vector(to + (place.block * block_stride + place.offset - lane_index() % kPackedTokens) * bytes_of(F), codes);
    return;
  }
  QKV_UNROLL
  for (int token = 0; token < kPackedTokens; token++) {
    const uint32_t block = shuffle(static_cast<uint32_t>(place.block), token); // fewer than 2^31
    const int64_t slot = static_cast<int64_t>(block) * block_stride + shuffle(place.offset, token);
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

// kSpan channels of V of a head, from `first_channel` on.
template <Format F, Format A, bool kByChannel>
QKV_DEVICE void write_packed_span(const CacheWriteParams &p, const quantkv_half &half, int head, int64_t first_token, int first_channel,
                                  const PackedPlace &place) {
  using T = Stored<A>;
  const quantkv_rows &from = p.op.value;
  const int own = first_channel + 2 * lane_index();
  uint32_t pairs[kPackedTokens]; // channels own, own + 1 of each token
  QKV_UNROLL
  for (int token = 0; token < kPackedTokens; token++) {
    const T *x = static_cast<const T *>(from.data) + row_index(from, first_token + token, head) + own;
    pairs[token] = own < half.head_dim && place.has(token) ? load_stream(reinterpret_cast<const Words<1> *>(x)).w[0] : 0;
  }
  RowScale scales = {1.0f, nullptr, 0, 0.0f};
  if (is_quantized(F)) scales = static_row_scale(half.scale, head);
  EasyScales<false> easy;
  if (!kByChannel) easy.set(0, scales.one);
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
      if (kByChannel) easy.set(0, own < half.head_dim ? scales.at(own + i) : 1.0f);
      good[i] = ballot(quotient_codes<F>(made[i], x, easy) && easy.are_easy());
    }
  }
  QKV_UNROLL
  for (int i = 0; i < 2; i++) {
    const int lane = lane_index(), maker = i * (kWarp / 2) + lane / 2, channel = first_channel + i * kWarp + lane;
    const bool is_there = channel < half.head_dim, is_good = ((lane % 2 == 0 ? good[0] : good[1]) >> maker & 1) != 0;
    char *const to = static_cast<char *>(half.codes) + (head * half.map.head_stride + channel * half.map.chunk_stride) * bytes_of(F);
    store_slots(to, stored_codes(made, i), place, half.map.block_stride, is_there && is_good);
    if (is_there && !is_good) write_channel<F, T>(p, half, head, first_token, channel, scales.at(channel));
  }
}

template <Format A, bool kByChannel>
QKV_DEVICE void write_packed_values(const CacheWriteParams &p, int head, int64_t first_token, int first_channel, const PackedPlace &place) {
  const quantkv_half half = choose_half(p.op.cache, false);
  switch (format_of(half)) {
  case Format::E4M3: return write_packed_span<Format::E4M3, A, kByChannel>(p, half, head, first_token, first_channel, place);
  case Format::E5M2: return write_packed_span<Format::E5M2, A, kByChannel>(p, half, head, first_token, first_channel, place);
  default: return write_packed_span<A, A, kByChannel>(p, half, head, first_token, first_channel, place);
  }
}

template <Format A, bool kByChannel, int kAhead>
QKV_DEVICE void write_packed_keys(const CacheWriteParams &p, int head, int64_t first_token, const PackedPlace &place) {
  using T = Stored<A>;
  constexpr int kLanes = kWarp / kPackedTokens; // of a token
  const quantkv_half half = choose_half(p.op.cache, true);
  const Format format = format_of(half);
  const int token = lane_index() % kPackedTokens;
  if (!place.has(token)) return;
  const T *const row = static_cast<const T *>(p.op.key.data) + row_index(p.op.key, first_token + token, head);
  char *const codes = static_cast<char *>(half.codes) + row_index(half.map, place.block, head, place.offset) * bytes_of(half);
  RowScale scales = {1.0f, nullptr, 0, 0.0f};
  if (is_quantized(format)) scales = static_row_scale(half.scale, head);
  EasyScales<kByChannel> easy;
  if (!kByChannel) easy.set(0, scales.one);
  constexpr int kStep = kLanes * kVector;
  for (int first = lane_index() / kPackedTokens * kVector; first < half.head_dim; first += kAhead * kStep) {
    Vector<A> x[kAhead];
    QKV_UNROLL
    for (int j = 0; j < kAhead; j++) {
      if (first + j * kStep < half.head_dim) x[j] = stream_vector<A>(row + first + j * kStep);
    }
    QKV_UNROLL
    for (int j = 0; j < kAhead; j++) {
      const int channel = first + j * kStep;
      if (channel >= half.head_dim) break;
      QKV_UNROLL
      for (int i = 0; kByChannel && i < kVector; i++) easy.set(i, scales.at(channel + i));
      char *const to = codes + channel_index(half, channel) * bytes_of(half);
      if (!store_fast(store_of<A>(format, easy.are_easy()), to, x[j], easy)) store_elements(format, to, row + channel, scales, channel);
    }
  }
}

// Items [groups of tokens, rows]: a row is a head of K, or a span of a head of V. p.share.rows: rows. kAhead: vectors of K that a thread has on
// their way at a time.
template <Format A, bool kByChannel, int kAhead> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kRowThreads, 3) cache_write_packed(const CacheWriteParams p) {
  wait_for_previous_kernel();
  const int64_t groups = (p.op.num_tokens + kPackedTokens - 1) / kPackedTokens, items = groups * p.share.rows;
  const int heads = p.paging.num_kv_heads, spans = (p.op.cache.v.head_dim + kSpan - 1) / kSpan;
  for (int64_t i = global_warp(); i < items; i += global_warps()) {
    const int64_t group = i / p.share.rows, first_token = group * kPackedTokens;
    const int row = static_cast<int>(i - group * p.share.rows), span = row - heads, head = span / spans;
    const PackedPlace place = packed_place(p, first_token, row == 0);
    if (row < heads) write_packed_keys<A, kByChannel, kAhead>(p, row, first_token, place);
    else write_packed_values<A, kByChannel>(p, head, first_token, (span - head * spans) * kSpan, place);
  }
}

} // namespace quantkv
