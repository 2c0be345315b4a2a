// The way of K and V to shared memory in the wide decode kernel: each warp copies its own part of tile after tile, across pieces.
// See paged_attention_decode_wide.h.
//
// Nearly all tiles are ordinary: every row sees all of their tokens, which lie in one block a warp, and they are neither the first nor
// the last of a piece. How many ordinary ones follow is counted when one comes that is not, so that the others take four words of shared
// memory and eight copies.
#pragma once
#include "wide_shared.h"

namespace quantkv {

// Set in tiles whose scores are products times a factor: those that every row sees, unless scores are capped or have ALiBi's slopes.
QKV_DEVICE uint32_t plain_flag(const AttentionParams &params) {
  return params.cap == 0.0f && params.op.alibi_slopes == nullptr ? WideTile::kPlain : 0;
}

// Tiles of a piece; one at least.
template <class Shape> QKV_DEVICE int32_t wide_tiles(const Piece &piece) {
  const int32_t parts = (piece.end + Shape::kPart - 1) / Shape::kPart - piece.begin / Shape::kPart;
  return larger_of(1, (parts + Shape::kWarps - 1) / Shape::kWarps);
}

// What load() reads first: the first words of a cursor, and the block of the tile's tokens if it is ordinary.
struct WideNext {
  Words<4> cursor;
  int32_t block;
};

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
  // How much further on, or back, a lane's next row of V lies beyond four rows: chunks are swapped by fours then.
  static QKV_DEVICE int flip_of(int to_values) { return (to_values ^ 64) - to_values; }

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
        work.cursor = {of_piece.position(0), number, 0, 0, SeenByAll(params, entered, Shape::kPart), number + wide_tiles<Shape>(entered) - 1,
                       piece, 1, 1};
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

