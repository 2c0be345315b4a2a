// The GPU that the shim and the mock driver pretend to be. Read from the environment at each call, for tests:
//
//   QUANTKV_SIMT_CC               compute capability, 10 * major + minor; "none": there is no device
//   QUANTKV_SIMT_MULTIPROCESSORS  few, so that small tests fill them
#pragma once
#include <stdlib.h>
#include <string.h>

// The build may choose an older one, and with it the kernels' paths (see prim.h).
#if !defined(QUANTKV_SIMT_ARCH)
#define QUANTKV_SIMT_ARCH 90
#endif

namespace quantkv::simt {

// 0 if there is no device.
inline int compute_capability() {
  const char *text = getenv("QUANTKV_SIMT_CC");
  if (text == nullptr) return QUANTKV_SIMT_ARCH;
  return strcmp(text, "none") == 0 ? 0 : atoi(text);
}

inline int multiprocessors() {
  const char *text = getenv("QUANTKV_SIMT_MULTIPROCESSORS");
  return text == nullptr ? 4 : atoi(text);
}

// Dynamic shared memory that a block may ask for.
inline int max_shared_bytes() {
  switch (compute_capability()) {
  case 75: return 64 * 1024;
  case 80:
  case 87: return 163 * 1024;
  case 86:
  case 89:
  case 120: return 99 * 1024;
  default: return 227 * 1024;
  }
}

} // namespace quantkv::simt
