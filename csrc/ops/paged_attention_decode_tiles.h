// The decode kernel's way from the cache to registers: its numbers, tiles of 16 tokens, and their loads. The idea is in
// paged_attention_decode.h.
#pragma once
#include "../core/fp8.h"
#include "paged_attention.h"

namespace quantkv {

// No scale is smaller: 2^-126. And 2^126.
constexpr float kSmallestScale = 1.17549435e-38f, kLargestUnit = 8.50705917e37f;

// Of a power of two between these.
QKV_DEVICE float inverse_of(float power) { return float_of(0x7f000000u - bits_of(power)); }

// The inverse of the power of two at or below a scale: scales are normal, so it is, too, and its inverse, up to 2^126.
QKV_DEVICE float inverse_unit(float scale) {
  return inverse_of(float_of(bits_of(scale < kLargestUnit ? scale : kLargestUnit) & 0x7f800000u));
}

constexpr int kLine = 128; // bytes of a line of L2

// Bytes of one load, where `lanes` lanes share `bytes`.
constexpr int load_width(int bytes, int lanes) {
  return bytes / lanes % 16 == 0 ? 16 : bytes / lanes % 8 == 0 ? 8 : 4;
}

constexpr int kPackedRun = 16; // bytes of a K row that lie side by side when packed

// The numbers of one instantiation: format F of K and V, head dim D of both, tiles of 8 query rows, dynamic scales.
template <Format F, int D, int RowTiles, bool Dynamic, Order O> struct DecodeShape {
  static_assert(F != Format::F32, "f32 is not a tensor core type here");
  static_assert(D % 32 == 0, "a lane's share of a V row is whole words");
  static_assert(!Dynamic || is_quantized(F), "only quantized rows have scales");
  static_assert(!Dynamic || O == Order::Rows, "scales of packed rows are not looked for");
  static constexpr int kElement = bytes_of(F);
  // Tokens of a product, and of the tile a warp takes at a time: several products where rows are short, so that a lane has
  // 64 bytes of K and V on their way.
  static constexpr int kPart = 16, kParts = RowTiles == 1 && D * kElement <= 64 ? 2 : 1;
  static constexpr int kTile = kParts * kPart;
  static constexpr int kDim = D;
  static constexpr bool kDynamic = Dynamic;
  static constexpr bool kPacked = O == Order::Packed;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = RowTiles;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = 8 * RowTiles;
  static constexpr int kWidthK = load_width(D * kElement, 4);
  static constexpr int kWidthV = load_width(D * kElement, 8);
  static constexpr int kWordsK = D * kElement / 16; // of one K row, a lane
  static constexpr int kWordsV = D * kElement / 32; // of one V row, a lane
  static constexpr int kSteps = D / 16;             // of S; also 16-channel tiles of O^T
  static constexpr bool kBf16 = F == Format::BF16;  // bf16 products; else f16
  // K is loaded in whole lines of L2, eight lanes a line, where rows are whole lines and the product that it takes has
  // registers for its sums: see multiply_lines().
  static constexpr bool kWholeLines = !kPacked && RowTiles == 1 && D * kElement % kLine == 0;
  static constexpr int kLines = D * kElement / kLine; // of a row

  // What a lane keeps: O, K, V, and what softmax needs. Two tiles of V (the one in use, the one on its way) are better,
  // where 3 blocks an SM have the registers for them. Measured limits: nothing spills.
  static constexpr int kKept = RowTiles * (kSteps * 4 + 12) + kParts * (2 * kWordsK + 4 * kWordsV);
  static constexpr int kWithAhead = kKept + kParts * 4 * kWordsV;
  static constexpr int kMostOfThree = RowTiles == 1 ? 120 : 136;
  static constexpr int kMostBlocks = kWithAhead <= 92 ? 4 : kWithAhead <= kMostOfThree || kKept <= 104 ? 3 : 2;
  static constexpr bool kValuesAhead = kWithAhead <= (kMostBlocks == 3 ? kMostOfThree : kDynamic ? 188 : 200);
  // Not even K of the next tile beside V of this one: V is asked for when K is used up, and the other way round.
  static constexpr bool kNothingAhead = kKept > 200;
  // Where there are registers to spare beside a tile on its way, the next piece is looked for between two tiles.
  static constexpr bool kLooksLate = kWithAhead <= 184;
  // Rows that engines pack have 128 channels where a KV head has more than 8 query rows: others are not worth their compilation.
  static constexpr bool kFits = kKept <= 204 && (!kPacked || RowTiles == 1 || D == 128);

  // Where scales are dynamic, and by the compiler for sm_100 and newer, there is no register for what follows from these: it is
  // computed again.
  static constexpr bool kRereads = kDynamic || QKV_COMPUTE_CAPABILITY >= 100;
  static QKV_DEVICE int reread_lane() { return kRereads ? forget(lane_index()) : lane_index(); }
  static QKV_DEVICE int reread_thread() { return kRereads ? reread_thread_index() : thread_index(); }

  // Which token of a part this lane's scores c[2 * pair], c[2 * pair + 1] are of. Rarely asked for: not to be kept.
  static QKV_DEVICE int score_token(int pair) {
    const int g = forget(lane_index()) / 4;
    if (kPacked) return g / 2 * 4 + g % 2 + 2 * pair; // so that a lane's values are of four that lie side by side
    return kWholeLines ? g % 2 * 8 + g / 2 + 4 * pair : g + 8 * pair;
  }
  // Which token this lane's row `row` of V is. Rows 0 .. 3 meet the weights of c's rows 2t, 2t + 1, 2t + 8, 2t + 9.
  static QKV_DEVICE int value_token(int row) {
    const int t = forget(lane_index()) % 4;
    if (kPacked) return 4 * t + row;
    return kWholeLines ? t + 8 * (row % 2) + 4 * (row / 2) : 2 * t + row % 2 + 8 * (row / 2);
  }

  // Registers of three blocks may be enough for this shape, of which two a multiprocessor are faster (192 channels of 8 bits).
  static constexpr bool kMayFitMore = kMostBlocks == 2 && kWithAhead < 140;

  // Before Hopper addresses and conversions take a few registers more; the compiler for sm_100 and newer, too, for 16 rows and
  // for dynamic scales.
  static constexpr int blocks_on(int compute_capability) {
    if (compute_capability >= 100 && kMostBlocks == 3 && kWithAhead > 120) return 2;
    if (compute_capability >= 100 && kMostBlocks == 4 && kDynamic) return 3;
    return compute_capability >= 90 || kMostBlocks == 1 ? kMostBlocks : kMostBlocks - 1;
  }

  // Others' pieces that a thread has on their way when it merges, and how many are merged in one step.
  static constexpr int kAtOnce = 7, kMostPieces = 15;

  // Shared memory: O [warps, rows, kStride] f32, then (max, sum) [warps, rows]. A row holds the pairs of channels of
  // each 16-channel tile side by side, lane / 4 of them, and pads that keep lanes on different banks: see shared_pair().
  static constexpr int kTileStride = 20, kStride = kSteps * kTileStride + 4;
  static constexpr int kSharedBytes = 4 * kWarps * kRows * (kStride + 2);
};

// Whether a part lies in two blocks: those of 8 slots, the smallest there are.
QKV_DEVICE bool is_halved(const AttentionParams &params) { return params.paging.block_shift == 3; }

// The tiles one warp attends to in a piece, and where they lie. Blocks and offsets inside a block fit 32 bits.
template <class Shape> struct DecodeTiles {
  static constexpr int kRound = Shape::kWarps * Shape::kParts; // parts that all warps take at a time
  const AttentionParams &params;
  const Piece &piece;           // in shared memory
  int32_t first;                // the warp's first tile: position / kPart
  int32_t count;                // of this warp
  int32_t blocks, next_blocks;  // of a batch of tiles, and of the one after it

  // Does not look up any block yet.
  QKV_DEVICE DecodeTiles(const AttentionParams &params, const Piece &piece) : params(params), piece(piece) {
    // Positions are not negative, which the compiler does not know: divisions of unsigned numbers are shifts.
    first = static_cast<uint32_t>(piece.begin) / Shape::kPart + warp_index() * Shape::kParts;
    const int32_t end = (static_cast<uint32_t>(piece.end) + Shape::kPart - 1) / Shape::kPart;
    count = static_cast<uint32_t>(larger_of(end - first, 0) + kRound - 1) / kRound;
  }

  // This lane's part of its first row of K and of V in block 0 of the piece's head: addresses, low word first.
  QKV_DEVICE Words<4> bases() const {
    const uint32_t lane = forget(lane_index()), g = lane / 4, t = lane % 4;
    const quantkv_cache &cache = params.op.cache;
    uint64_t k, v;
    if constexpr (Shape::kPacked) {
      const uint32_t mask = halved() ? 7 : 15, part = t * Shape::kWidthK;
      k = base(cache.k, Shape::score_token(0) & mask, part / kPackedRun * bytes(cache.k.map.chunk_stride) + part % kPackedRun);
      v = base(cache.v, 4 * t & mask, g * bytes(cache.v.map.chunk_stride));
    } else {
      k = base(cache.k, Shape::kWholeLines ? lane / 8 : g, (Shape::kWholeLines ? lane % 8 : t) * Shape::kWidthK);
      v = base(cache.v, Shape::kWholeLines ? t : 2 * t, g * Shape::kWidthV);
    }
    return {{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32), static_cast<uint32_t>(v), static_cast<uint32_t>(v >> 32)}};
  }

