// Runs a grid of CUDA threads on the CPU: the engine behind platform.h, prim.h and launch.h of this folder.
//
//   grid  -> blocks, one after another
//   block -> warps, one runs until none of its lanes can go on, then the next
//   warp  -> 32 lanes, each a fiber that runs until it has to wait for others
//
// So there is no parallelism and no preemption: every run with the same order gives the same result. The order of
// blocks, warps and lanes is forward, reversed, or shuffled anew each round by a seed; a kernel that forgot a barrier
// gives another result in one of them. Only the blocks of a launch that counts on their order (QKV_LAUNCH_IN_ORDER) go forward
// always.
//
// A warp collective (shuffle, mma, ...) works by deposit: each lane leaves its operand and waits; the last one to
// arrive computes every lane's result. A fault (deadlock, misaligned address, ...) ends the launch with a message and
// a status: the fibers are dropped where they stand.
#pragma once
#include "../../csrc/quantkv.h"
#include "fiber.h"

#include <memory>
#include <source_location>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <string>
#include <type_traits>
#include <vector>

namespace quantkv::simt {

constexpr int kLanes = 32;

// The place in a kernel that a lane waits at; the default argument of each waiting function.
using Site = std::source_location;

// cudaError_t of the faults, by the runtime's numbers.
enum class Fault : int { InvalidValue = 1, InvalidConfiguration = 9, MisalignedAddress = 716, Deadlock = 702, LaunchFailure = 719 };

inline int status_of(Fault fault) { return QUANTKV_DEVICE_ERROR + static_cast<int>(fault); }

struct Lane;

// A lane's view of a warp collective: the operands and results of all lanes, and who takes part.
struct Deposits {
  Lane *lanes;
  uint32_t present; // bit l: lane l takes part; the others have returned, or the block ends before them
  template <class T> const T &operand(int lane) const;
  template <class T> T &result(int lane) const;
};
using Complete = void (*)(const Deposits &);

struct AsyncCopy {
  void *shared;
  const void *global; // null: zeros
  size_t bytes;
};

// A product of a warpgroup (prim_hopper.h), issued and not yet done.
struct PendingProduct {};
struct alignas(8) PendingProductSpace {
  unsigned char bytes[80];
};

enum class State : uint8_t { Ready, AtCollective, AtBarrier, AtObject, Done };

// One CUDA thread.
struct Lane {
  Fiber fiber;
  int index = 0; // in the block
  State state = State::Done;
  const char *waits_for = ""; // name of the function it waits in, and where that was called
  Site site;
  alignas(16) unsigned char operand[64];
  alignas(16) unsigned char result[64];
  std::vector<AsyncCopy> copies; // issued and not yet done, oldest first
  std::vector<size_t> groups;    // of those, how many belong to each committed group
  std::vector<PendingProductSpace> products; // the same of products
  std::vector<size_t> product_groups;
  const void *object = nullptr; // what it waits for, AtObject
};

template <class T> const T &Deposits::operand(int lane) const { return *reinterpret_cast<const T *>(lanes[lane].operand); }
template <class T> T &Deposits::result(int lane) const { return *reinterpret_cast<T *>(lanes[lane].result); }

struct Index3 {
  int x, y, z;
};

// What the lane that runs now can ask for. Plain globals: there is one launch at a time, on one OS thread.
extern Lane *current;
extern Index3 block_index;
extern Index3 grid_size;
extern int block_size;

// What every kernel's dynamic shared memory is aligned to.
constexpr size_t kSharedAlignment = 128;
// The launch's dynamic shared memory, null if it has none, for a kernel that asks for this alignment. It is aligned to no more, so
// that a kernel which counts on more goes wrong.
unsigned char *dynamic_shared(size_t alignment);

// Ends the launch with a message that names kernel, block and thread. Does not return: the fiber is dropped.
[[noreturn]] void fail(Fault fault, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Waits for every thread of the block that has not returned.
void barrier(const Site &site);
// Waits until another thread of the block calls wake() with the same address.
void wait_for(const void *object, const char *name, const Site &site);
void wake(const void *object);
// Counts this thread at barrier `id` of the block, and with `waits` waits until `threads` are counted.
void named_barrier(int id, int threads, bool waits, const Site &site);
// Waits for every lane of the warp that has not returned; `complete` is run once, by the last to arrive. With
// `aligned`, lanes that have returned are a fault, as the instruction does not allow it.
void rendezvous(const char *name, const Site &site, Complete complete, bool aligned);

template <class Result, class Operand>
Result collective(const char *name, const Site &site, const Operand &operand, Complete complete, bool aligned = false) {
  static_assert(sizeof(Operand) <= sizeof(Lane::operand) && sizeof(Result) <= sizeof(Lane::result));
  static_assert(std::is_trivially_copyable_v<Operand> && std::is_trivially_copyable_v<Result>);
  memcpy(current->operand, &operand, sizeof operand);
  rendezvous(name, site, complete, aligned);
  Result result;
  memcpy(&result, current->result, sizeof result);
  return result;
}

// Static shared memory: fills the array with NaN bytes when the first thread of a block comes to its declaration.
// `last_block` lives beside the array.
void begin_shared(void *array, size_t bytes, uint64_t &last_block);
// Fails unless the address is a multiple of `bytes` (of an access `name`).
void check_aligned(const char *name, const void *address, size_t bytes);
// Fails unless [address, address + bytes) is shared memory of the running block, or is not, respectively.
void check_shared(const char *name, const void *address, size_t bytes);
void check_global(const char *name, const void *address, size_t bytes);
// Programmatic dependent launch: this block has waited for the kernel before it.
void waited_for_previous_kernel();

// A kernel with its arguments, copied by value.
struct Work {
  virtual ~Work() = default;
  virtual void run_thread() const = 0;
  const char *name = "";
  Index3 grid = {};
  int threads = 0;
  size_t shared_bytes = 0;        // dynamic
  size_t static_shared_limit = 0; // what that leaves for static arrays
  bool overlapped = false;
  bool in_order = false; // blocks wait for blocks of lower index
};

// Runs a grid now and gives a quantkv_status.
int run(const Work &work);

} // namespace quantkv::simt

extern "C" {
// 0: forward, 1: reversed, else the seed of a shuffle. Else the environment decides:
// QUANTKV_SIMT_ORDER = forward | reverse | a number from 2.
QUANTKV_API void quantkv_simt_set_order(uint64_t order);
// The message of the last fault, or "". Valid until the next fault.
QUANTKV_API const char *quantkv_simt_last_fault(void);
}
