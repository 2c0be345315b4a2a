// What launchers ask for on the host: the device, streams, copies.
//
// Streams are kept by the mock driver (testing/mock_cuda), a library that tests load as libcuda.so.1. It is looked for
// by its own symbols, so that kernels run without it as well: then everything happens at once.
#include "device_model.h"
#include "launch.h"

#include <algorithm>
#include <dlfcn.h>

namespace quantkv {

namespace {

constexpr int kOldestCapability = 75;
constexpr int kMaxThreads = 1024;
constexpr int kNotSupported = 801; // CUDA_ERROR_NOT_SUPPORTED

// A function of the mock driver; null if no libcuda is loaded, or a real one.
template <class Function> Function *mock(const char *name) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  void *symbol = dlsym(library, "quantkv_mock_enqueue") != nullptr ? dlsym(library, name) : nullptr;
  dlclose(library); // of the two references, ours
  return reinterpret_cast<Function *>(symbol);
}

int status_of_driver(int error) {
  if (error == 0) return QUANTKV_OK;
  return error == kNotSupported ? QUANTKV_UNSUPPORTED : QUANTKV_DEVICE_ERROR + error;
}

} // namespace

int current_device(Device &device) {
  if (simt::compute_capability() == 0) return QUANTKV_NO_DEVICE;
  device = Device{simt::multiprocessors(), simt::compute_capability(), simt::max_shared_bytes()};
  return QUANTKV_OK;
}

MemoryRange memory_around(const void *address, const AddressTables &) {
  MemoryRange range = {reinterpret_cast<uintptr_t>(address), 0, Memory::Other};
  unsigned type = 0;
  constexpr int kMemoryType = 2; // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
  auto *ask = mock<int(void *, int, uintptr_t)>("cuPointerGetAttribute");
  auto *ask_range = mock<int(uintptr_t *, size_t *, uintptr_t)>("cuMemGetAddressRange_v2");
  if (ask == nullptr || ask_range == nullptr || ask(&type, kMemoryType, range.begin) != 0) return range;
  if (ask_range(&range.begin, &range.bytes, range.begin) == 0) range.kind = type == 1 ? Memory::Host : Memory::Device;
  return range;
}

int copy_memory(void *dst, const void *src, size_t bytes, void *stream) {
  if (auto *copy = mock<int(uintptr_t, uintptr_t, size_t, void *)>("cuMemcpyAsync")) {
    return status_of_driver(copy(reinterpret_cast<uintptr_t>(dst), reinterpret_cast<uintptr_t>(src), bytes, stream));
  }
  memmove(dst, src, bytes);
  return QUANTKV_OK;
}

int copy_memory_batch(void *const *dst, const void *const *src, const size_t *bytes, size_t count, void *stream) {
  if (getenv("QUANTKV_SIMT_NO_BATCH") != nullptr) return QUANTKV_UNSUPPORTED;
  for (size_t i = 0; i < count; i++) {
    const int status = copy_memory(dst[i], src[i], bytes[i], stream);
    if (status != QUANTKV_OK) return status;
  }
  return QUANTKV_OK;
}

const char *device_error_text(int error) {
  switch (static_cast<simt::Fault>(error)) {
  case simt::Fault::InvalidValue: return "invalid argument";
  case simt::Fault::InvalidConfiguration: return "invalid configuration argument";
  case simt::Fault::MisalignedAddress: return "misaligned address";
  case simt::Fault::Deadlock: return "the launch timed out and was terminated";
  case simt::Fault::LaunchFailure: return "unspecified launch failure";
  }
  return "unknown error";
}

namespace simt {

int submit(std::unique_ptr<Work> work, Grid grid, void *stream) {
  if (compute_capability() == 0) return QUANTKV_NO_DEVICE;
  if (compute_capability() < kOldestCapability) return QUANTKV_NO_KERNEL_FOR_DEVICE;
  const bool possible = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= kMaxGridX && grid.y <= kMaxGridYZ &&
                        grid.z <= kMaxGridYZ && work->threads > 0 && work->threads <= kMaxThreads;
  if (!possible) return status_of(Fault::InvalidConfiguration);
  const size_t most = static_cast<size_t>(max_shared_bytes());
  if (work->shared_bytes > most) return status_of(Fault::InvalidValue);
  const size_t given = work->shared_bytes > kAskAboveDynamic ? most : kSharedWithoutAsking;
  work->static_shared_limit = std::min(kSharedWithoutAsking, given - work->shared_bytes);
  work->grid = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};

  using Enqueue = int(void *stream, int (*run)(void *), void (*drop)(void *), void *work);
  if (auto *enqueue = mock<Enqueue>("quantkv_mock_enqueue")) {
    const auto run_work = [](void *work) { // gives a CUresult
      const int status = run(*static_cast<Work *>(work));
      return status == QUANTKV_OK ? 0 : status - QUANTKV_DEVICE_ERROR;
    };
    return status_of_driver(enqueue(stream, run_work, [](void *work) { delete static_cast<Work *>(work); }, work.release()));
  }
  return run(*work);
}

} // namespace simt
} // namespace quantkv
