// A stand-in for libamdhip64.so: the functions that this crate loads, with the ABI of HIP 5 to 7, over machine.h.
//
//   memory    each allocation ends where a page begins that nobody may touch; it starts as NaN bytes. What lies between
//             its end and that page (it begins at a multiple of 256) is looked at after each launch
//   copies    a device address must lie in an allocation with all its bytes
//   modules   the bundle and the code object in it are looked through as the real runtime does, and a kernel must be in
//             both: in the code object for this architecture, and among the kernels retargeted
//   streams   do everything at once; graphs there are none
//
// QUANTKV_AMD_DEVICES=0: no device. QUANTKV_AMD_MULTIPROCESSORS: few, so that small tests fill them (4).
#include "machine.h"

#include <elf.h>
#include <map>
#include <mutex>
#include <set>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// Of the architecture: "gfx942", and its number in the flags of a code object.
#if !defined(QUANTKV_AMD_ARCH) || !defined(QUANTKV_AMD_MACHINE)
#error "define QUANTKV_AMD_ARCH and QUANTKV_AMD_MACHINE"
#endif

namespace {

enum : int {
  Success = 0,
  InvalidValue = 1,
  OutOfMemory = 2,
  NoDevice = 100,
  InvalidDevice = 101,
  InvalidImage = 200,
  NoBinaryForGpu = 209,
  InvalidHandle = 400,
  NotFound = 500,
  LaunchFailure = 719,
  AlreadyRegistered = 712,
  NotRegistered = 713,
};

constexpr size_t kPage = 4096, kAlignment = 256;
constexpr size_t kMostMemory = size_t{64} << 30;

int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text == nullptr ? otherwise : atoi(text);
}
int device_count() { return number("QUANTKV_AMD_DEVICES", 1); }

// ---- memory

struct Allocation {
  unsigned char *map;
  size_t map_bytes; // with the page at the end
  size_t bytes;
};

std::mutex memory_lock;
std::map<unsigned char *, Allocation> allocations;
std::set<void *> registered;

unsigned char *end_of(const Allocation &allocation) { return allocation.map + allocation.map_bytes - kPage; }

// Whether a byte is of an allocation's pages, and if so whether [address, address + bytes) is of the allocation.
bool is_right(const void *pointer, size_t bytes) {
  auto *address = static_cast<unsigned char *>(const_cast<void *>(pointer));
  for (const auto &[start, allocation] : allocations) {
    if (address + bytes <= allocation.map || address >= allocation.map + allocation.map_bytes) continue;
    return address >= start && bytes <= allocation.bytes && address - start <= static_cast<ptrdiff_t>(allocation.bytes - bytes);
  }
  return true; // the host's
}

bool is_device(const void *pointer) {
  auto *address = static_cast<const unsigned char *>(pointer);
  for (const auto &[start, allocation] : allocations) {
    if (address >= start && address < start + allocation.bytes) return true;
  }
  return false;
}

// The first allocation with bytes behind its end that are no longer what they were; null if all is well.
unsigned char *overrun() {
  for (const auto &[start, allocation] : allocations) {
    for (unsigned char *byte = start + allocation.bytes; byte < end_of(allocation); byte++) {
      if (*byte != 0xff) return start;
    }
  }
  return nullptr;
}

// ---- accesses to no memory

struct sigaction before;

void on_fault(int signal, siginfo_t *info, void *) {
  char where[512], text[700];
  amd::describe_running(where, sizeof where);
  const int length = snprintf(text, sizeof text, "amd: access to %p, which is no memory: %s\n", info->si_addr, where);
  if (write(2, text, static_cast<size_t>(length)) < 0) {
  }
  sigaction(signal, &before, nullptr); // and then as without this
}

void watch_accesses() {
  static char stack[64 * 1024];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before);
}

// ---- modules

struct Module {
  const unsigned char *code;
};

uint64_t word(const unsigned char *bytes) {
  uint64_t value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// The code object for this architecture in a bundle, or null.
const unsigned char *in_bundle(const unsigned char *bundle) {
  const uint64_t count = word(bundle + 24);
  const unsigned char *entry = bundle + 32;
  const char *wanted = "hipv4-amdgcn-amd-amdhsa--" QUANTKV_AMD_ARCH;
  for (uint64_t i = 0; i < count; i++) {
    const uint64_t offset = word(entry), length = word(entry + 16);
    if (length == strlen(wanted) && memcmp(entry + 24, wanted, length) == 0) return bundle + offset;
    entry += 24 + length;
  }
  return nullptr;
}

// Whether the code object has a kernel's descriptor.
bool has_kernel(const unsigned char *code, const char *name) {
  const auto *header = reinterpret_cast<const Elf64_Ehdr *>(code);
  const auto *sections = reinterpret_cast<const Elf64_Shdr *>(code + header->e_shoff);
  char wanted[512];
  snprintf(wanted, sizeof wanted, "%s.kd", name);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_DYNSYM) continue;
    const auto *symbols = reinterpret_cast<const Elf64_Sym *>(code + sections[i].sh_offset);
    const auto *strings = reinterpret_cast<const char *>(code + sections[sections[i].sh_link].sh_offset);
    for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++) {
      if (strcmp(strings + symbols[s].st_name, wanted) == 0) return true;
    }
  }
  return false;
}