  QKV_DEVICE uint64_t base(const quantkv_half &half, uint32_t row, uint32_t part) const {
    return reinterpret_cast<uint64_t>(half.codes) + bytes(piece.kv_head * half.map.head_stride + row * half.map.slot_stride) + part;
  }

  static QKV_DEVICE uint32_t bytes(int64_t elements) { return static_cast<uint32_t>(elements) * Shape::kElement; }

  QKV_DEVICE bool halved() const { return is_halved(params); }

  // Tiles of a batch: a lane keeps the block of a part, or of half a one if blocks have 8 slots.
  QKV_DEVICE int32_t batch() const { return (halved() ? kWarp / 2 : kWarp) / Shape::kParts; }

  QKV_DEVICE int32_t position(int32_t n) const { return (first + n * kRound) * Shape::kPart; }

  // The table's entry for this lane's block of the batch that begins with tile n; null if it has none.
  QKV_DEVICE const int32_t *entry(int32_t n) const {
    const int lane = forget(lane_index()), part = halved() ? lane / 2 : lane;
    n += part / Shape::kParts;
    if (n >= count) return nullptr;
    int32_t at = position(n) + part % Shape::kParts * Shape::kPart + (halved() ? 8 * (lane % 2) : 0);
    int32_t size = halved() ? 8 : Shape::kPart;
    if (at >= piece.end || at + size <= piece.begin) return nullptr;
    return params.op.block_tables + piece.seq * params.op.block_table_stride + (at >> params.paging.block_shift);
  }

