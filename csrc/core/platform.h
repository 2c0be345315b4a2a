// The seam between kernels and what runs them. Kernels use nothing but these names, so that the same source is
// compiled by nvcc (this file), by an amdgcn clang (amdgcn/), and by a host compiler as fibers (testing/simt, chosen by
// QUANTKV_SIMT). Instructions proper (conversions, mma, cp.async) are in prim.h, launches in launch.h.
//
//   QKV_KERNEL void k(Params p)          a kernel;  QKV_LAUNCH_BOUNDS(threads, blocks) before its name
//   QKV_DEVICE / QKV_HOST_DEVICE         a function, always inlined
//   QKV_SHARED(T, name, n)               static shared memory: T name[n], uninitialised
//   QKV_DYNAMIC_SHARED(name)             the launch's dynamic shared memory: unsigned char*, 128-byte aligned
//   thread_index() .. grid_size_z()      blocks of threads are one-dimensional, grids have three dimensions
//   sync_threads(), sync_warp()          barriers of the block, of the warp
//   shuffle*, ballot, any                warp collectives; every lane of the warp takes part
//   atomic_*                             relaxed, device-wide
#pragma once

#define QKV_UNROLL _Pragma("unroll")
#define QKV_NO_UNROLL _Pragma("unroll 1")

// The compiler for sm_100 and newer needs more registers for the same source: kernels that are near a limit ask for
// one block less of a multiprocessor there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define QKV_NEEDS_MORE_REGISTERS 1
#else
#define QKV_NEEDS_MORE_REGISTERS 0
#endif

#if defined(QUANTKV_SIMT)

#include "simt/platform.h" // testing/simt

#elif defined(__CUDACC__)

#define QKV_KERNEL static __global__
#define QKV_DEVICE __device__ __forceinline__
#define QKV_HOST_DEVICE __host__ __device__ __forceinline__
#define QKV_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define QKV_GRID_CONSTANT __grid_constant__
#define QKV_SHARED(T, name, n) __shared__ T name[n]
#define QKV_DYNAMIC_SHARED(name)                                                                                       \
  extern __shared__ __align__(128) unsigned char qkv_dynamic_shared[];                                                 \
  unsigned char *name = qkv_dynamic_shared

#include "types.h"

namespace quantkv {

constexpr int kWarp = 32;

QKV_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
QKV_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
QKV_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
QKV_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
QKV_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
QKV_DEVICE int grid_size_x() { return static_cast<int>(gridDim.x); }
QKV_DEVICE int grid_size_y() { return static_cast<int>(gridDim.y); }
QKV_DEVICE int grid_size_z() { return static_cast<int>(gridDim.z); }

QKV_DEVICE void sync_threads() { __syncthreads(); }
QKV_DEVICE void sync_warp() { __syncwarp(); }

// T: a 32-bit type.
template <class T> QKV_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T> QKV_DEVICE T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <class T> QKV_DEVICE T shuffle_up(T value, int delta) { return __shfl_up_sync(0xffffffffu, value, delta); }
QKV_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
QKV_DEVICE bool any(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }

QKV_DEVICE void atomic_or(uint32_t *word, uint32_t bits) { atomicOr(word, bits); }
QKV_DEVICE uint32_t atomic_add(uint32_t *word, uint32_t value) { return atomicAdd(word, value); }
// For values that are not negative and not NaN: their bits order as integers do.
QKV_DEVICE void atomic_max_nonnegative(float *value, float x) {
  atomicMax(reinterpret_cast<int *>(value), __float_as_int(x));
}

} // namespace quantkv

#elif defined(__HIP__)

#include "amdgcn/platform.h"

#else
#error "platform.h: unknown compiler; nvcc, clang -x hip, or a host compiler with QUANTKV_SIMT"
#endif

// The compute capability kernels are being compiled for, 10 * major + minor; 0 where only host code is.
#if defined(__CUDA_ARCH__)
#define QKV_COMPUTE_CAPABILITY (__CUDA_ARCH__ / 10)
#else
#define QKV_COMPUTE_CAPABILITY 0
#endif

// A kernel parameter that is read where it lies, never copied: QKV_GRID_CONSTANT const T p.
#ifndef QKV_GRID_CONSTANT
#define QKV_GRID_CONSTANT
#endif

namespace quantkv {

QKV_DEVICE int lane_index() { return thread_index() % kWarp; }
QKV_DEVICE int warp_index() { return thread_index() / kWarp; }

// Sets bits of the caller's sticky fault word, if there is one.
QKV_DEVICE void set_fault(uint32_t *faults, uint32_t bits) {
  if (faults != nullptr) atomic_or(faults, bits);
}

} // namespace quantkv