// Streams and events are one byte that their handle points to.
std::mutex handle_lock;
std::set<void *> streams, events;

bool is_stream(void *stream) {
  std::lock_guard<std::mutex> lock(handle_lock);
  return stream == nullptr || streams.count(stream) != 0;
}
bool is_event(void *event) {
  std::lock_guard<std::mutex> lock(handle_lock);
  return events.count(event) != 0;
}
int create(std::set<void *> &kind, void **handle) {
  std::lock_guard<std::mutex> lock(handle_lock);
  *handle = malloc(1);
  kind.insert(*handle);
  return Success;
}
int destroy(std::set<void *> &kind, void *handle) {
  std::lock_guard<std::mutex> lock(handle_lock);
  if (kind.erase(handle) == 0) return InvalidHandle;
  free(handle);
  return Success;
}

} // namespace

bool amd::find_allocation(uint64_t address, uint64_t &start, uint64_t &end) {
  std::lock_guard<std::mutex> lock(memory_lock);
  const auto after = allocations.upper_bound(reinterpret_cast<unsigned char *>(address));
  if (after == allocations.begin()) return false;
  const auto &[first, allocation] = *std::prev(after);
  start = reinterpret_cast<uint64_t>(first);
  end = start + allocation.bytes;
  return address < end;
}

#define HIP extern "C" __attribute__((visibility("default")))

HIP int hipInit(unsigned flags) {
  if (flags != 0) return InvalidValue;
  return device_count() > 0 ? Success : NoDevice;
}
HIP int hipGetDeviceCount(int *count) {
  *count = device_count();
  return *count > 0 ? Success : NoDevice;
}
HIP int hipSetDevice(int device) { return device >= 0 && device < device_count() ? Success : InvalidDevice; }
HIP int hipGetDevice(int *device) {
  *device = 0;
  return device_count() > 0 ? Success : NoDevice;
}
HIP int hipDeviceGetName(char *name, int bytes, int device) {
  if (device != 0 || bytes <= 0) return InvalidDevice;
  snprintf(name, static_cast<size_t>(bytes), "stand-in for %s", QUANTKV_AMD_ARCH);
  return Success;
}
HIP int hipDeviceTotalMem(size_t *bytes, int) {
  *bytes = kMostMemory;
  return Success;
}
HIP int hipDeviceGetAttribute(int *value, int attribute, int device) {
  constexpr int kMultiprocessorCount = 63;
  if (device != 0 || attribute != kMultiprocessorCount) return InvalidValue;
  *value = number("QUANTKV_AMD_MULTIPROCESSORS", 4);
  return Success;
}
HIP const char *hipGetErrorString(int error) {
  switch (error) {
  case Success: return "no error";
  case InvalidValue: return "invalid argument";
  case OutOfMemory: return "out of memory";
  case NoDevice: return "no ROCm-capable device is detected";
  case InvalidDevice: return "invalid device ordinal";
  case InvalidImage: return "device kernel image is invalid";
  case NoBinaryForGpu: return "no kernel image is available for execution on the device";
  case NotFound: return "named symbol not found";
  case LaunchFailure: return "unspecified launch failure";
  case AlreadyRegistered: return "part or all of the requested memory range is already mapped";
  case NotRegistered: return "pointer does not correspond to a registered memory region";
  default: return "unknown error";
  }
}

