// Device and page-locked memory, copies and fills.
#include "driver.h"

#include <cstdlib>
#include <cstring>

namespace mock {

// The range that begins at or before an address, if any.
static const std::pair<const uintptr_t, size_t> *range_before(const std::map<uintptr_t, size_t> &ranges, const void *address) {
  const auto found = ranges.upper_bound(reinterpret_cast<uintptr_t>(address));
  return found == ranges.begin() ? nullptr : &*std::prev(found);
}

// Whether [address, address + bytes) lies in one of the ranges.
static bool contains(const std::map<uintptr_t, size_t> &ranges, const void *address, size_t bytes) {
  const auto *range = range_before(ranges, address);
  if (range == nullptr) return false;
  const size_t offset = reinterpret_cast<uintptr_t>(address) - range->first;
  return offset <= range->second && bytes <= range->second - offset;
}

bool is_device(const void *address, size_t bytes) { return contains(driver.device, address, bytes); }
bool is_pinned(const void *address, size_t bytes) { return contains(driver.pinned, address, bytes); }

static void *pointer(DevicePointer address) { return reinterpret_cast<void *>(address); }

static Result allocate(DevicePointer *address, size_t bytes) {
  if (bytes == 0) return INVALID_VALUE;
  void *memory = nullptr;
  if (bytes > driver.device_limit - driver.device_bytes || posix_memalign(&memory, 256, bytes) != 0) return OUT_OF_MEMORY;
  memset(memory, 0xff, bytes);
  *address = reinterpret_cast<DevicePointer>(memory);
  driver.device[*address] = bytes;
  driver.device_bytes += bytes;
  return SUCCESS;
}

static Result release(DevicePointer address) {
  const auto found = driver.device.find(address);
  if (found == driver.device.end()) return INVALID_VALUE;
  memset(pointer(address), 0xff, found->second);
  driver.device_bytes -= found->second;
  driver.device.erase(found);
  free(pointer(address));
  return SUCCESS;
}

void free_all_device_memory() {
  while (!driver.device.empty()) release(driver.device.begin()->first);
}

// One copy in stream order. Device memory is copied when the stream gets there. So is page-locked memory; pageable
// memory is read before the call returns, and written before the call returns, as the driver has it.
static Result copy(Stream &stream, void *dst, const void *src, size_t bytes) {
  if (bytes == 0) return SUCCESS;
  const bool to_device = is_device(dst, bytes), from_device = is_device(src, bytes);
  const bool late_dst = to_device || is_pinned(dst, bytes), late_src = from_device || is_pinned(src, bytes);
  if (!late_dst || !late_src) {
    if (const Result result = forbid_in_capture(stream, "a copy with pageable memory")) return result;
  }
  Result result;
  if (late_src) {
    result = enqueue(stream, [=] { return memmove(dst, src, bytes), SUCCESS; });
  } else {
    const auto *first = static_cast<const unsigned char *>(src);
    const std::vector<unsigned char> staged(first, first + bytes);
    result = enqueue(stream, [=] { return memcpy(dst, staged.data(), bytes), SUCCESS; });
  }
  return result == SUCCESS && !late_dst ? drain(stream) : result;
}

// Where a copy goes, by the name of the call.
enum Side { HOST, DEVICE, EITHER };

static int copy_call(Side to, uintptr_t dst, Side from, uintptr_t src, size_t bytes, void *stream_handle, bool wait) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(stream_handle);
  if (stream == nullptr) return INVALID_HANDLE;
  const bool fits = (to != DEVICE || is_device(pointer(dst), bytes)) && (from != DEVICE || is_device(pointer(src), bytes));
  if (!fits && bytes > 0) return INVALID_VALUE;
  if (wait && call.unsafe_in_capture() != SUCCESS) return call.result;
  const Result result = copy(*stream, pointer(dst), pointer(src), bytes);
  return result == SUCCESS && wait ? drain(*stream) : result;
}

static int fill_call(DevicePointer dst, const void *pattern, size_t width, size_t count, void *stream_handle, bool wait) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(stream_handle);
  if (stream == nullptr) return INVALID_HANDLE;
  if (count == 0) return SUCCESS;
  if (!is_device(pointer(dst), width * count) || dst % width != 0) return INVALID_VALUE;
  if (wait && call.unsafe_in_capture() != SUCCESS) return call.result;
  unsigned char bytes[4];
  memcpy(bytes, pattern, width);
  const Result result = enqueue(*stream, [=] {
    if (width == 1) memset(pointer(dst), bytes[0], count);
    else for (size_t i = 0; i < count; i++) memcpy(pointer(dst + i * width), bytes, width);
    return SUCCESS;
  });
  return result == SUCCESS && wait ? drain(*stream) : result;
}

