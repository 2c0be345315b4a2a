// The host side of a launch.
//
//   int status = QKV_LAUNCH((kernel<128, true>), grid, threads, shared_bytes, stream, params...);
//
// enqueues and answers a quantkv_status; nothing waits. Also what launchers ask of the device at hand.
#pragma once
#include "../quantkv.h"
#include "platform.h"

namespace quantkv {

// Blocks in the three dimensions of a grid.
struct Grid {
  int64_t x, y, z;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Limits of grids on every device supported; launchers loop inside kernels beyond them. AMD's have fewer than 2^32
// threads in a dimension, of which a block has at most 1024.
#if defined(__HIP__)
constexpr int64_t kMaxGridX = 0x3fffff;
#else
constexpr int64_t kMaxGridX = 0x7fffffff;
#endif
constexpr int64_t kMaxGridYZ = 65535;

// A block has 48 KB of shared memory without asking, its static arrays included. Launches with more dynamic shared
// memory than this ask for more; no kernel has more static shared memory than the rest.
constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr size_t kAskAboveDynamic = kSharedWithoutAsking / 2;

// Whether devices of compute capability 9.0 get the code that only they can run (csrc/hopper): build.rs knows.
#if defined(QUANTKV_HOPPER) || (defined(QUANTKV_SIMT) && QUANTKV_SIMT_ARCH == 90)
constexpr bool kHasHopperKernels = true;
#else
constexpr bool kHasHopperKernels = false;
#endif

// Whether kernels are compiled for every format: with the sanitizers, which take four times as long, not for those that differ from
// another by a conversion alone.
#if defined(QUANTKV_SIMT_SANITIZED)
constexpr bool kHasAllFormats = false;
#else
constexpr bool kHasAllFormats = true;
#endif

// What kernels on the current device reach under the address that the host has for it: its own memory, page-locked memory of the
// host; or neither.
enum class Memory { Other, Host, Device };

// Addresses that are memory of one kind: what was allocated, or page-locked, in one piece.
struct MemoryRange {
  uintptr_t begin;
  size_t bytes;
  Memory kind;

  bool has(const void *address, size_t count) const {
    const size_t offset = reinterpret_cast<uintptr_t>(address) - begin;
    return offset <= bytes && count <= bytes - offset;
  }
};

} // namespace quantkv

#if defined(QUANTKV_SIMT)

#include "simt/launch.h" // testing/simt

#elif defined(__HIP__)

#include "amdgcn/launch.h"

#else

#include <cuda_runtime_api.h>

namespace quantkv {

// What launchers need to know of the current device. Queried from the driver's tables, without synchronising.
struct Device {
  int multiprocessors;
  int compute_capability; // 10 * major + minor
  int max_shared_bytes;   // dynamic shared memory a block may ask for
};

inline int status_of(cudaError_t error) {
  switch (error) {
  case cudaSuccess: return QUANTKV_OK;
  case cudaErrorNoKernelImageForDevice:
  case cudaErrorInvalidDeviceFunction: return QUANTKV_NO_KERNEL_FOR_DEVICE;
  case cudaErrorNoDevice:
  case cudaErrorInsufficientDriver: return QUANTKV_NO_DEVICE;
  default: return QUANTKV_DEVICE_ERROR + static_cast<int>(error);
  }
}

inline int current_device(Device &device) {
  int id = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&id);
  const struct {
    int *value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&device.multiprocessors, cudaDevAttrMultiProcessorCount},
                {&device.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&major, cudaDevAttrComputeCapabilityMajor},
                {&minor, cudaDevAttrComputeCapabilityMinor}};
  for (const auto &want : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(want.value, want.attribute, id);
  }
  device.compute_capability = 10 * major + minor;
  return status_of(error);
}

// What memory_around() asks: the current device's number, -1 if there is none, and the driver's cuMemGetAddressRange, null if it is not there.
struct AddressTables {
  int device = -1;
  int (*range_of)(unsigned long long *begin, size_t *bytes, unsigned long long address) = nullptr;
};

inline AddressTables address_tables() {
  AddressTables tables;
  void *found = nullptr;
#if CUDART_VERSION >= 12050
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &found, 12000, cudaEnableDefault, &result);
#else
  cudaError_t error = cudaGetDriverEntryPoint("cuMemGetAddressRange", &found, cudaEnableDefault);