  // What the entry holds, or -1 and a fault if that is no block of the cache.
  QKV_DEVICE int32_t checked(const int32_t *entry, int32_t block) const {
    return entry != nullptr && checked_block(params.paging, block) ? block : -1;
  }

  // This lane's block of the batch that begins with tile n.
  QKV_DEVICE int32_t find(int32_t n) const {
    const int32_t *at = entry(n);
    return checked(at, at != nullptr ? *at : 0);
  }

  // Asks L2 for the first tiles of the piece, before the kernel may read anything: tables and the cache may be in the
  // making, and what they hold now says no more than where it is worth while to look. A lane has a row of each part,
  // lane % 16 of K or from lane 16 on of V; or, packed, as much of all 16.
  QKV_DEVICE void prefetch(int32_t tiles) const {
    const quantkv_cache &cache = params.op.cache;
    const int32_t *at = entry(0);
    const int32_t now = at != nullptr ? load_unsettled(at) : -1, blocks = is_block(params.paging, now) ? now : -1;
    const int32_t lane = forget(lane_index()), own = lane % 16;
    const bool is_key = lane < 16;
    const quantkv_address_map &k = cache.k.map, &v = cache.v.map;
    const uint32_t slot_bytes = bytes(is_key ? k.slot_stride : v.slot_stride);
    const int64_t block_bytes = (is_key ? k.block_stride : v.block_stride) * Shape::kElement;
    uint32_t first = (halved() ? own % 8 : own) * slot_bytes, step = kLine; // of this lane's lines
    if constexpr (Shape::kPacked) {
      // Two lanes share kPackedRun bytes of each row, which are a run of K, channels of V; a lane has half of their slots, or of V half
      // of their channels.
      const uint32_t chunk = bytes(is_key ? k.chunk_stride : v.chunk_stride), runs = is_key ? 1 : kPackedRun / Shape::kElement;
      first = own / 2 * runs * chunk + (halved() ? 0 : own % 2 * (is_key ? kLine : runs / 2 * chunk));
      step = kLine / kPackedRun * runs * chunk;
    }
    const unsigned char *codes = static_cast<const unsigned char *>(is_key ? cache.k.codes : cache.v.codes) +
                                 bytes(piece.kv_head * (is_key ? k.head_stride : v.head_stride)) + first;
    QKV_NO_UNROLL
    for (int32_t n = 0; n < tiles * Shape::kParts; n++) {
      const int32_t block = shuffle(blocks, halved() ? 2 * n + (Shape::kPacked ? own % 2 : own / 8) : n);
      const uint32_t at = position(n / Shape::kParts) + n % Shape::kParts * Shape::kPart;
      const uint32_t slot = at & ((1u << params.paging.block_shift) - 1);
      if (block < 0) continue;
      QKV_UNROLL
      for (int i = 0; i < Shape::kDim * Shape::kElement; i += kLine) {
        if (Shape::kPacked && i + own * 8 >= Shape::kDim * Shape::kElement) break;
        prefetch_l2(codes + block * block_bytes + slot * slot_bytes + i / kLine * step);
      }
    }
  }