static uintptr_t number(const void *address) { return reinterpret_cast<uintptr_t>(address); }

} // namespace mock

using namespace mock;

// ---- device memory

DRIVER_API cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  Call call;
  *total = driver.device_limit;
  *free_bytes = driver.device_limit - driver.device_bytes;
  return call.result;
}

// For tests that run a device out of memory. What is allocated stays.
DRIVER_API quantkv_mock_set_memory_bytes(size_t bytes) {
  Call call(Call::NOTHING);
  driver.device_limit = bytes < driver.device_bytes ? driver.device_bytes : bytes;
  return SUCCESS;
}

DRIVER_API cuMemAlloc_v2(DevicePointer *address, size_t bytes) {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  return allocate(address, bytes);
}

DRIVER_API cuMemFree_v2(DevicePointer address) {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  if (address == 0) return SUCCESS;
  const Result result = drain_all(); // waits for the device
  return result != SUCCESS ? result : release(address);
}

DRIVER_API cuMemAllocAsync(DevicePointer *address, size_t bytes, void *handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  if (const Result result = forbid_in_capture(*stream, "an allocation")) return result;
  if (bytes > driver.device_limit - driver.device_bytes) drain_all(); // frees that are under way
  return allocate(address, bytes);
}

DRIVER_API cuMemFreeAsync(DevicePointer address, void *handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  if (address == 0) return SUCCESS;
  if (driver.device.count(address) == 0) return INVALID_VALUE;
  if (const Result result = forbid_in_capture(*stream, "a free")) return result;
  return enqueue(*stream, [=] { return release(address); });
}

// Pools are not modelled: the default one answers and does nothing.
DRIVER_API cuDeviceGetDefaultMemPool(void **pool, int) {
  static char default_pool;
  *pool = &default_pool;
  return SUCCESS;
}
DRIVER_API cuDeviceGetMemPool(void **pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }
DRIVER_API cuMemPoolSetAttribute(void *, int, void *) { return SUCCESS; }
DRIVER_API cuMemPoolTrimTo(void *, size_t) { return SUCCESS; }

// CU_POINTER_ATTRIBUTE_MEMORY_TYPE: 1 host, 2 device.
DRIVER_API cuPointerGetAttribute(void *value, int attribute, DevicePointer address) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  constexpr int kMemoryType = 2;
  if (attribute != kMemoryType) return NOT_SUPPORTED;
  if (!is_device(pointer(address), 1) && !is_pinned(pointer(address), 1)) return INVALID_VALUE;
  *static_cast<unsigned *>(value) = is_device(pointer(address), 1) ? 2 : 1;
  return SUCCESS;
}

// What was allocated, or page-locked, in one piece, and has `address` in it.
DRIVER_API cuMemGetAddressRange_v2(DevicePointer *begin, size_t *bytes, DevicePointer address) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  const bool of_device = is_device(pointer(address), 1);
  if (!of_device && !is_pinned(pointer(address), 1)) return INVALID_VALUE;
  const auto *range = range_before(of_device ? driver.device : driver.pinned, pointer(address));
  *begin = range->first;
  *bytes = range->second;
  return SUCCESS;
}

// ---- page-locked memory

DRIVER_API cuMemHostAlloc(void **address, size_t bytes, unsigned) {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  if (bytes == 0) return INVALID_VALUE;
  if (posix_memalign(address, 256, bytes) != 0) return OUT_OF_MEMORY;
  memset(*address, 0xff, bytes);
  driver.pinned[number(*address)] = bytes;
  return SUCCESS;
}

DRIVER_API cuMemFreeHost(void *address) {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  if (driver.pinned.count(number(address)) == 0) return INVALID_VALUE;
  drain_all();
  driver.pinned.erase(number(address));
  free(address);
  return SUCCESS;
}

