// What the library says about itself and about its statuses.
#include "../core/launch.h"

uint32_t quantkv_abi_version(void) { return QUANTKV_ABI_VERSION; }

const char *quantkv_cuda_status_string(int status) {
  switch (status) {
  case QUANTKV_OK: return "no error";
  case QUANTKV_INVALID_ARGUMENT: return "a shape, stride, format or pointer in the arguments is not possible";
  case QUANTKV_UNSUPPORTED: return "no kernel of this library does this on this device";
  case QUANTKV_WORKSPACE_TOO_SMALL: return "the workspace is smaller than the operation needs";
  case QUANTKV_NO_KERNEL_FOR_DEVICE: return "the library was built without code for this device (QUANTKV_CUDA_ARCHS)";
  case QUANTKV_NO_DEVICE: return "no CUDA driver or no CUDA device";
  default: break;
  }
  return status > QUANTKV_DEVICE_ERROR ? quantkv::device_error_text(status - QUANTKV_DEVICE_ERROR) : "unknown status";
}