  // Makes `blocks` those of the batch that begins with tile n, and asks for the next.
  QKV_DEVICE void begin_batch(int32_t n) {
    blocks = next_blocks;
    next_blocks = find(n + batch());
  }
};

// Positions `begin` .. + `span`: of tiles that every row of a piece sees.
struct SeenByAll {
  uint32_t begin, span;

  SeenByAll() = default;
  QKV_DEVICE SeenByAll(const AttentionParams &params, const Piece &piece, int32_t tile) {
    const int32_t last_first = visible_to(params, piece.first_position + piece.num_queries - 1).first;
    const int32_t first = larger_of(piece.begin, last_first), last = smaller_of(piece.end, piece.first_position + 1) - tile;
    begin = first <= last ? first : 0xffffffffu; // no position is that, nor behind it
    span = first <= last ? last - first : 0;
  }
  QKV_DEVICE bool has(int32_t position) const { return static_cast<uint32_t>(position) - begin <= span; }
};

// Which halves of a part lie in blocks of the cache: bit 0 tokens 0-7, bit 1 tokens 8-15.
struct PartHalves {
  int32_t bits;

  QKV_DEVICE bool both() const { return bits == 3; }
  // Whether `token` of the part at `position` is one the piece has keys of.
  QKV_DEVICE bool has(const Piece &piece, int32_t position, int32_t token) const {
    return (bits >> token / 8 & 1) != 0 && position + token >= piece.begin && position + token < piece.end;
  }
};

