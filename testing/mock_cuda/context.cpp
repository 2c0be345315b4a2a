// The device, its attributes, the primary context, and words for errors.
#include "driver.h"

#include "../simt/device_model.h"

#include <cstdio>
#include <cstring>

namespace mock {

Driver driver;
static thread_local void *current_context = nullptr;
static char primary_context;

Call::Call(Needs needs) : guard_(driver.lock) {
  if (needs >= DRIVER && !driver.initialized) result = NOT_INITIALIZED;
  if (needs >= CONTEXT && result == SUCCESS && (current_context == nullptr || driver.primary_context_uses == 0)) {
    result = INVALID_CONTEXT;
  }
}

Result Call::unsafe_in_capture() {
  for (Capture *capture : driver.captures) {
    const bool seen = capture->mode == GLOBAL || (capture->mode == THREAD_LOCAL && capture->thread == std::this_thread::get_id());
    if (!seen) continue;
    capture->invalid = true;
    result = STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

// The context goes, and with it everything in it.
static void destroy_primary_context() {
  drain_all();
  driver.streams.clear();
  driver.events.clear();
  driver.graphs.clear();
  driver.executables.clear();
  free_all_device_memory();
}

struct Error {
  Result result;
  const char *name, *text;
};

static constexpr Error kErrors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the memory range is already registered"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
};

static const Error *find_error(int result) {
  for (const Error &error : kErrors) {
    if (error.result == result) return &error;
  }
  return nullptr;
}

} // namespace mock

using namespace mock;

DRIVER_API cuInit(unsigned flags) {
  Call call(Call::NOTHING);
  if (flags != 0) return INVALID_VALUE;
  if (quantkv::simt::compute_capability() == 0) return NO_DEVICE;
  if (driver.initialized) return SUCCESS;
  const char *streams = getenv("QUANTKV_MOCK_STREAMS");
  driver.eager = streams != nullptr && strcmp(streams, "eager") == 0;
  const char *limit = getenv("QUANTKV_MOCK_MEMORY_BYTES");
  driver.device_limit = limit != nullptr ? strtoull(limit, nullptr, 10) : size_t(8) << 30;
  driver.initialized = true;
  return SUCCESS;
}

DRIVER_API cuDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}

DRIVER_API cuGetErrorName(int result, const char **name) {
  const Error *error = find_error(result);
  *name = error ? error->name : nullptr;
  return error ? SUCCESS : INVALID_VALUE;
}

DRIVER_API cuGetErrorString(int result, const char **text) {
  const Error *error = find_error(result);
  *text = error ? error->text : nullptr;
  return error ? SUCCESS : INVALID_VALUE;
}

// ---- the one device

DRIVER_API cuDeviceGetCount(int *count) {
  Call call(Call::DRIVER);
  *count = call.result == SUCCESS;
  return call.result;
}

DRIVER_API cuDeviceGet(int *device, int ordinal) {
  Call call(Call::DRIVER);
  if (call.result != SUCCESS) return call.result;
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

DRIVER_API cuDeviceGetName(char *name, int bytes, int device) {
  Call call(Call::DRIVER);
  if (call.result != SUCCESS || device != 0) return call.result != SUCCESS ? call.result : INVALID_DEVICE;
  snprintf(name, static_cast<size_t>(bytes), "CPU emulation (sm_%d)", quantkv::simt::compute_capability());
  return SUCCESS;
}

DRIVER_API cuDeviceGetUuid_v2(unsigned char (*uuid)[16], int) {
  memset(*uuid, 0, sizeof *uuid);
  return SUCCESS;
}
DRIVER_API cuDeviceGetUuid(unsigned char (*uuid)[16], int device) { return cuDeviceGetUuid_v2(uuid, device); }

DRIVER_API cuDeviceTotalMem_v2(size_t *bytes, int) {
  Call call(Call::DRIVER);
  *bytes = driver.device_limit;
  return call.result;
}

DRIVER_API cuDeviceGetAttribute(int *value, int attribute, int device) {
  Call call(Call::DRIVER);
  if (call.result != SUCCESS || device != 0) return call.result != SUCCESS ? call.result : INVALID_DEVICE;
  using namespace quantkv::simt;
  switch (attribute) {
  case 1: *value = 1024; break;                       // MAX_THREADS_PER_BLOCK
  case 8: *value = 48 * 1024; break;                  // MAX_SHARED_MEMORY_PER_BLOCK
  case 10: *value = 32; break;                        // WARP_SIZE
  case 13: *value = 1'000'000; break;                 // CLOCK_RATE, kHz
  case 16: *value = multiprocessors(); break;         // MULTIPROCESSOR_COUNT
  case 36: *value = 1'000'000; break;                 // MEMORY_CLOCK_RATE, kHz
  case 37: *value = 512; break;                       // GLOBAL_MEMORY_BUS_WIDTH, bits
  case 38: *value = 1 << 20; break;                   // L2_CACHE_SIZE
  case 39: *value = 2048; break;                      // MAX_THREADS_PER_MULTIPROCESSOR
  case 75: *value = compute_capability() / 10; break; // COMPUTE_CAPABILITY_MAJOR
  case 76: *value = compute_capability() % 10; break; // COMPUTE_CAPABILITY_MINOR
  case 81: *value = max_shared_bytes() + 1024; break; // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
  case 97: *value = max_shared_bytes(); break;        // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
  case 41:                                            // UNIFIED_ADDRESSING
  case 99:                                            // HOST_REGISTER_SUPPORTED
  case 115: *value = 1; break;                        // MEMORY_POOLS_SUPPORTED
  default: *value = 0; break;                         // features that are not there
  }
  return SUCCESS;
}

// ---- contexts: the primary one

DRIVER_API cuDevicePrimaryCtxRetain(void **context, int device) {
  Call call(Call::DRIVER);
  if (call.result != SUCCESS || device != 0) return call.result != SUCCESS ? call.result : INVALID_DEVICE;
  driver.primary_context_uses++;
  *context = &primary_context;
  return SUCCESS;
}

DRIVER_API cuDevicePrimaryCtxRelease_v2(int device) {
  Call call(Call::DRIVER);
  if (call.result != SUCCESS || device != 0) return call.result != SUCCESS ? call.result : INVALID_DEVICE;
  if (driver.primary_context_uses == 0) return INVALID_CONTEXT;
  if (--driver.primary_context_uses == 0) destroy_primary_context();
  return SUCCESS;
}

DRIVER_API cuCtxGetCurrent(void **context) {
  Call call(Call::DRIVER);
  *context = current_context;
  return call.result;
}

DRIVER_API cuCtxSetCurrent(void *context) {
  Call call(Call::DRIVER);
  if (call.result != SUCCESS) return call.result;
  if (context != nullptr && context != &primary_context) return INVALID_CONTEXT;
  current_context = context;
  return SUCCESS;
}

DRIVER_API cuCtxGetDevice(int *device) {
  Call call;
  *device = 0;
  return call.result;
}

DRIVER_API cuCtxSetFlags(unsigned) { return Call().result; }

DRIVER_API cuCtxSynchronize() {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  return drain_all();
}

DRIVER_API cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  *least = *greatest = 0;
  return Call().result;
}
