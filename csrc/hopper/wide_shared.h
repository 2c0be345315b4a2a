// What the warps of a block of the wide decode kernel share: sizes, shared memory, the pieces of its work, and the way of
// K and V to shared memory. See paged_attention_decode_wide.h.
#pragma once
#include "../core/prim_hopper.h"
#include "../ops/paged_attention_decode_tiles.h"

namespace quantkv {

// Format F of K and V; query rows a block holds; dynamic scales. In DecodeTiles' terms a warp has a part of 16 tokens in each tile of 64.
template <Format F, int Rows, bool Dynamic> struct WideShape {
  static_assert(is_quantized(F), "codes are widened on their way to the product");
  static_assert(Rows == 32 || Rows == 64, "n of the products");
  static constexpr int kRows = Rows, kRowTiles = Rows / 8;
  static constexpr int kDim = 128, kElement = 1, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr bool kPacked = false; // rows
  static constexpr bool kDynamic = Dynamic;
  static constexpr int kPart = 16, kParts = 1, kTokens = kWarps * kPart;
  static constexpr int kBlocks = Rows > 32 ? 2 : Dynamic ? 3 : 4; // of a multiprocessor
  static constexpr int kValueSlots = 3;
  static constexpr int kMostPieces = 15; // that are merged in one step, as in DecodeShape
  // Weights of two tiles in turn: side by side in one panel, where they fit.
  static constexpr int kWeightPanels = Rows <= 32 ? 1 : 2;
};

// Pieces a warp remembers: the tile attended to and the one ahead may be of two, and two more are known.
constexpr int kWidePieces = 6;
// What scores are relative to while no key has been seen: any score is far above it.
constexpr float kUnseen = -1e38f;

// A tile on its way: what the warp needs to know of its own part of it.
struct alignas(16) WideTile {
  int32_t position;
  PartHalves halves;
  uint32_t flags;
  static constexpr uint32_t kSeen = 1;  // every row sees all of it, and it is there
  static constexpr uint32_t kFirst = 2; // of its piece
  static constexpr uint32_t kLast = 4;
};

// Where a warp's loads are. In shared memory: registers are for products, and what spills is far.
struct alignas(16) WideCursor {
  int32_t position; // where the warp's part of the next tile to load begins
  int32_t in_batch; // number of the tile among those whose blocks are in WideWork::blocks
  int32_t left;     // tiles of the piece
  uint32_t number;  // of all tiles
  SeenByAll seen;   // by every row of the piece
  int32_t piece;    // its number
  int16_t more;     // it is there
  int16_t is_first; // the tile is its first
};

// A warp's way through the work of its block; each has its own, so that none waits for another to look for a piece.
struct WideWork {
  WideCursor cursor;
  WideTile tiles[4];          // in a ring
  WorkerStart place;
  Piece pieces[kWidePieces];  // in a ring
  int32_t known;              // pieces found until now
  // Of a lane: the blocks of the batch of tiles being loaded, and of the next one; the table's entry for the first batch of the next piece;
  // where its first rows of K and of V lie in a block.
  int32_t blocks[kWarp], next_blocks[kWarp], entries[kWarp];
  Words<2> rows[kWarp];