// Dynamic scales of 16 tokens, in shared memory.
struct TileScales {
  float k[16], v[16];
};

// What a lane has of 16 tokens.
template <class Shape> struct TilePart {
  uint32_t k[2][Shape::kWordsK], v[4][Shape::kWordsV];
  PartHalves halves;

  // Word `j` of the four tokens' values of channel 8 * channel + g, where rows are packed.
  QKV_DEVICE uint32_t &packed_v(int channel, int j) {
    const int i = channel * Shape::kElement + j;
    return v[i / Shape::kWordsV][i % Shape::kWordsV];
  }
  QKV_DEVICE uint32_t packed_v(int channel, int j) const { return const_cast<TilePart &>(*this).packed_v(channel, j); }

  // Zeroes what no product may meet: values of tokens the piece does not have, whatever bits are there. Their weight is
  // zero, but zero times NaN is not. (Their keys do no harm: the score is replaced.)
  QKV_DEVICE void drop_missing(const Piece &piece, int32_t position) {
    if constexpr (Shape::kPacked) {
      drop_missing_packed(piece, position);
    } else {
      QKV_UNROLL
      for (int row = 0; row < 4; row++) {
        if (halves.has(piece, position, Shape::value_token(row))) continue;
        QKV_UNROLL
        for (int i = 0; i < Shape::kWordsV; i++) v[row][i] = 0;
      }
    }
  }

  QKV_DEVICE void drop_missing_packed(const Piece &piece, int32_t position) {
    constexpr int kTokens = 4 / Shape::kElement; // of a word
    uint32_t kept[Shape::kElement] = {};
    QKV_UNROLL
    for (int row = 0; row < 4; row++) {
      const uint32_t element = (0xffffffffu >> (32 - 8 * Shape::kElement)) << row % kTokens * 8 * Shape::kElement;
      if (halves.has(piece, position, Shape::value_token(row))) kept[row / kTokens] |= element;
    }
    QKV_UNROLL
    for (int i = 0; i < 2 * Shape::kSteps; i++) {
      QKV_UNROLL
      for (int j = 0; j < Shape::kElement; j++) packed_v(i, j) &= kept[j];
    }
  }
};

// Runs of Width bytes, `step` apart.
template <int Width, int Words> QKV_DEVICE void load_row(uint32_t (&out)[Words], const unsigned char *row, uint32_t step) {
  constexpr int count = Width / 4;
  QKV_UNROLL
  for (int i = 0; i < Words / count; i++) {
    auto words = load_stream(reinterpret_cast<const quantkv::Words<count> *>(row + i * step));
    QKV_UNROLL
    for (int j = 0; j < count; j++) out[i * count + j] = words.w[j];
  }
}

