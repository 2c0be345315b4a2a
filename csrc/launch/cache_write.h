// Launches of cache_write: vectors where rows, strides and scales allow it, elements everywhere else.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#include "../ops/cache_write_packed.h"

namespace quantkv {
namespace {

// Tokens of a thread: those whose loads its registers hold, and how many times as many it does at most.
template <Format A> constexpr int kTokensInFlight = A == Format::F32 ? 1 : 2;
constexpr int kMaxTurns = 4;

// Rows of a block where slots lie nearer than heads, so that it writes longer runs (on an H200, 8 heads of 128, E4M3: 32768 tokens 60.3
// to 55.7 us, 8192 16.5 to 15.7; 2, 4 or 16 rows: 55.7, 56.3, 57.7). Where heads are nearer, a block has all it can: 8 take 1 % longer.
constexpr int kNearSlotsRows = 8;

template <Format A, Scales kScales> int launch_vectors(CacheWriteParams &p, int width, void *stream) {
  constexpr int tokens = kTokensInFlight<A>;
  const quantkv_address_map &map = p.op.cache.k.map;
  const int most_rows = map.slot_stride < map.head_stride ? kNearSlotsRows : kRowThreads;
  p.share = share_rows(p.op.num_tokens, 2 * p.op.cache.num_kv_heads, width, kRowVectors, tokens * kMaxTurns, most_rows);
  const Grid grid = grid_of(p.share, p.op.num_tokens);
  return QKV_LAUNCH_OVERLAPPED((cache_write_vectors<A, kScales, tokens>), grid, kRowThreads, 0, stream, p);
}

template <class T> int launch_elements(CacheWriteParams &p, void *stream) {
  constexpr int64_t warps = kRowThreads / kWarp, most = 1 << 20;
  p.share = RowShare{5, 2 * p.op.cache.num_kv_heads, 1, 1, 1};
  const int64_t blocks = ceil_div(p.op.num_tokens * p.share.rows, warps);
  return QKV_LAUNCH_OVERLAPPED((cache_write_elements<T>), (Grid{blocks < most ? blocks : most, 1, 1}), kRowThreads, 0,
                               stream, p);
}

bool is_by_channel(const quantkv_half &half) {
  return is_quantized(format_of(half)) && half.scale.channel_stride != 0;
}

// Whether distances inside a block fit what RowToWrite keeps them in.
bool is_compact(const quantkv_half &half) {
  const int64_t chunks = half.map.chunk >= half.head_dim ? 1 : half.head_dim / half.map.chunk;
  const int64_t size = bytes_of(half), most = INT64_C(1) << 30;
  return half.map.slot_stride * size < most && chunks * half.map.chunk_stride * size < most;
}

// Whether the slots of a channel of V lie side by side, in whole vectors of 8 slots.
bool has_vectors_of_slots(const quantkv_half &v) {
  const int64_t size = bytes_of(v), alignment = vector_alignment(format_of(v));
  const quantkv_address_map &map = v.map;
  return slots_are_contiguous(v) && is_aligned(v.codes, alignment) && map.chunk_stride * size % alignment == 0 &&
         map.head_stride * size % alignment == 0 && map.block_stride * size % alignment == 0;
}

// Fewer are done sooner by a warp a row (on an H200: 32 of 8 heads 2.8 to 3.5 us, 256 5.6 to 4.6).
constexpr int64_t kManyTokens = 64;

// A warp takes more than one turn where that leaves so many blocks, and so many turns at most. (On an H200, 768 blocks: the same.)
constexpr int64_t kPackedBlocks = 512, kMostPackedTurns = 16;

template <Format A, bool kByChannel> int launch_packed(CacheWriteParams &p, void *stream) {
  const quantkv_cache &cache = p.op.cache;
  const int32_t spans = packed_spans(cache.k.head_dim, kKeySpan<kByChannel>) + packed_spans(cache.v.head_dim, kSpan);
  p.share = RowShare{5, spans * cache.num_kv_heads, 1, 1, 1};
  const int64_t groups = ceil_div(p.op.num_tokens, kPackedTokens), blocks = ceil_div(p.share.rows, kRowThreads / kWarp);
  if (blocks > kMaxHeads) return launch_elements<Stored<A>>(p, stream); // more than a grid's second dimension has
  while (2 * p.share.steps <= kMostPackedTurns && ceil_div(groups, 2 * p.share.steps) * blocks >= kPackedBlocks) p.share.steps *= 2;
  const Grid grid = {ceil_div(groups, p.share.steps), blocks, 1};
  return QKV_LAUNCH_OVERLAPPED((cache_write_packed<A, kByChannel>), grid, kRowThreads, 0, stream, p);
}

template <class T> int launch_activation(CacheWriteParams &p, void *stream) {
  constexpr Format A = FormatOf<T>::value;
  const quantkv_half &k = p.op.cache.k, &v = p.op.cache.v;
  const bool dynamic = has_dynamic_scales(p.op.cache), by_channel = is_by_channel(k) || is_by_channel(v);
  const bool rows = rows_have_vectors(p.op.key, p.op.activation, k.head_dim) && half_has_vectors(k) &&
                    rows_have_vectors(p.op.value, p.op.activation, v.head_dim);
  const bool vectors = rows && half_has_vectors(v) && is_compact(k) && is_compact(v);
  if constexpr (A != Format::F32) {
    const bool quick = store_of<A>(format_of(k), true) != Store::Elements && store_of<A>(format_of(v), true) != Store::Elements;
    const bool packed = rows && quick && !dynamic && has_vectors_of_slots(v) && (row_is_contiguous(k) || kKeyStep % k.map.chunk == 0);
    if (packed && p.op.num_tokens >= kManyTokens) return by_channel ? launch_packed<A, true>(p, stream) : launch_packed<A, false>(p, stream);
  }
  const int width = (k.head_dim > v.head_dim ? k.head_dim : v.head_dim) / kVector;
  if (!vectors || (dynamic && by_channel)) return launch_elements<T>(p, stream);
  if (dynamic) return launch_vectors<A, Scales::Dynamic>(p, width, stream);
  if (by_channel) return launch_vectors<A, Scales::Channel>(p, width, stream);
  return launch_vectors<A, Scales::One>(p, width, stream);
}

int launch_tokens(const quantkv_cache_write &op, void *stream) {
  CacheWriteParams p = {op, paging_of(op.cache), {}};
  switch (static_cast<Format>(op.activation)) {
  case Format::F32: return launch_activation<float>(p, stream);
  case Format::F16: return launch_activation<f16>(p, stream);
  default: return launch_activation<bf16>(p, stream);
  }
}

int check(const quantkv_cache_write &op) {
  QKV_CHECK(check_cache(op.cache));
  QKV_CHECK(check_rows(op.key, op.activation, op.num_tokens, op.cache.num_kv_heads, op.cache.k.head_dim));
  QKV_CHECK(check_rows(op.value, op.activation, op.num_tokens, op.cache.num_kv_heads, op.cache.v.head_dim));
  return valid_if(op.num_tokens == 0 || (op.slot_mapping != nullptr && is_aligned(op.slot_mapping, 8)));
}

} // namespace
} // namespace quantkv

int QKV_ENTRY(cache_write)(const quantkv_cache_write *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr) return QUANTKV_INVALID_ARGUMENT;
  QKV_CHECK(check(*op));
  quantkv_cache_write part = *op;
  part.cache = used_strides(op->cache);
  part.key = used_strides(op->key, op->num_tokens, op->cache.num_kv_heads);
  part.value = used_strides(op->value, op->num_tokens, op->cache.num_kv_heads);
  const int64_t size = bytes_of(static_cast<Format>(op->activation));
  for (int64_t done = 0; done < op->num_tokens; done += kMaxTokensPerGrid) {
    const int64_t left = op->num_tokens - done;
    part.num_tokens = left < kMaxTokensPerGrid ? left : kMaxTokensPerGrid;
    part.slot_mapping = op->slot_mapping + done;
    part.key.data = static_cast<char *>(op->key.data) + done * part.key.token_stride * size;
    part.value.data = static_cast<char *>(op->value.data) + done * part.value.token_stride * size;
    QKV_CHECK(launch_tokens(part, stream));
  }
  return QUANTKV_OK;
}
