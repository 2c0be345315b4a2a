// The machine behind testing/amd/hip.cpp that runs a code object's own code: the simulator in lib.rs.
#include "../amd/machine.h"

#include <atomic>
#include <stdio.h>
#include <string>

extern "C" {
const void *quantkv_isa_find(const unsigned char *code_object, const char *name);
int quantkv_isa_run(const void *kernel, const uint32_t *grid, uint32_t threads, uint32_t dynamic_bytes,
                    void *const *arguments, int (*find_allocation)(uint64_t address, uint64_t *start, uint64_t *end));
}

namespace amd {
namespace {

// What the kernel of machine.h has besides its name is of no use here: the code object says it.
struct Simulated : Kernel {
  explicit Simulated(const char *name, const void *program) : Kernel{}, own_name(name), program(program) {
    this->name = own_name.c_str();
  }
  std::string own_name;
  const void *program;
};

std::atomic<const Kernel *> running;

int find(uint64_t address, uint64_t *start, uint64_t *end) { return find_allocation(address, *start, *end); }

} // namespace

// Once for each kernel of a program: kept as long as the process lives.
const Kernel *find_kernel(const unsigned char *code_object, const char *name) {
  const void *program = quantkv_isa_find(code_object, name);
  return program == nullptr ? nullptr : new Simulated(name, program);
}

int run(const Kernel &kernel, Index3 grid, uint32_t threads, uint32_t dynamic_bytes, void *const *arguments) {
  const uint32_t blocks[3] = {grid.x, grid.y, grid.z};
  running = &kernel;
  const int status =
      quantkv_isa_run(static_cast<const Simulated &>(kernel).program, blocks, threads, dynamic_bytes, arguments, find);
  running = nullptr;
  return status;
}

void describe_running(char *text, size_t bytes) {
  const Kernel *kernel = running;
  snprintf(text, bytes, "%s%s", kernel == nullptr ? "no kernel is running" : "kernel ", kernel == nullptr ? "" : kernel->name);
}

} // namespace amd
