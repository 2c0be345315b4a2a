// Host twin of csrc/core/launch.h, over the CPU (scheduler.h) and the mock driver (testing/mock_cuda).
//
// If the mock driver is loaded, a launch goes to its stream: it runs when the stream gets to it, or is recorded if the
// stream is being captured. Without it a launch runs at once.
#pragma once
#include "../../csrc/core/launch.h"
#include "scheduler.h"

#include <tuple>

namespace quantkv {

// As the originals; the device is that of device_model.h.
struct Device {
  int multiprocessors;
  int compute_capability;
  int max_shared_bytes;
};
int current_device(Device &device);

// Nothing is known of memory without the mock driver.
struct AddressTables {};
inline AddressTables address_tables() { return {}; }
MemoryRange memory_around(const void *address, const AddressTables &);
int copy_memory(void *dst, const void *src, size_t bytes, void *stream);
// QUANTKV_SIMT_NO_BATCH in the environment: the driver is too old for it.
int copy_memory_batch(void *const *dst, const void *const *src, const size_t *bytes, size_t count, void *stream);
const char *device_error_text(int error);

namespace simt {

// Gives the work to the stream, after the checks that a device makes at a launch.
int submit(std::unique_ptr<Work> work, Grid grid, void *stream);

template <class... Params> struct KernelCall : Work {
  void (*kernel)(Params...);
  std::tuple<Params...> params;
  KernelCall(void (*kernel)(Params...), Params... params) : kernel(kernel), params(params...) {}
  void run_thread() const override { std::apply(kernel, params); }
};

template <class... Params, class... Args>
int launch(const char *name, void (*kernel)(Params...), Grid grid, int threads, size_t shared_bytes, void *stream,
           bool overlapped, bool in_order, Args... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel parameters are at most 4096 bytes");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel parameters are plain data");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return QUANTKV_OK;
  auto work = std::make_unique<KernelCall<Params...>>(kernel, static_cast<Params>(args)...);
  work->name = name;
  work->threads = threads;
  work->shared_bytes = shared_bytes;
  work->overlapped = overlapped;
  work->in_order = in_order;
  return submit(std::move(work), grid, stream);
}

} // namespace simt
} // namespace quantkv

#define QKV_UNPAREN(...) __VA_ARGS__
#define QKV_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                                   \
  quantkv::simt::launch(#kernel, QKV_UNPAREN kernel, grid, threads, shared_bytes, stream, false, false, __VA_ARGS__)
#define QKV_LAUNCH_OVERLAPPED(kernel, grid, threads, shared_bytes, stream, ...)                                        \
  quantkv::simt::launch(#kernel, QKV_UNPAREN kernel, grid, threads, shared_bytes, stream, true, false, __VA_ARGS__)
#define QKV_LAUNCH_IN_ORDER(kernel, grid, threads, shared_bytes, stream, ...)                                          \
  quantkv::simt::launch(#kernel, QKV_UNPAREN kernel, grid, threads, shared_bytes, stream, true, true, __VA_ARGS__)
