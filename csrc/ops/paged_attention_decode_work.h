// The decode kernel's pieces of work: what the warps of a block must know of the one they are at and of the next ones.
//
// A piece is found two pieces ahead, by one warp, a different one each time: it takes some 200 instructions. The barriers at
// the end of the piece in between let the others see it.
#pragma once
#include "paged_attention_decode_tiles.h"

namespace quantkv {

// In shared memory, since registers are for tiles.
struct DecodeWork {
  // The piece before, of which a warp may still be writing rows, this one, the next one, and the one that is looked for.
  static constexpr int kPieces = 4;

  struct Found {
    Piece piece;
    SeenByAll seen;
    int32_t merged;        // pieces that it is one of, if it is not all of its (group, column)
    bool is_there;
    Words<4> bases[kWarp]; // a lane: DecodeTiles::bases
  };

  WorkerStart place; // after the piece found last
  int32_t worker;
  Found found[kPieces];

  QKV_DEVICE Found &at(int32_t number) { return found[number % kPieces]; }
  QKV_DEVICE bool has(int32_t number) { return at(number).is_there; }

  // Looks for piece `number`; the one before was there, and is known to this warp. For one warp.
  template <class Shape> QKV_DEVICE void look(const AttentionParams &params, const WorkList &list, int32_t number) {
    Found &next = at(number);
    if (lane_index() == 0) {
      WorkIterator work = number > 0 ? WorkIterator(params, list, place) : WorkIterator(params, list, block_index_x());
      next.is_there = work.next<Shape::kPart>(next.piece);
      place = work.place;
      if (number == 0) worker = place.worker;
      if (next.is_there) {
        next.merged = next.piece.merge >= 0 ? list.merges[next.piece.merge].num_pieces : 0;
        next.seen = SeenByAll(params, next.piece, Shape::kTile);
      }
    }
    sync_warp();
    if (next.is_there) next.bases[lane_index()] = DecodeTiles<Shape>(params, next.piece).bases();
  }
};

// What a warp keeps of its own pieces there.
template <class Shape> struct DecodeWarp {
  // Dynamic scales of tiles, in turn: while one's are read another's are copied, and a third's may still be read.
  static constexpr int kTiles = Shape::kDynamic ? 4 : 1;
  TileScales scales[kTiles][Shape::kDynamic ? Shape::kParts : 1];

  QKV_DEVICE TileScales *scales_of(int32_t tile) { return scales[(tiles_before + tile) % kTiles]; }

  uint32_t tiles_before; // of pieces before this one
  int32_t next_number;   // the next piece's
  int32_t blocks[kWarp]; // of the first batch of tiles of the next piece, a lane
  float k_scale[kWarp];  // of the next piece's head, the same for every lane
  float v_scale[2];      // of this piece's head and of the next one's, in turn, unless scales are by channel
};

} // namespace quantkv
