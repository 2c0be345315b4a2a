// What launches need of the HIP runtime, which the library does not link (quantkv_hip.h): code objects, kernels and
// devices by number. Plain C++, host code.
//
//   code object   the kernels of one source, for every architecture, in one bundle that build/hip/ writes; the runtime
//                 takes the current device's part of it
//   kernel        found in it by its mangled name
//
// Both keep what the runtime gave them, a place for each device, and are found without a lock from then on.
#pragma once
#include "../quantkv_hip.h"

namespace quantkv_amdgcn {

constexpr int kMaxDevices = 64;

struct CodeObject {
  const unsigned char *image;
  void *modules[kMaxDevices];
  CodeObject *next; // of the program's
};

// All zero to begin with.
struct KernelEntry {
  void *functions[kMaxDevices];
};

// Puts a code object on the list of quantkv_hip_load_kernels. Before main, by each source.
void enlist(CodeObject &object);

// The function of a kernel on the current device; its code object is loaded if this is the first of it there.
int find_function(CodeObject &object, KernelEntry &kernel, const char *name, void *&function);

int launch_function(void *function, const unsigned (&grid)[3], unsigned threads, unsigned shared_bytes, void *stream,
                    void **params);

// Compute units, or work-group processors where the runtime counts those.
int count_multiprocessors(int &count);

int copy_memory(void *dst, const void *src, size_t bytes, void *stream);

// The runtime's words for its error number.
const char *device_error_text(int error);

} // namespace quantkv_amdgcn