HIP int hipMalloc(void **pointer, size_t bytes) {
  *pointer = nullptr;
  if (bytes == 0) return Success;
  if (bytes > kMostMemory) return OutOfMemory;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment, pages = (rounded + kPage - 1) / kPage * kPage;
  void *map = mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return OutOfMemory;
  const Allocation allocation = {static_cast<unsigned char *>(map), pages + kPage, bytes};
  mprotect(end_of(allocation), kPage, PROT_NONE);
  unsigned char *start = end_of(allocation) - rounded;
  memset(start, 0xff, rounded);
  std::lock_guard<std::mutex> lock(memory_lock);
  static const bool watching = (watch_accesses(), true);
  (void)watching;
  allocations[start] = allocation;
  *pointer = start;
  return Success;
}
HIP int hipFree(void *pointer) {
  if (pointer == nullptr) return Success;
  std::lock_guard<std::mutex> lock(memory_lock);
  const auto found = allocations.find(static_cast<unsigned char *>(pointer));
  if (found == allocations.end()) return InvalidValue;
  munmap(found->second.map, found->second.map_bytes);
  allocations.erase(found);
  return Success;
}
// Of no use to this crate: what libraries over the runtime ask it.
HIP int hipMemGetAddressRange(void **start, size_t *bytes, void *pointer) {
  uint64_t first, end;
  if (!amd::find_allocation(reinterpret_cast<uint64_t>(pointer), first, end)) return NotFound;
  *start = reinterpret_cast<void *>(first);
  *bytes = end - first;
  return Success;
}
HIP int hipMemsetAsync(void *pointer, int value, size_t bytes, void *stream) {
  std::lock_guard<std::mutex> lock(memory_lock);
  if (!is_stream(stream) || !is_device(pointer) || !is_right(pointer, bytes)) return InvalidValue;
  memset(pointer, value, bytes);
  return Success;
}
HIP int hipMemcpyAsync(void *dst, const void *src, size_t bytes, int kind, void *stream) {
  constexpr int kDefault = 4;
  std::lock_guard<std::mutex> lock(memory_lock);
  if (!is_stream(stream) || kind != kDefault || !is_right(dst, bytes) || !is_right(src, bytes)) return InvalidValue;
  memmove(dst, src, bytes);
  return Success;
}
HIP int hipHostRegister(void *pointer, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> lock(memory_lock);
  if (pointer == nullptr || bytes == 0) return InvalidValue;
  return registered.insert(pointer).second ? Success : AlreadyRegistered;
}
HIP int hipHostUnregister(void *pointer) {
  std::lock_guard<std::mutex> lock(memory_lock);
  return registered.erase(pointer) != 0 ? Success : NotRegistered;
}

HIP int hipStreamCreateWithFlags(void **stream, unsigned) { return create(streams, stream); }
HIP int hipStreamDestroy(void *stream) { return destroy(streams, stream); }
HIP int hipStreamSynchronize(void *stream) { return is_stream(stream) ? Success : InvalidHandle; }
HIP int hipStreamIsCapturing(void *stream, int *status) {
  *status = 0;
  return is_stream(stream) ? Success : InvalidHandle;
}
HIP int hipStreamWaitEvent(void *stream, void *event, unsigned) {
  return is_stream(stream) && is_event(event) ? Success : InvalidHandle;
}
HIP int hipEventCreateWithFlags(void **event, unsigned) { return create(events, event); }
HIP int hipEventRecord(void *event, void *stream) { return is_stream(stream) && is_event(event) ? Success : InvalidHandle; }
HIP int hipEventDestroy(void *event) { return destroy(events, event); }

HIP int hipModuleLoadData(void **module, const void *image) {
  const auto *code = static_cast<const unsigned char *>(image);
  if (memcmp(code, "__CLANG_OFFLOAD_BUNDLE__", 24) == 0) {
    code = in_bundle(code);
    if (code == nullptr) return NoBinaryForGpu;
  }
  const auto *header = reinterpret_cast<const Elf64_Ehdr *>(code);
  constexpr int kAmdgpu = 224, kVersion5 = 3;
  if (memcmp(code, ELFMAG, SELFMAG) != 0 || header->e_machine != kAmdgpu || header->e_ident[EI_ABIVERSION] != kVersion5) {
    return InvalidImage;
  }
  if ((header->e_flags & 0xff) != QUANTKV_AMD_MACHINE) return NoBinaryForGpu;
  *module = new Module{code};
  return Success;
}
HIP int hipModuleGetFunction(void **function, void *module, const char *name) {
  const unsigned char *code = static_cast<Module *>(module)->code;
  if (!has_kernel(code, name)) return NotFound;
  const amd::Kernel *kernel = amd::find_kernel(code, name);
  if (kernel == nullptr) {
    fprintf(stderr, "amd: kernel %s is not known to the machine\n", name);
    return NotFound;
  }
  *function = const_cast<amd::Kernel *>(kernel);
  return Success;
}
HIP int hipModuleLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **params,
                              void **extra) {
  const uint64_t most = 0xffffffffu; // threads in a dimension of the grid
  if (!is_stream(stream) || extra != nullptr || params == nullptr || block_y != 1 || block_z != 1 || block_x == 0 ||
      grid_x == 0 || grid_y == 0 || grid_z == 0 || uint64_t{grid_x} * block_x > most || grid_y > 65535 || grid_z > 65535) {
    return InvalidValue;
  }
  const auto *kernel = static_cast<const amd::Kernel *>(function);
  const int status = amd::run(*kernel, {grid_x, grid_y, grid_z}, block_x, shared_bytes, params);
  std::lock_guard<std::mutex> lock(memory_lock);
  if (unsigned char *start = overrun()) {
    fprintf(stderr, "amd: kernel %s, or one before it, wrote past the end of the allocation at %p\n", kernel->name, static_cast<void *>(start));
    return LaunchFailure;
  }
  return status;
}
