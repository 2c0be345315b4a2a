// The host side of a launch on AMD's GPUs; names and meanings are those of csrc/core/launch.h.
//
// clang compiles a source for each device and for the host. It tells the host which name a kernel has on the device, so
// none is written down here: what is launched is found by that name in the source's code object (hip/runtime.h). In the
// devices' pass a launch does nothing but make its kernel be compiled.
#pragma once
#include "../../hip/runtime.h"
#include "../platform.h"

#define QKV_ENTRY(name) quantkv_hip_##name

// A source with kernels has `#define QKV_CODE_OBJECT quantkv_hip_code_<its name>` first of all: build/hip.rs gives its
// bundle that name.
#if defined(QKV_CODE_OBJECT)
extern "C" const unsigned char QKV_CODE_OBJECT[];
#endif

namespace quantkv {

// Local data share of a block, on every architecture that is supported.
constexpr int kSharedBytes = 64 * 1024;

struct Device {
  int multiprocessors;
  int compute_capability; // of CUDA's none: 0
  int max_shared_bytes;
};

inline int current_device(Device &device) {
  device.compute_capability = 0;
  device.max_shared_bytes = kSharedBytes;
  return count_multiprocessors(device.multiprocessors);
}

// HIP has no call for it.
inline int copy_memory_batch(void *const *, const void *const *, const size_t *, size_t, void *) {
  return QUANTKV_UNSUPPORTED;
}

#if defined(__HIP_DEVICE_COMPILE__)

template <class... Params, class... Args> void compile_kernel(void (*)(Params...), const Args &...) {}

#elif defined(QKV_CODE_OBJECT)

// This source's.
static CodeObject code_object = {QKV_CODE_OBJECT, {}, nullptr};
__attribute__((constructor)) static void enlist_code_object() { enlist(code_object); }

// `Params` are the kernel's: the pointer to it is null and only tells them.
template <class... Params, class... Args>
int launch(KernelEntry &entry, const char *name, void (*)(Params...), Grid grid, int threads, size_t shared_bytes,
           void *stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return QUANTKV_OK;
  void *function = nullptr;
  const int status = find_function(code_object, entry, name, function);
  if (status != QUANTKV_OK) return status;
  const unsigned blocks[3] = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
  return [&](Params... params) {
    void *addresses[] = {&params...};
    return launch_function(function, blocks, static_cast<unsigned>(threads), static_cast<unsigned>(shared_bytes), stream, addresses);
  }(static_cast<Params>(args)...);
}

#endif

} // namespace quantkv

#define QKV_UNPAREN(...) __VA_ARGS__
#if defined(__HIP_DEVICE_COMPILE__)
#define QKV_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                                   \
  (quantkv::compile_kernel(QKV_UNPAREN kernel, grid, threads, shared_bytes, stream, __VA_ARGS__), 0)
#else
#define QKV_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                                   \
  [&]() -> int {                                                                                                       \
    static quantkv::KernelEntry entry;                                                                                 \
    return quantkv::launch(entry, __builtin_get_device_side_mangled_name(QKV_UNPAREN kernel),                          \
                           static_cast<decltype(&(QKV_UNPAREN kernel))>(nullptr), grid, threads, shared_bytes, stream, \
                           __VA_ARGS__);                                                                               \
  }()
#endif
// Kernels of a stream run one after another.
#define QKV_LAUNCH_OVERLAPPED QKV_LAUNCH
