// Bytes from place to place by a block of threads: what copy_blocks and swap_blocks have in common.
#pragma once
#include "../core/launch.h"
#include "../core/prim.h"

namespace quantkv {

constexpr int kCopyVectors = 4;

// Bytes start .. end of a block; `end` may lie anywhere.
QKV_DEVICE void copy_piece(char *dst, const char *src, int64_t start, int64_t end) {
  const int threads = block_threads();
  const uintptr_t bits = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src);
  if (bits % 16 != 0) {
    for (int64_t i = start + thread_index(); i < end; i += threads) dst[i] = src[i];
    return;
  }
  const int64_t whole = end & ~INT64_C(15);
  Words<4> words[kCopyVectors];
  QKV_UNROLL
  for (int i = 0; i < kCopyVectors; i++) {
    const int64_t at = start + (i * threads + thread_index()) * 16;
    if (at < whole) words[i] = load_stream(reinterpret_cast<const Words<4> *>(src + at));
  }
  QKV_UNROLL
  for (int i = 0; i < kCopyVectors; i++) {
    const int64_t at = start + (i * threads + thread_index()) * 16;
    if (at < whole) store_stream(reinterpret_cast<Words<4> *>(dst + at), words[i]);
  }
  if (whole + thread_index() < end) dst[whole + thread_index()] = src[whole + thread_index()];
}

} // namespace quantkv
