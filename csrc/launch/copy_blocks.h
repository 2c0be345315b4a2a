// Launch of copy_blocks.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#include "../ops/copy_blocks.h"

int QKV_ENTRY(copy_blocks)(const quantkv_copy_blocks *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr || op->num_tables < 0 || op->num_pairs < 0 || op->num_blocks < 0) return QUANTKV_INVALID_ARGUMENT;
  if (op->num_tables == 0 || op->num_pairs == 0) return QUANTKV_OK;
  const bool are_there = op->tables != nullptr && op->pairs != nullptr && op->max_block_bytes > 0;
  QKV_CHECK(valid_if(are_there && is_aligned(op->tables, 8) && is_aligned(op->pairs, 8) && is_aligned(op->faults, 4)));
  // Small blocks are not worth many threads.
  int threads = kCopyThreads;
  while (threads > kWarp && (threads / 2) * kCopyVectors * 16 >= op->max_block_bytes) threads /= 2;
  const int64_t pieces = ceil_div(op->max_block_bytes, static_cast<int64_t>(threads) * kCopyVectors * 16);
  const Grid grid = {pieces < kMaxGridX ? pieces : kMaxGridX, op->num_pairs < kMaxGridYZ ? op->num_pairs : kMaxGridYZ,
                     op->num_tables < kMaxGridYZ ? op->num_tables : kMaxGridYZ};
  return QKV_LAUNCH_OVERLAPPED((copy_blocks), grid, threads, 0, stream, *op);
}
