// What the warps of a block of the wide decode kernel share: sizes, shared memory, the pieces of its work. See
// paged_attention_decode_wide.h.
#pragma once
#include "../core/prim_hopper.h"
#include "../ops/paged_attention_decode_tiles.h"

namespace quantkv {

// Format F of K and V; query rows a block holds; dynamic scales. In DecodeTiles' terms a warp has a part of 16 tokens in each tile of 64.
template <Format F, int Rows, bool Dynamic> struct WideShape {
  static_assert(is_quantized(F), "codes are widened on their way to the product");
  static_assert(Rows == 16 || Rows == 32 || Rows == 64, "n of the products");
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
// Weights whose scores are followed: above 2^kMostAbove.
constexpr float kMostWeight = 256.0f;
static_assert(kMostAbove == 8.0f, "its logarithm");

// A tile on its way: what the warp needs to know of its own part of it.
struct alignas(16) WideTile {
  int32_t position;
  PartHalves halves;
  uint32_t flags, padding;
  static constexpr uint32_t kSeen = 1;  // every row sees all of it, and it is there
  static constexpr uint32_t kFirst = 2; // of its piece
  static constexpr uint32_t kLast = 4;
  static constexpr uint32_t kPlain = 8; // its scores are products times a factor
};

// Where a warp's loads are. In shared memory: registers are for products, and what spills is far.
struct alignas(16) WideCursor {
  int32_t position;  // where the warp's part of the next tile to load begins
  uint32_t number;   // of the tile, among all
  uint32_t in_batch; // and among those whose blocks are in WideWork::blocks
  uint32_t ordinary; // so many tiles from it on are seen by every row, neither a piece's first or last nor behind these blocks
  SeenByAll seen;    // by every row of the piece
  uint32_t last;     // number of its last tile
  int32_t piece;     // its number
  int16_t more;      // it is there
  int16_t is_first;  // the tile is its first

  // `batch`: tiles whose blocks there are.
  QKV_DEVICE void count_ordinary(uint32_t batch, uint32_t tile) {
    const uint32_t of_piece = last - number, of_batch = batch - in_batch, into = static_cast<uint32_t>(position) - seen.begin;
    ordinary = 0;
    if (into <= seen.span) ordinary = smaller_of(smaller_of(of_piece, of_batch), (seen.span - into) / tile + 1);
  }
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

// Of a row whose piece is all of its (group, column): where its output begins, and what sums are multiplied by.
struct alignas(16) WideEnd {
  int64_t at;
  float factor;
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
  WideEnd ends[Shape::kRows];
  uint32_t above[2]; // the last tile, of each parity, with scores (or scales) far above what weights are relative to
  // Dynamic scales of each warp's tokens of a tile, in turn; the inverse of the power of two that V's are relative to, in two versions as
  // rows are; the largest of V's that each warp has.
  TileScales scales[Shape::kDynamic ? 2 * Shape::kWarps : 1];
  float v_inverse[2], scales_of_warps[Shape::kWarps];
  WideWork works[Shape::kWarps];
  WideOffsets offsets[Shape::kThreads];
};

} // namespace quantkv
