// swap_blocks by a kernel: copies between device memory and page-locked host memory, which a kernel reads and writes where it lies.
//
//   a launch   up to kSwapCopies copies, a list that comes as the kernel's parameter
//   a block    piece after piece of them, kCopyVectors vectors of 16 bytes a thread, all loaded before any is stored
//
// A copy engine takes 1 to 4 us for each copy, whatever its size; the link moves 16 KB in 0.3. A few blocks have enough bytes on their
// way to fill it, and leave nearly all of the device to others.
#pragma once
#include "copy_piece.h"

namespace quantkv {

constexpr int kSwapCopies = 160;
constexpr int kSwapBlocks = 32, kSwapThreads = 256;

// Aligned to 16 bytes, sizes included.
struct SwapList {
  quantkv_memory_copy copies[kSwapCopies];
  int32_t count;
  int32_t pieces; // of the longest copy, of kSwapThreads * kCopyVectors vectors each
};
static_assert(sizeof(SwapList) <= 4096, "what a kernel's parameters may have");

QKV_KERNEL void QKV_LAUNCH_BOUNDS(kSwapThreads, 2) swap_listed_blocks(QKV_GRID_CONSTANT const SwapList list) {
  constexpr int64_t kPiece = kSwapThreads * kCopyVectors * 16;
  for (int32_t at = block_index_x(); at < list.count * list.pieces; at += static_cast<int32_t>(grid_size_x())) {
    const quantkv_memory_copy &copy = list.copies[at / list.pieces];
    const int64_t start = at % list.pieces * kPiece, end = start + kPiece;
    if (start < copy.bytes) copy_piece(static_cast<char *>(copy.dst), static_cast<const char *>(copy.src), start, end < copy.bytes ? end : copy.bytes);
  }
}

} // namespace quantkv