  // Looks for one more piece. All lanes; the first one steps.
  QKV_DEVICE void next(const AttentionParams &params, const WorkList &list) {
    if (lane_index() == 0) {
      WorkIterator work = known > 0 ? WorkIterator(params, list, place) : WorkIterator(params, list, block_index_x());
      const bool found = work.next(pieces[known % kWidePieces]);
      place = work.place;
      if (found) known++;
    }
    sync_warp();
  }
};

// What softmax needs of a row.
struct WideRow {
  float factor, reference; // of products, to scores in base 2; what weights are relative to
};

// Where a thread's bytes lie in a tile, worked out once: what it copies, in K and in V, and what it reads or writes of K, V and weights.
struct WideOffsets {
  uint16_t to_keys, to_values, keys, values, weights;
};

template <class Shape> struct WideShared {
  alignas(1024) unsigned char query[2][Shape::kRows * kPanelRow];      // [rows, 64 channels] each, in the order of K's steps
  alignas(1024) unsigned char weights[Shape::kWeightPanels][Shape::kTokens * kPanelRow]; // [tokens, rows]
  alignas(1024) unsigned char values[Shape::kValueSlots][Shape::kTokens * Shape::kDim];
  alignas(128) unsigned char keys[Shape::kWarps][Shape::kPart * Shape::kDim];
  // In two versions: who is late may still read the one before. [1]: for what are scores already.
  alignas(16) WideRow rows[2][2][Shape::kRows];
  int32_t position[Shape::kRows]; // of the row's query
  float slope[Shape::kRows];
  float query_factors[Shape::kRows];
  float of_warps[Shape::kWarps][Shape::kRows]; // maxima or sums
  int32_t token[Shape::kRows], head[Shape::kRows];
  float end_factor[Shape::kRows];
  uint32_t above[2]; // the last tile, of each parity, with scores (or scales) far above what weights are relative to
  // Dynamic scales of each warp's tokens of a tile, in turn; the inverse of the power of two that V's are relative to, in two versions as
  // rows are; the largest of V's that each warp has.
  TileScales scales[Shape::kDynamic ? 2 * Shape::kWarps : 1];
  float v_inverse[2], scales_of_warps[Shape::kWarps];
  WideWork works[Shape::kWarps];
  WideOffsets offsets[Shape::kThreads];
};

// Tiles of a piece; one at least.
template <class Shape> QKV_DEVICE int32_t wide_tiles(const Piece &piece) {
  const int32_t parts = (piece.end + Shape::kPart - 1) / Shape::kPart - piece.begin / Shape::kPart;
  return larger_of(1, (parts + Shape::kWarps - 1) / Shape::kWarps);
}

// A warp's way from the cache to shared memory: its tokens of tile after tile, across pieces, 16 bytes a copy.
template <class Shape> struct WideLoader {
  using Tiles = DecodeTiles<Shape>;
  const AttentionParams &params;
  const WorkList &list;
  WideShared<Shape> &shared;
  WideWork &work;

  QKV_DEVICE WideLoader(const AttentionParams &params, const WorkList &list, WideShared<Shape> &shared)
      : params(params), list(list), shared(shared), work(shared.works[warp_index()]) {}

  static QKV_DEVICE int key_chunk(int row, int chunk) { return chunk ^ row % 2 * 4; }
  static QKV_DEVICE int value_chunk(int row, int chunk) { return chunk ^ row / 2 % 4 * 2; }

  // Of a lane: its first row of K, of V; its chunk of them. Every fourth row more is its own.
  static QKV_DEVICE int row_of_lane(int lane) { return lane / 8; }
  static QKV_DEVICE int chunk_of_lane(int lane) { return lane % 8; }

  // Of a thread, where all that it copies and reads in one instruction meets all banks. The chunk c of a row lies at c ^ 4 in odd rows
  // of K, of which a lane reads chunks t and t + 4 of token g; in V at value_chunk(), as a lane reads the word of channels
  // 32w + 4g .. of tokens 2t + ..; weights lie as in every panel.
  static QKV_DEVICE WideOffsets offsets_of(int thread) {
    const int lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4, row = row_of_lane(lane), chunk = chunk_of_lane(lane);
    const int part = warp * Shape::kPart;
    WideOffsets offsets;
    offsets.to_keys = static_cast<uint16_t>((part + row) * Shape::kDim + 16 * key_chunk(row, chunk));
    offsets.to_values = static_cast<uint16_t>((part + row) * Shape::kDim + 16 * value_chunk(row, chunk));
    offsets.keys = static_cast<uint16_t>((part + g) * Shape::kDim + 16 * key_chunk(g, t));
    offsets.values = static_cast<uint16_t>(2 * t * Shape::kDim + 16 * value_chunk(2 * t, 2 * warp + g / 4) + 4 * (g % 4));
    offsets.weights = static_cast<uint16_t>(panel_offset(part + g, 0) + 4 * t);
    return offsets;
  }

  // The work has its first piece, if there is one.
  QKV_DEVICE void start() const {
    find_entry(0);
    enter(0, 0);
  }

  QKV_DEVICE void find_entry(int32_t piece) const {
    const int32_t *at = piece < work.known ? Tiles(params, work.pieces[piece % kWidePieces]).entry(0) : nullptr;
    work.entries[lane_index()] = at != nullptr ? *at : 0;
  }

  // Goes to the first tile of a piece, tile `number` of all.
  QKV_DEVICE void enter(int32_t piece, uint32_t number) const {
    const bool more = piece < work.known;
    const Piece &entered = work.pieces[piece % kWidePieces];
    sync_warp(); // blocks and the cursor have been read
    if (more) {
      const Tiles of_piece(params, entered);
      const int lane = forget(lane_index());
      work.blocks[lane] = of_piece.checked(of_piece.entry(0), work.entries[lane]);
      const auto inside = [&](const quantkv_half &half) {
        const quantkv_address_map &map = half.map;
        return Tiles::bytes(entered.kv_head * map.head_stride + row_of_lane(lane) * map.slot_stride) + 16 * chunk_of_lane(lane);
      };
      work.rows[lane] = {{inside(params.op.cache.k), inside(params.op.cache.v)}};
      if (lane == 0) {
        work.cursor = {of_piece.position(0), 0, wide_tiles<Shape>(entered), number, SeenByAll(params, entered, Shape::kPart), piece, 1, 1};
      }
    } else if (lane_index() == 0) {
      work.cursor.more = 0;
    }
    sync_warp();
  }

  // Copies this lane's rows of a half of the cache, the first of which is at `from` and goes to `to`; every other one lies `flip` further on.
  static QKV_DEVICE void copy(const unsigned char *from, uint32_t four_rows, unsigned char *to, int flip) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) copy_async_16(to + 4 * i * Shape::kDim + (i % 2 == 0 ? 0 : flip), from + i * four_rows, true);
    copy_async_commit();
  }

  // The same where some rows are not there, which become zeros, or where blocks are of 8 slots: `low` and `high` of tokens 0-7 and 8-15.
  QKV_DEVICE void copy_some(const quantkv_half &half, uint32_t inside, const WideCursor &cursor, int32_t low, int32_t high, PartHalves halves,
                            unsigned char *to, int flip) const {
    const Piece &piece = work.pieces[cursor.piece % kWidePieces];
    const int32_t mask = (1 << params.paging.block_shift) - 1;
    QKV_NO_UNROLL
    for (int i = 0; i < 4; i++) {
      const int32_t row = row_of_lane(forget(lane_index())) + 4 * i, slot = (cursor.position + 4 * i) & mask;
      const unsigned char *from = static_cast<const unsigned char *>(half.codes) + inside + Tiles::bytes(slot * half.map.slot_stride) +
                                  static_cast<uint64_t>(larger_of(i < 2 ? low : high, 0)) * Tiles::bytes(half.map.block_stride);
      copy_async_16(to + 4 * i * Shape::kDim + (i % 2 == 0 ? 0 : flip), from, halves.has(piece, cursor.position, row));
    }
    copy_async_commit();
  }

  // Asks for the dynamic scales of the warp's tokens of the cursor's tile: a lane has one, of token lane % 16, of K or from lane 16 on
  // of V. Those of tokens that are not there are any.
  QKV_DEVICE void copy_scales(const WideCursor &cursor, int32_t low, int32_t high) const {
    const int32_t lane = forget(lane_index()), token = lane % Shape::kPart, slot = (cursor.position + token) & ((1 << params.paging.block_shift) - 1);
    const bool of_values = lane >= Shape::kPart;
    const float *const from = of_values ? params.op.cache.v.dynamic : params.op.cache.k.dynamic;
    TileScales &to = shared.scales[2 * (reread_thread_index() / kWarp) + cursor.number % 2];
    float *const own = of_values ? &to.v[token] : &to.k[token];
    if (from == nullptr) {
      *own = 1.0f;
    } else {
      const int32_t head = work.pieces[cursor.piece % kWidePieces].kv_head;
      copy_async_4(own, from + dynamic_scale_index(params.paging, larger_of(token < 8 ? low : high, 0), head, slot));
    }
  }

  // What will be needed after this piece's first tile, while that is on its way: blocks of its second batch, the next piece.
  QKV_DEVICE void look_ahead(int32_t piece) const {
    const Tiles of_piece(params, work.pieces[piece % kWidePieces]);
    work.next_blocks[lane_index()] = of_piece.find(of_piece.batch());
    work.next(params, list);
    find_entry(piece + 1);
  }

  // Blocks of the next batch of tiles.
  QKV_DEVICE void begin_batch(WideCursor &cursor, int32_t batch) const {
    const Tiles of_piece(params, work.pieces[cursor.piece % kWidePieces]);
    const int32_t n = (cursor.position / Shape::kPart - of_piece.first) / Shape::kWarps; // of the tile in the piece
    work.blocks[lane_index()] = work.next_blocks[lane_index()];
    work.next_blocks[lane_index()] = of_piece.find(n + batch);
    cursor.in_batch = 0;
    sync_warp();
  }

  // Asks for K of the next tile, then for V, a group of copies each; both empty if there are no more tiles.
  QKV_DEVICE void load() const {
    WideCursor cursor = work.cursor;
    if (cursor.more == 0) {
      copy_async_commit();
      copy_async_commit();
      return;
    }
    const bool halved = is_halved(params);
    const int32_t batch = halved ? kWarp / 2 : kWarp;
    if (cursor.in_batch == batch) begin_batch(cursor, batch);
    const int lane = lane_index(), to_values = shared.offsets[thread_index()].to_values;
    const int v_flip = (to_values ^ 64) - to_values; // two rows on, chunks are swapped by fours
    const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
    const Words<2> inside = work.rows[lane];
    unsigned char *const k_to = shared.keys[0] + shared.offsets[thread_index()].to_keys;
    unsigned char *const v_to = shared.values[cursor.number % Shape::kValueSlots] + to_values;

    const int32_t block = work.blocks[cursor.in_batch];
    const int32_t low = halved ? work.blocks[2 * cursor.in_batch] : block, high = halved ? work.blocks[2 * cursor.in_batch + 1] : block;
    if constexpr (Shape::kDynamic) copy_scales(cursor, low, high); // in the group of K's copies
    const bool is_first = cursor.is_first != 0, is_last = cursor.left == 1;
    WideTile tile = {cursor.position, {3}, (is_first ? WideTile::kFirst : 0) | (is_last ? WideTile::kLast : 0)};
    const bool is_seen = cursor.seen.has(cursor.position);
    if (is_seen && !halved && block >= 0) {
      tile.flags |= WideTile::kSeen;
      const uint32_t slot = cursor.position & ((1u << params.paging.block_shift) - 1);
      const auto first = [&](const quantkv_half &half, uint32_t inside) {
        return static_cast<const unsigned char *>(half.codes) + (inside + slot * Tiles::bytes(half.map.slot_stride)) +
               static_cast<uint64_t>(static_cast<uint32_t>(block)) * Tiles::bytes(half.map.block_stride);
      };
      copy(first(k, inside.w[0]), 4 * Tiles::bytes(k.map.slot_stride), k_to, 0);
      copy(first(v, inside.w[1]), 4 * Tiles::bytes(v.map.slot_stride), v_to, v_flip);
    } else {
      tile.halves = {(low >= 0 ? 1 : 0) | (high >= 0 ? 2 : 0)};
      if (is_seen && tile.halves.both()) tile.flags |= WideTile::kSeen;
      copy_some(k, inside.w[0], cursor, low, high, tile.halves, k_to, 0);
      copy_some(v, inside.w[1], cursor, low, high, tile.halves, v_to, v_flip);
    }
    if (lane == 0) work.tiles[cursor.number % 4] = tile;
    if (is_first) look_ahead(cursor.piece);
    if (is_last) return enter(cursor.piece + 1, cursor.number + 1);
    sync_warp(); // the cursor has been read
    if (lane == 0) {
      work.cursor.position = cursor.position + Shape::kTokens;
      work.cursor.in_batch = cursor.in_batch + 1;
      work.cursor.left = cursor.left - 1;
      work.cursor.number = cursor.number + 1;
      work.cursor.is_first = 0;
    }
    sync_warp();
  }
};

} // namespace quantkv