  // Asks for the dynamic scales of the warp's tokens of the next tile: a lane has one, of token lane % 16, of K or from lane 16 on
  // of V. Those of tokens that are not there are any.
  QKV_DEVICE void copy_scales(uint32_t position, uint32_t number, int32_t low, int32_t high) const {
    const int32_t lane = forget(lane_index()), token = lane % Shape::kPart;
    const int32_t slot = static_cast<int32_t>(position + token) & ((1 << params.paging.block_shift) - 1);
    const bool of_values = lane >= Shape::kPart;
    const float *const from = of_values ? params.op.cache.v.dynamic : params.op.cache.k.dynamic;
    TileScales &to = shared.scales[2 * (reread_thread_index() / kWarp) + number % 2];
    float *const own = of_values ? &to.v[token] : &to.k[token];
    if (from == nullptr) {
      *own = 1.0f;
    } else {
      const int32_t head = work.pieces[work.cursor.piece % kWidePieces].kv_head;
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
  QKV_DEVICE void begin_batch(WideCursor &cursor, uint32_t batch) const {
    const Tiles of_piece(params, work.pieces[cursor.piece % kWidePieces]);
    const int32_t n = (cursor.position / Shape::kPart - of_piece.first) / Shape::kWarps; // of the tile in the piece
    work.blocks[lane_index()] = work.next_blocks[lane_index()];
    work.next_blocks[lane_index()] = of_piece.find(n + static_cast<int32_t>(batch));
    cursor.in_batch = 0;
    sync_warp();
  }

  // For load(), and read before it where there is something to wait for.
  QKV_DEVICE WideNext next() const {
    const Words<4> words = *reinterpret_cast<const Words<4> *>(&work.cursor);
    return {words, work.blocks[words.w[2] % kWarp]}; // beyond the batch any one: the tile is not ordinary then
  }

  // Asks for K of the next tile, then for V, a group of copies each; both empty if there are no more tiles.
  QKV_DEVICE void load(const WideNext &next) const {
    const uint32_t position = next.cursor.w[0], number = next.cursor.w[1], in_batch = next.cursor.w[2], ordinary = next.cursor.w[3];
    if (ordinary == 0 || next.block < 0) return load_any();
    copy_tile(position, number, next.block);
    if (lane_index() == 0) {
      *reinterpret_cast<Words<4> *>(&work.tiles[number % 4]) = {{position, 3, WideTile::kSeen | plain_flag(params), 0}};
      *reinterpret_cast<Words<4> *>(&work.cursor) = {{position + Shape::kTokens, number + 1, in_batch + 1, ordinary - 1}};
    }
    sync_warp();
  }

  // A tile that every row sees, the warp's tokens of which lie in one block.
  QKV_DEVICE void copy_tile(uint32_t position, uint32_t number, int32_t block) const {
    const WideOffsets &offsets = shared.offsets[thread_index()];
    const quantkv_half &k = params.op.cache.k, &v = params.op.cache.v;
    const Words<2> inside = work.rows[lane_index()];
    const uint32_t slot = position & ((1u << params.paging.block_shift) - 1);
    const auto first = [&](const quantkv_half &half, uint32_t inside) {
      return static_cast<const unsigned char *>(half.codes) + (inside + slot * Tiles::bytes(half.map.slot_stride)) +
             static_cast<uint64_t>(static_cast<uint32_t>(block)) * Tiles::bytes(half.map.block_stride);
    };
    if constexpr (Shape::kDynamic) copy_scales(position, number, block, block); // in the group of K's copies
    copy(first(k, inside.w[0]), 4 * Tiles::bytes(k.map.slot_stride), shared.keys[0] + offsets.to_keys, 0);
    const int to_values = offsets.to_values, flip = flip_of(to_values);
    copy(first(v, inside.w[1]), 4 * Tiles::bytes(v.map.slot_stride), shared.values[number % Shape::kValueSlots] + to_values, flip);
  }

  // load() of any tile.
  QKV_DEVICE void load_any() const {
    WideCursor cursor = work.cursor;
    if (cursor.more == 0) {
      copy_async_commit();
      copy_async_commit();
      return;
    }
    const bool halved = is_halved(params);
    const uint32_t batch = halved ? kWarp / 2 : kWarp;
    if (cursor.in_batch == batch) begin_batch(cursor, batch);
    const int32_t block = work.blocks[cursor.in_batch];
    const int32_t low = halved ? work.blocks[2 * cursor.in_batch] : block, high = halved ? work.blocks[2 * cursor.in_batch + 1] : block;
    const bool is_first = cursor.is_first != 0, is_last = cursor.number == cursor.last;
    WideTile tile = {cursor.position, {(low >= 0 ? 1 : 0) | (high >= 0 ? 2 : 0)}, 0, 0};
    if (is_first) tile.flags |= WideTile::kFirst;
    if (is_last) tile.flags |= WideTile::kLast;
    if (cursor.seen.has(cursor.position) && tile.halves.both()) tile.flags |= WideTile::kSeen | plain_flag(params);
    if (tile.flags & WideTile::kSeen && !halved) {
      copy_tile(static_cast<uint32_t>(cursor.position), cursor.number, block);
    } else {
      const WideOffsets &offsets = shared.offsets[thread_index()];
      const Words<2> inside = work.rows[lane_index()];
      const int to_values = offsets.to_values;
      if constexpr (Shape::kDynamic) copy_scales(static_cast<uint32_t>(cursor.position), cursor.number, low, high);
      copy_some(params.op.cache.k, inside.w[0], cursor, low, high, tile.halves, shared.keys[0] + offsets.to_keys, 0);
      copy_some(params.op.cache.v, inside.w[1], cursor, low, high, tile.halves, shared.values[cursor.number % Shape::kValueSlots] + to_values,
                flip_of(to_values));
    }
    if (lane_index() == 0) work.tiles[cursor.number % 4] = tile;
    if (is_first) look_ahead(cursor.piece);
    if (is_last) return enter(cursor.piece + 1, cursor.number + 1);
    sync_warp(); // the cursor has been read
    if (lane_index() == 0) {
      cursor.position += Shape::kTokens;
      cursor.number++;
      cursor.in_batch++;
      cursor.is_first = 0;
      if (!halved) cursor.count_ordinary(batch, Shape::kTokens);
      work.cursor = cursor;
    }
    sync_warp();
  }
};

} // namespace quantkv
