// Runs retargeted kernels (retarget.rs) on the CPU, a lane of a wave as a fiber (testing/simt/fiber.h).
//
//   grid  -> blocks, one after another
//   block -> waves of 64 or 32 lanes; one runs until none of its lanes can go on, then the next
//   wave  -> lanes, each until it waits: in something that lanes do together, or at the block's barrier
//
// There is no parallelism and no preemption: the same order gives the same result. The order of blocks, waves and lanes
// is forward, reversed, or shuffled by a seed anew each round.
//
// A device runs the lanes of a wave together under a mask; here they are gathered at each call that lanes make together
// (ds_bpermute, ballot, wave_barrier), by the number that retarget.rs gave the call. What the kernels rely on, see
// csrc/core/amdgcn/platform.h, is that a warp of 32 lanes stays together and that the other half of a wave of 64 does not
// matter. So it is a fault if the lanes of a warp wait in different places; and two halves that wait at the same call
// make it together or one by one, as the order has it.
//
// A fault ends the launch with a message and an error; the fibers are dropped where they stand.
#pragma once
#include "../simt/fiber.h"

#include <stddef.h>
#include <stdint.h>

namespace amd {

struct SharedVariable {
  unsigned char *address;
  int64_t bytes;
};

// A kernel as retarget.rs lists it.
struct Kernel {
  const char *name;
  void (*thunk)(void *const *arguments);
  int64_t parameter_count;
  const int64_t *parameter_bytes;
  int64_t shared_count;
  const SharedVariable *shared;
  int32_t uses_dynamic;
};

// By its code object and its name; null if there is none. Which machine is linked decides what of the two it runs:
// machine.cpp the retargeted kernel of that name, testing/isa the code object's own code.
const Kernel *find_kernel(const unsigned char *code_object, const char *name);

// The allocation that holds an address, by its first byte and the one after its last: hip.cpp's.
bool find_allocation(uint64_t address, uint64_t &start, uint64_t &end);

struct Index3 {
  uint32_t x, y, z;
};

// hipError_t of the faults.
enum : int { kSuccess = 0, kInvalidValue = 1, kLaunchFailure = 719 };

// Runs a grid. The message of a fault goes to stderr.
int run(const Kernel &kernel, Index3 grid, uint32_t threads, uint32_t dynamic_bytes, void *const *arguments);

// Whether a kernel is running, and which: for whoever is told of an access to no memory.
void describe_running(char *text, size_t bytes);

} // namespace amd
