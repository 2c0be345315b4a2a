// copy_blocks: block pairs[2i] onto pairs[2i+1] in every table, one launch for all layers.
//
//   grid.x   pieces of a block: kCopyVectors vectors of 16 bytes a thread, all loaded before any is stored
//   grid.y   pairs        grid.z   tables        both wrap round where a grid ends
//
// Tables and pairs lie on the device, so that a captured graph may be replayed with others. A table whose blocks are
// not aligned to 16 bytes is copied byte by byte.
#pragma once
#include "copy_piece.h"

namespace quantkv {

constexpr int kCopyThreads = 128;

QKV_KERNEL void QKV_LAUNCH_BOUNDS(kCopyThreads, 10) copy_blocks(const quantkv_copy_blocks op) {
  wait_for_previous_kernel();
  const int64_t piece = static_cast<int64_t>(block_threads()) * kCopyVectors * 16;
  for (int64_t pair = block_index_y(); pair < op.num_pairs; pair += grid_size_y()) {
    const int64_t from = op.pairs[2 * pair], to = op.pairs[2 * pair + 1];
    if (from < 0 || from >= op.num_blocks || to < 0 || to >= op.num_blocks) {
      if (thread_index() == 0) set_fault(op.faults, QUANTKV_FAULT_BLOCK);
      continue;
    }
    for (int64_t table = block_index_z(); table < op.num_tables; table += grid_size_z()) {
      const quantkv_block_table_memory memory = op.tables[table];
      const char *src = static_cast<const char *>(memory.base) + from * memory.block_stride_bytes;
      char *dst = static_cast<char *>(memory.base) + to * memory.block_stride_bytes;
      for (int64_t start = block_index_x() * piece; start < memory.block_bytes; start += grid_size_x() * piece) {
        const int64_t end = start + piece;
        copy_piece(dst, src, start, end < memory.block_bytes ? end : memory.block_bytes);
      }
    }
  }
}

} // namespace quantkv
