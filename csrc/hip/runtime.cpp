// The runtime's functions, and what the library says about itself. See runtime.h.
#include "runtime.h"

namespace quantkv_amdgcn {
namespace {

// hipError_t and hipDeviceAttribute_t by number, the same in HIP 5, 6 and 7.
enum : int {
  kNoDevice = 100,
  kInvalidDevice = 101,
  kNotInitialized = 3,
  kNoBinaryForGpu = 209,
  kInvalidDeviceFunction = 98,
  kMultiprocessorCount = 63,
  kCopyDefault = 4, // hipMemcpyDefault
};

quantkv_hip_runtime runtime = {};
CodeObject *first = nullptr;

int status_of(int error) {
  switch (error) {
  case 0: return QUANTKV_OK;
  case kNoBinaryForGpu:
  case kInvalidDeviceFunction: return QUANTKV_NO_KERNEL_FOR_DEVICE;
  case kNotInitialized:
  case kNoDevice:
  case kInvalidDevice: return QUANTKV_NO_DEVICE;
  default: return QUANTKV_DEVICE_ERROR + error;
  }
}

bool is_ready() { return runtime.launch != nullptr; }

// Loading happens once a device and code object: two threads may come at the same time.
class Lock {
public:
  Lock() {
    while (__atomic_test_and_set(&held, __ATOMIC_ACQUIRE)) {
    }
  }
  ~Lock() { __atomic_clear(&held, __ATOMIC_RELEASE); }

private:
  static inline char held = 0;
};

int current_device(int &device) {
  if (!is_ready()) return QUANTKV_NO_DEVICE;
  const int status = status_of(runtime.get_device(&device));
  if (status != QUANTKV_OK) return status;
  return device >= 0 && device < kMaxDevices ? QUANTKV_OK : QUANTKV_NO_DEVICE;
}

int load(CodeObject &object, int device, void *&module) {
  module = __atomic_load_n(&object.modules[device], __ATOMIC_ACQUIRE);
  if (module != nullptr) return QUANTKV_OK;
  Lock lock;
  module = object.modules[device];
  if (module != nullptr) return QUANTKV_OK;
  const int status = status_of(runtime.load_module(&module, object.image));
  if (status != QUANTKV_OK) return status;
  __atomic_store_n(&object.modules[device], module, __ATOMIC_RELEASE);
  return QUANTKV_OK;
}

} // namespace

void enlist(CodeObject &object) {
  object.next = first;
  first = &object;
}

int find_function(CodeObject &object, KernelEntry &kernel, const char *name, void *&function) {
  int device = 0;
  int status = current_device(device);
  if (status != QUANTKV_OK) return status;
  function = __atomic_load_n(&kernel.functions[device], __ATOMIC_ACQUIRE);
  if (function != nullptr) return QUANTKV_OK;
  void *module = nullptr;
  status = load(object, device, module);
  if (status == QUANTKV_OK) status = status_of(runtime.get_function(&function, module, name));
  if (status == QUANTKV_OK) __atomic_store_n(&kernel.functions[device], function, __ATOMIC_RELEASE);
  return status;
}

int launch_function(void *function, const unsigned (&grid)[3], unsigned threads, unsigned shared_bytes, void *stream,
                    void **params) {
  return status_of(runtime.launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared_bytes, stream, params, nullptr));
}

int count_multiprocessors(int &count) {
  int device = 0;
  const int status = current_device(device);
  return status != QUANTKV_OK ? status : status_of(runtime.get_attribute(&count, kMultiprocessorCount, device));
}

int copy_memory(void *dst, const void *src, size_t bytes, void *stream) {
  return is_ready() ? status_of(runtime.copy(dst, src, bytes, kCopyDefault, stream)) : QUANTKV_NO_DEVICE;
}

const char *device_error_text(int error) {
  const char *text = is_ready() ? runtime.error_text(error) : nullptr;
  return text != nullptr ? text : "an error of the HIP runtime";
}

} // namespace quantkv_amdgcn

using namespace quantkv_amdgcn;

int quantkv_hip_use_runtime(const quantkv_hip_runtime *functions) {
  if (functions == nullptr || functions->get_device == nullptr || functions->get_attribute == nullptr ||
      functions->load_module == nullptr || functions->get_function == nullptr || functions->launch == nullptr ||
      functions->copy == nullptr || functions->error_text == nullptr) {
    return QUANTKV_INVALID_ARGUMENT;
  }
  runtime = *functions;
  return QUANTKV_OK;
}

int quantkv_hip_load_kernels(void) {
  int device = 0;
  const int status = current_device(device);
  if (status != QUANTKV_OK) return status;
  for (CodeObject *object = first; object != nullptr; object = object->next) {
    void *module = nullptr;
    const int loaded = load(*object, device, module);
    if (loaded != QUANTKV_OK) return loaded;
  }
  return QUANTKV_OK;
}

uint32_t quantkv_hip_abi_version(void) { return QUANTKV_ABI_VERSION; }

const char *quantkv_hip_status_string(int status) {
  switch (status) {
  case QUANTKV_OK: return "no error";
  case QUANTKV_INVALID_ARGUMENT: return "a shape, stride, format or pointer in the arguments is not possible";
  case QUANTKV_UNSUPPORTED: return "no kernel of this library does this on this device";
  case QUANTKV_WORKSPACE_TOO_SMALL: return "the workspace is smaller than the operation needs";
  case QUANTKV_NO_KERNEL_FOR_DEVICE: return "the library was built without code for this device (QUANTKV_HIP_ARCHS)";
  case QUANTKV_NO_DEVICE: return "no HIP runtime or no AMD device";
  default: break;
  }
  return status > QUANTKV_DEVICE_ERROR ? device_error_text(status - QUANTKV_DEVICE_ERROR) : "unknown status";
}