DRIVER_API cuMemHostRegister_v2(void *address, size_t bytes, unsigned) {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  if (address == nullptr || bytes == 0) return INVALID_VALUE;
  const auto next = driver.pinned.lower_bound(number(address));
  const bool overlaps = is_pinned(address, 1) || (next != driver.pinned.end() && next->first < number(address) + bytes);
  if (overlaps) return HOST_MEMORY_ALREADY_REGISTERED;
  driver.pinned[number(address)] = bytes;
  return SUCCESS;
}

DRIVER_API cuMemHostUnregister(void *address) {
  Call call;
  if (call.result != SUCCESS || call.unsafe_in_capture() != SUCCESS) return call.result;
  drain_all();
  return driver.pinned.erase(number(address)) == 1 ? SUCCESS : HOST_MEMORY_NOT_REGISTERED;
}

DRIVER_API cuMemHostGetDevicePointer_v2(DevicePointer *device, void *address, unsigned) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  *device = number(address);
  return is_pinned(address, 1) ? SUCCESS : INVALID_VALUE;
}

// ---- copies

DRIVER_API cuMemcpyHtoD_v2(DevicePointer dst, const void *src, size_t bytes) {
  return copy_call(DEVICE, dst, HOST, number(src), bytes, nullptr, true);
}
DRIVER_API cuMemcpyDtoH_v2(void *dst, DevicePointer src, size_t bytes) {
  return copy_call(HOST, number(dst), DEVICE, src, bytes, nullptr, true);
}
DRIVER_API cuMemcpyDtoD_v2(DevicePointer dst, DevicePointer src, size_t bytes) {
  return copy_call(DEVICE, dst, DEVICE, src, bytes, nullptr, true);
}
DRIVER_API cuMemcpyHtoDAsync_v2(DevicePointer dst, const void *src, size_t bytes, void *stream) {
  return copy_call(DEVICE, dst, HOST, number(src), bytes, stream, false);
}
DRIVER_API cuMemcpyDtoHAsync_v2(void *dst, DevicePointer src, size_t bytes, void *stream) {
  return copy_call(HOST, number(dst), DEVICE, src, bytes, stream, false);
}
DRIVER_API cuMemcpyDtoDAsync_v2(DevicePointer dst, DevicePointer src, size_t bytes, void *stream) {
  return copy_call(DEVICE, dst, DEVICE, src, bytes, stream, false);
}
DRIVER_API cuMemcpy(DevicePointer dst, DevicePointer src, size_t bytes) {
  return copy_call(EITHER, dst, EITHER, src, bytes, nullptr, true);
}
DRIVER_API cuMemcpyAsync(DevicePointer dst, DevicePointer src, size_t bytes, void *stream) {
  return copy_call(EITHER, dst, EITHER, src, bytes, stream, false);
}

// Copies in no order among themselves; here, the last one first.
DRIVER_API cuMemcpyBatchAsync_v2(DevicePointer *dst, DevicePointer *src, size_t *bytes, size_t count, void *, size_t *, size_t attributes,
                                 void *stream) {
  if (stream == nullptr || count == 0 || attributes == 0 || attributes > count) return INVALID_VALUE;
  for (size_t i = count; i-- > 0;) {
    if (const int result = cuMemcpyAsync(dst[i], src[i], bytes[i], stream)) return result;
  }
  return SUCCESS;
}
DRIVER_API cuMemcpyBatchAsync(DevicePointer *dst, DevicePointer *src, size_t *bytes, size_t count, void *attributes, size_t *indices,
                              size_t attribute_count, size_t *failed, void *stream) {
  *failed = SIZE_MAX;
  return cuMemcpyBatchAsync_v2(dst, src, bytes, count, attributes, indices, attribute_count, stream);
}

// ---- fills

DRIVER_API cuMemsetD8_v2(DevicePointer dst, unsigned char value, size_t count) { return fill_call(dst, &value, 1, count, nullptr, true); }
DRIVER_API cuMemsetD32_v2(DevicePointer dst, unsigned value, size_t count) { return fill_call(dst, &value, 4, count, nullptr, true); }
DRIVER_API cuMemsetD8Async(DevicePointer dst, unsigned char value, size_t count, void *stream) {
  return fill_call(dst, &value, 1, count, stream, false);
}
DRIVER_API cuMemsetD16Async(DevicePointer dst, unsigned short value, size_t count, void *stream) {
  return fill_call(dst, &value, 2, count, stream, false);
}
DRIVER_API cuMemsetD32Async(DevicePointer dst, unsigned value, size_t count, void *stream) {
  return fill_call(dst, &value, 4, count, stream, false);
}
