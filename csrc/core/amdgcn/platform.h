// The names of csrc/core/platform.h for AMD's GPUs, by a freestanding clang (-x hip -nogpuinc -nogpulib): no header
// of HIP, no device library.
//
// Kernels know warps of 32 lanes. RDNA runs waves of 32. CDNA (gfx9) runs waves of 64: a warp is then the lower or the
// upper half of one. Each collective here moves data inside the caller's half alone, and counts the votes of that half
// alone, so that it does not matter what the other half does: it may have returned, or wait in another branch, where
// the two halves run one after the other under EXEC. What it costs is that a branch between the warps of one wave is
// paid for twice. Two warps of a block must not wait for each other other than in sync_threads(); none does.
//
// A source is compiled once for each architecture (QKV_DEVICE_PASS) and once for the host, whose half has the launches.
#pragma once

#define QKV_KERNEL static __attribute__((global))
#define QKV_DEVICE __attribute__((device, always_inline)) inline
#define QKV_HOST_DEVICE __attribute__((host, device, always_inline)) inline
#define QKV_LAUNCH_BOUNDS(threads, blocks) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define QKV_SHARED(T, name, n) __attribute__((shared)) T name[n]
#define QKV_DYNAMIC_SHARED(name)                                                                                       \
  extern __attribute__((shared, aligned(128))) unsigned char qkv_dynamic_shared[];                                     \
  unsigned char *name = qkv_dynamic_shared

// One program may hold this library for CUDA and for ROCm: their functions of one name are not one function.
#define quantkv quantkv_amdgcn

#include "../types.h"

namespace quantkv {

constexpr int kWarp = 32;

#if defined(__GFX9__)
constexpr int kWave = 64;
#else
constexpr int kWave = 32;
#endif

namespace amdgcn {

// What the runtime writes behind a kernel's own arguments (code object version 5): block_count x, y, z as u32 first.
QKV_DEVICE int blocks_of_grid(int dimension) {
  using Words = const __attribute__((address_space(4))) uint32_t *;
  return static_cast<int>(((Words)__builtin_amdgcn_implicitarg_ptr())[dimension]);
}

// The lane in the wave.
QKV_DEVICE int wave_lane() {
  const uint32_t low = __builtin_amdgcn_mbcnt_lo(~0u, 0);
  return static_cast<int>(kWave == 64 ? __builtin_amdgcn_mbcnt_hi(~0u, low) : low);
}

// Of lane `from` of the caller's warp.
template <class T> QKV_DEVICE T value_of_lane(T value, int from) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit types");
  const int lane = (wave_lane() & ~(kWarp - 1)) | (from & (kWarp - 1));
  return __builtin_bit_cast(T, __builtin_amdgcn_ds_bpermute(lane * 4, __builtin_bit_cast(int, value)));
}

} // namespace amdgcn

QKV_DEVICE int thread_index() { return static_cast<int>(__builtin_amdgcn_workitem_id_x()); }
QKV_DEVICE int block_threads() { return static_cast<int>(__builtin_amdgcn_workgroup_size_x()); }
QKV_DEVICE int block_index_x() { return static_cast<int>(__builtin_amdgcn_workgroup_id_x()); }
QKV_DEVICE int block_index_y() { return static_cast<int>(__builtin_amdgcn_workgroup_id_y()); }
QKV_DEVICE int block_index_z() { return static_cast<int>(__builtin_amdgcn_workgroup_id_z()); }
QKV_DEVICE int grid_size_x() { return amdgcn::blocks_of_grid(0); }
QKV_DEVICE int grid_size_y() { return amdgcn::blocks_of_grid(1); }
QKV_DEVICE int grid_size_z() { return amdgcn::blocks_of_grid(2); }

// The fences keep the compiler from moving accesses across; s_barrier alone would not.
QKV_DEVICE void sync_threads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// Lanes of a wave advance together and their LDS accesses stay in order: nothing to do but keep the compiler's order.
QKV_DEVICE void sync_warp() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

template <class T> QKV_DEVICE T shuffle_xor(T value, int mask) {
  return amdgcn::value_of_lane(value, amdgcn::wave_lane() ^ mask);
}
template <class T> QKV_DEVICE T shuffle(T value, int lane) { return amdgcn::value_of_lane(value, lane); }
template <class T> QKV_DEVICE T shuffle_up(T value, int delta) {
  const int lane = amdgcn::wave_lane() & (kWarp - 1);
  return amdgcn::value_of_lane(value, lane < delta ? lane : lane - delta);
}
QKV_DEVICE uint32_t ballot(bool predicate) {
#if defined(__GFX9__)
  return static_cast<uint32_t>(__builtin_amdgcn_ballot_w64(predicate) >> (amdgcn::wave_lane() & kWarp));
#else
  return __builtin_amdgcn_ballot_w32(predicate);
#endif
}
QKV_DEVICE bool any(bool predicate) { return ballot(predicate) != 0; }

QKV_DEVICE void atomic_or(uint32_t *word, uint32_t bits) {
  __hip_atomic_fetch_or(word, bits, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
QKV_DEVICE uint32_t atomic_add(uint32_t *word, uint32_t value) {
  return __hip_atomic_fetch_add(word, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
QKV_DEVICE void atomic_max_nonnegative(float *value, float x) {
  __hip_atomic_fetch_max(reinterpret_cast<int *>(value), __builtin_bit_cast(int, x), __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

} // namespace quantkv