// A part of a tile on its way to a lane's registers. No load waits for a decision: rows the piece does not have are read from
// where they would be, or from block 0, and made harmless when they are used.
template <class Shape> struct PartLoader {
  int32_t low, high;        // blocks of tokens 0-7 and 8-15; negative: not in the cache
  uint32_t slot, slot_high; // of token 0, of token 8
  int32_t kv_head;
  uint64_t k[2], v[2];      // addresses of this lane's first row in each half

  // The blocks of a part, number `in_batch` of those that the lanes' `batch_blocks` are for; a while before aim(), since it takes one.
  QKV_DEVICE void look(const AttentionParams &params, int32_t batch_blocks, int32_t in_batch) {
    const bool halved = is_halved(params);
    low = high = shuffle(batch_blocks, halved ? 2 * in_batch : in_batch);
    if (halved) high = shuffle(batch_blocks, 2 * in_batch + 1);
  }

  // That part, at `position` of a piece of `head`.
  QKV_DEVICE void aim(const AttentionParams &params, const Words<4> &bases, int32_t head, int32_t position) {
    const quantkv_cache &cache = params.op.cache;
    slot = position & ((1u << params.paging.block_shift) - 1);
    slot_high = slot + 8;
    kv_head = head;
    if constexpr (Shape::kPacked) aim_packed(cache, bases);
    else aim_rows(params, bases);
  }

  QKV_DEVICE void aim_rows(const AttentionParams &params, const Words<4> &bases) {
    const quantkv_cache &cache = params.op.cache;
    const uint64_t k_base = first_word(bases, 0), v_base = first_word(bases, 2);
    k[0] = row(k_base, cache.k, low, slot);
    v[0] = row(v_base, cache.v, low, slot);
    k[1] = k[0] + 8 * slot_bytes(cache.k);
    v[1] = v[0] + 8 * slot_bytes(cache.v);
    if (is_halved(params)) {
      slot_high = 0;
      k[1] = row(k_base, cache.k, high, 0);
      v[1] = row(v_base, cache.v, high, 0);
    }
  }

  // All of a lane's tokens are of one half.
  QKV_DEVICE void aim_packed(const quantkv_cache &cache, const Words<4> &bases) {
    int32_t of_keys = low, of_values = low;
    if (low != high) {
      const int lane = forget(lane_index());
      if (lane >= kWarp / 2) of_keys = high; // g >= 4
      if (lane % 4 >= 2) of_values = high;
    }
    k[0] = row(first_word(bases, 0), cache.k, of_keys, slot);
    k[1] = k[0] + 2 * kPackedRun; // two tokens on
    v[0] = row(first_word(bases, 2), cache.v, of_values, slot);
  }

  static QKV_DEVICE uint64_t first_word(const Words<4> &bases, int i) { return static_cast<uint64_t>(bases.w[i + 1]) << 32 | bases.w[i]; }

  static QKV_DEVICE uint32_t slot_bytes(const quantkv_half &half) { return DecodeTiles<Shape>::bytes(half.map.slot_stride); }

  static QKV_DEVICE uint64_t row(uint64_t base, const quantkv_half &half, int32_t block, uint32_t slot) {
    const uint32_t index = static_cast<uint32_t>(larger_of(block, 0)), block_bytes = DecodeTiles<Shape>::bytes(half.map.block_stride);
    return base + static_cast<uint64_t>(index) * block_bytes + static_cast<uint64_t>(slot) * slot_bytes(half);
  }

  QKV_DEVICE PartHalves halves() const { return {(low >= 0 ? 1 : 0) | (high >= 0 ? 2 : 0)}; }

  // Tokens g, g + 8. Or whole lines, of each half those of tokens lane / 8 and lane / 8 + 4: four words of the one,
  // four of the other, and so on from line to line.
  QKV_DEVICE void keys(const quantkv_half &half, uint32_t (&out)[2][Shape::kWordsK]) const {
    if constexpr (Shape::kWholeLines) {
      QKV_UNROLL
      for (int i = 0; i < 2; i++) {
        const uint64_t second = k[i] + 4 * slot_bytes(half);
        QKV_UNROLL
        for (int line = 0; line < Shape::kLines; line++) {
          const Words<4> a = load_stream(reinterpret_cast<const Words<4> *>(k[i] + line * kLine));
          const Words<4> b = load_stream(reinterpret_cast<const Words<4> *>(second + line * kLine));
          QKV_UNROLL
          for (int j = 0; j < 4; j++) {
            out[i][8 * line + j] = a.w[j];
            out[i][8 * line + 4 + j] = b.w[j];
          }
        }
      }
    } else {
      const uint32_t step = Shape::kPacked ? 4 * Shape::kWidthK / kPackedRun * DecodeTiles<Shape>::bytes(half.map.chunk_stride) : 4 * Shape::kWidthK;
      QKV_UNROLL
      for (int i = 0; i < 2; i++) load_row<Shape::kWidthK>(out[i], reinterpret_cast<const unsigned char *>(k[i]), step);
    }
  }

  // Tokens value_token(0 .. 3) of the lane; packed, they lie side by side, of every 8th channel.
  QKV_DEVICE void values(const quantkv_half &half, TilePart<Shape> &out) const {
    if constexpr (Shape::kPacked) {
      const uint32_t step = 8 * DecodeTiles<Shape>::bytes(half.map.chunk_stride);
      QKV_UNROLL
      for (int i = 0; i < 2 * Shape::kSteps; i++) {
        const auto words = load_stream(reinterpret_cast<const Words<Shape::kElement> *>(v[0] + i * step));
        QKV_UNROLL
        for (int j = 0; j < Shape::kElement; j++) out.packed_v(i, j) = words.w[j];
      }
    } else {
      rows_of_values(half, out.v);
    }
  }

  QKV_DEVICE void rows_of_values(const quantkv_half &half, uint32_t (&out)[4][Shape::kWordsV]) const {
    QKV_UNROLL
    for (int i = 0; i < 2; i++) {
      const auto *first = reinterpret_cast<const unsigned char *>(v[i]);
      if constexpr (Shape::kWholeLines) {
        load_row<Shape::kWidthV>(out[i], first, 8 * Shape::kWidthV);
        load_row<Shape::kWidthV>(out[2 + i], first + 4 * slot_bytes(half), 8 * Shape::kWidthV);
      } else {
        load_row<Shape::kWidthV>(out[2 * i], first, 8 * Shape::kWidthV);
        load_row<Shape::kWidthV>(out[2 * i + 1], first + slot_bytes(half), 8 * Shape::kWidthV);
      }
    }
  }

  // Asks for the scales of the part's rows; a lane has one, of token lane % 16, of K or from lane 16 on of V.
  QKV_DEVICE void scales(const AttentionParams &params, TileScales &to) const {
    const int32_t lane = forget(lane_index()), token = lane % Shape::kPart;
    const bool upper = token >= 8, of_values = lane >= Shape::kPart;
    const float *from = of_values ? params.op.cache.v.dynamic : params.op.cache.k.dynamic;
    float *const own = of_values ? &to.v[token] : &to.k[token];
    if (from == nullptr) {
      *own = 1.0f;
    } else {
      copy_async_4(own, from + dynamic_scale_index(params.paging, larger_of(upper ? high : low, 0), kv_head, (upper ? slot_high : slot) + token % 8));
    }
  }
};

