// Host twin of csrc/core/platform.h: the same names, for kernels that run as fibers (scheduler.h).
//
// Beyond what the originals promise: shared memory begins as NaN bytes in every block, a collective or barrier that
// lanes reach from different lines is a fault, and what a shuffle takes from a lane that has returned is NaN.
#pragma once
#include "scheduler.h"

#define QKV_KERNEL static
#define QKV_DEVICE inline
#define QKV_HOST_DEVICE inline
#define QKV_LAUNCH_BOUNDS(threads, blocks)
#define QKV_SHARED(T, name, n)                                                                                         \
  static T name[n];                                                                                                    \
  static uint64_t name##_last_block = 0;                                                                               \
  quantkv::simt::begin_shared(name, sizeof name, name##_last_block)
#define QKV_DYNAMIC_SHARED(name) unsigned char *name = quantkv::simt::dynamic_shared(quantkv::simt::kSharedAlignment)

#include "../../csrc/core/types.h"

namespace quantkv {

constexpr int kWarp = 32;

inline int thread_index() { return simt::current->index; }
inline int block_threads() { return simt::block_size; }
inline int block_index_x() { return simt::block_index.x; }
inline int block_index_y() { return simt::block_index.y; }
inline int block_index_z() { return simt::block_index.z; }
inline int grid_size_x() { return simt::grid_size.x; }
inline int grid_size_y() { return simt::grid_size.y; }
inline int grid_size_z() { return simt::grid_size.z; }

inline void sync_threads(simt::Site site = simt::Site::current()) { simt::barrier(site); }
inline void sync_warp(simt::Site site = simt::Site::current()) {
  simt::rendezvous("sync_warp", site, [](const simt::Deposits &) {}, false);
}

namespace simt {

template <class T> struct ShuffleOperand {
  T value;
  int argument;
};

// What lane `to` gets from lane `from`.
template <class T> void give(const Deposits &warp, int from, int to) {
  if (warp.present >> from & 1) {
    warp.result<T>(to) = warp.operand<ShuffleOperand<T>>(from).value;
  } else {
    memset(&warp.result<T>(to), 0xff, sizeof(T));
  }
}

template <class T, class SourceOf>
T shuffle_from(const char *name, const Site &site, T value, int argument, SourceOf) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit types");
  return collective<T>(name, site, ShuffleOperand<T>{value, argument}, [](const Deposits &warp) {
    for (int lane = 0; lane < kLanes; lane++) {
      if (warp.present >> lane & 1) give<T>(warp, SourceOf()(lane, warp.operand<ShuffleOperand<T>>(lane).argument), lane);
    }
  });
}

} // namespace simt

template <class T> T shuffle_xor(T value, int mask, simt::Site site = simt::Site::current()) {
  return simt::shuffle_from("shuffle_xor", site, value, mask, [](int lane, int mask) { return (lane ^ mask) % kWarp; });
}
template <class T> T shuffle(T value, int lane, simt::Site site = simt::Site::current()) {
  return simt::shuffle_from("shuffle", site, value, lane, [](int, int from) { return from & (kWarp - 1); });
}
template <class T> T shuffle_up(T value, int delta, simt::Site site = simt::Site::current()) {
  return simt::shuffle_from("shuffle_up", site, value, delta, [](int lane, int delta) { return lane < delta ? lane : lane - delta; });
}
inline uint32_t ballot(bool predicate, simt::Site site = simt::Site::current()) {
  return simt::collective<uint32_t>("ballot", site, predicate, [](const simt::Deposits &warp) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; lane++) {
      if (warp.present >> lane & 1 && warp.operand<bool>(lane)) votes |= 1u << lane;
    }
    for (int lane = 0; lane < kWarp; lane++) warp.result<uint32_t>(lane) = votes;
  });
}
inline bool any(bool predicate, simt::Site site = simt::Site::current()) { return ballot(predicate, site) != 0; }

// One lane runs at a time, so plain accesses are atomic.
inline void atomic_or(uint32_t *word, uint32_t bits) {
  simt::check_aligned("atomic_or", word, sizeof *word);
  *word |= bits;
}
inline uint32_t atomic_add(uint32_t *word, uint32_t value) {
  simt::check_aligned("atomic_add", word, sizeof *word);
  const uint32_t before = *word;
  *word = before + value;
  return before;
}
// Compares bits, as the device does: a negative or NaN argument shows.
inline void atomic_max_nonnegative(float *value, float x) {
  simt::check_aligned("atomic_max_nonnegative", value, sizeof *value);
  int32_t before, candidate;
  memcpy(&before, value, sizeof before);
  memcpy(&candidate, &x, sizeof candidate);
  if (candidate > before) *value = x;
}

} // namespace quantkv