#endif
  if (error == cudaSuccess) tables.range_of = reinterpret_cast<decltype(tables.range_of)>(found);
  if (error == cudaSuccess) error = cudaGetDevice(&tables.device);
  if (error != cudaSuccess) cudaGetLastError(); // not the next call's
  return tables;
}

// What the memory at `address` is, and all of what was allocated or page-locked together with it; empty where that is not known. Two looks
// into the driver's tables, 0.1 us each.
inline MemoryRange memory_around(const void *address, const AddressTables &tables) {
  MemoryRange range = {reinterpret_cast<uintptr_t>(address), 0, Memory::Other};
  cudaPointerAttributes attributes = {};
  if (cudaPointerGetAttributes(&attributes, address) != cudaSuccess) {
    cudaGetLastError();
    return range;
  }
  if (attributes.devicePointer != address) return range;
  if (attributes.type == cudaMemoryTypeHost) range.kind = Memory::Host;
  if (attributes.type == cudaMemoryTypeDevice && attributes.device == tables.device) range.kind = Memory::Device;
  unsigned long long begin = 0;
  size_t bytes = 0;
  if (tables.range_of != nullptr && tables.range_of(&begin, &bytes, range.begin) == 0) { // CUDA_SUCCESS
    range.begin = static_cast<uintptr_t>(begin);
    range.bytes = bytes;
  }
  return range;
}

// Copies between device and host memory in any direction, in stream order.
inline int copy_memory(void *dst, const void *src, size_t bytes, void *stream) {
  return status_of(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

// `count` copies in one call, in no order among themselves; not on the null stream. QUANTKV_UNSUPPORTED where the
// runtime or the driver is older than 12.8 or the stream is being captured, and then nothing was enqueued.
inline int copy_memory_batch(void *const *dst, const void *const *src, const size_t *bytes, size_t count, void *stream) {
#if CUDART_VERSION >= 12080
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone; // a graph has no node for a batch
  const cudaError_t asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  if (asked != cudaSuccess) return status_of(asked);
  if (capture != cudaStreamCaptureStatusNone) return QUANTKV_UNSUPPORTED;
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0; // the attributes hold from copy 0 on
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaMemcpyBatchAsync(dst, src, bytes, count, &attributes, &first, 1, static_cast<cudaStream_t>(stream));
#else
  size_t failed = 0;
  const cudaError_t error =
      cudaMemcpyBatchAsync(const_cast<void **>(dst), const_cast<void **>(src), const_cast<size_t *>(bytes), count,
                           &attributes, &first, 1, &failed, static_cast<cudaStream_t>(stream));
#endif
  const bool missing = error == cudaErrorNotSupported || error == cudaErrorCallRequiresNewerDriver;
  return missing ? QUANTKV_UNSUPPORTED : status_of(error);
#else
  (void)dst, (void)src, (void)bytes, (void)count, (void)stream;
  return QUANTKV_UNSUPPORTED;
#endif
}

// The runtime's words for its error number.
inline const char *device_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), Grid grid, int threads, size_t shared_bytes, void *stream, bool overlap_previous,
           Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return QUANTKV_OK;
  if (shared_bytes > kAskAboveDynamic) {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
#if defined(QUANTKV_NO_OVERLAP)
  // build.rs: sm_90 and newer may be given code made for an older device, in which no kernel waits.
  overlap_previous = false;
#endif
  if (overlap_previous) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return status_of(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

} // namespace quantkv

#define QKV_UNPAREN(...) __VA_ARGS__
#define QKV_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                                   \
  quantkv::launch(QKV_UNPAREN kernel, grid, threads, shared_bytes, stream, false, __VA_ARGS__)
// The kernel may start while the one before it in the stream ends: it must call wait_for_previous_kernel() before it
// reads or writes anything that one touches. Devices before sm_90 start it after.
#define QKV_LAUNCH_OVERLAPPED(kernel, grid, threads, shared_bytes, stream, ...)                                        \
  quantkv::launch(QKV_UNPAREN kernel, grid, threads, shared_bytes, stream, true, __VA_ARGS__)
// The same for a kernel whose blocks wait for what blocks of lower index write: devices begin blocks in that order, so that
// those waited for are running or done.
#define QKV_LAUNCH_IN_ORDER(...) QKV_LAUNCH_OVERLAPPED(__VA_ARGS__)

#endif

// The C function of an operation, by the vendor it is compiled for.
#ifndef QKV_ENTRY
#define QKV_ENTRY(name) quantkv_cuda_##name
#endif