// The tile in use.
template <class Shape> struct DecodeTile {
  TilePart<Shape> parts[Shape::kParts];
  int32_t position;
  bool whole; // every token is there and every row sees it
  TileScales *scales; // of its parts, if they are dynamic

  QKV_DEVICE bool has_all_halves() const {
    bool all = true;
    QKV_UNROLL
    for (int i = 0; i < Shape::kParts; i++) all = all && parts[i].halves.both();
    return all;
  }

  // Zeroes what no product may meet: values of tokens the piece does not have, and their scales.
  QKV_DEVICE void drop_missing(const Piece &piece) {
    QKV_UNROLL
    for (int part = 0; part < Shape::kParts; part++) {
      const int32_t first = position + part * Shape::kPart;
      parts[part].drop_missing(piece, first);
      if constexpr (Shape::kDynamic) {
        const int32_t lane = reread_thread_index() % kWarp; // rarely asked for: not to be kept
        if (lane < Shape::kPart && !parts[part].halves.has(piece, first, lane)) scales[part].v[lane] = kSmallestScale;
        sync_warp();
      }
    }
  }

  // The dynamic scales of this lane's score `pair` in a part.
  QKV_DEVICE float key_scale(int part, int pair) const { return scales[part].k[Shape::score_token(pair)]; }
  QKV_DEVICE float value_scale(int part, int pair) const { return scales[part].v[Shape::score_token(pair)]; }
};

} // namespace quantkv
