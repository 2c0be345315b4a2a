#include "scheduler.h"

#if defined(QUANTKV_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

namespace quantkv::simt {

Lane *current = nullptr;
Index3 block_index = {};
Index3 grid_size = {};
int block_size = 0;

namespace {

constexpr int kMaxThreads = 1024;

// What a warp's lanes are about to do together.
struct Warp {
  uint32_t present = 0; // lanes that have not returned
  uint32_t arrived = 0; // lanes that wait in the collective `name` at `site`
  const char *name = nullptr;
  Site site;
  Complete complete = nullptr;
  bool aligned = false;
};

struct Range {
  const unsigned char *begin;
  size_t bytes;
};

// The block that runs.
struct Block {
  std::vector<Lane> lanes; // reused from block to block, with their stacks
  Warp warps[kMaxThreads / kLanes];
  int size = 0;
  int at_barrier = 0;
  int done = 0;
  struct {
    int threads = 0, arrived = 0;
  } named[16];
  Site barrier_site;
  uint64_t serial = 0; // counts every block ever run
  std::vector<Range> shared;
  size_t static_shared_bytes = 0;
  bool waited_for_previous = false;
};

// Dynamic shared memory of the launch. It is made when a lane asks, since the kernel says only then how it is to be aligned.
struct DynamicShared {
  void *allocation = nullptr;
  unsigned char *begin = nullptr;
  size_t alignment = 0;
  uint64_t last_block = 0; // that it was filled for
};

std::mutex one_launch; // all state here is global
Block block;
DynamicShared dynamic;
const Work *work = nullptr;
std::string fault_message;
int fault_status = QUANTKV_OK;

// ---- the order of things

uint64_t order_from_environment() {
  const char *text = getenv("QUANTKV_SIMT_ORDER");
  if (text == nullptr || strcmp(text, "forward") == 0) return 0;
  if (strcmp(text, "reverse") == 0) return 1;
  return strtoull(text, nullptr, 10);
}

uint64_t &order() {
  static uint64_t value = order_from_environment();
  return value;
}

// splitmix64
uint64_t next_random(uint64_t &state) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Fills `indices` with 0 .. its length in the order chosen.
void arrange(std::span<int64_t> indices, uint64_t &random) {
  std::iota(indices.begin(), indices.end(), 0);
  if (order() == 1) {
    std::reverse(indices.begin(), indices.end());
  } else if (order() > 1) {
    for (size_t i = indices.size(); i > 1; i--) std::swap(indices[i - 1], indices[next_random(random) % i]);
  }
}

// ---- faults

// "file.h:12", without the folders.
std::string text_of(const Site &site) {
  const char *slash = strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

void set_fault(Fault fault, const std::string &text) {
  fault_status = status_of(fault);
  fault_message = std::string("simt: kernel ") + work->name + ", " + text;
  fprintf(stderr, "%s\n", fault_message.c_str());
}

std::string block_text() {
  char text[80];
  snprintf(text, sizeof text, "block (%d, %d, %d)", block_index.x, block_index.y, block_index.z);
  return text;
}

// Where threads wait, and the first and the number of those at each place.
std::string deadlock_text() {
  struct Place {
    std::string name;
    int first, count;
  };
  std::vector<Place> places;
  int waiting = 0;
  for (int i = 0; i < block.size; i++) {
    const Lane &lane = block.lanes[i];
    if (lane.state == State::Done) continue;
    waiting++;
    const std::string name = std::string(lane.waits_for) + " at " + text_of(lane.site);
    const auto known = std::find_if(places.begin(), places.end(), [&](const Place &place) { return place.name == name; });
    if (known == places.end()) places.push_back({name, i, 1});
    else known->count++;
  }
  std::string text = block_text() + ": deadlock, a barrier or collective that some threads do not reach:";
  for (const Place &place : places) {
    text += " thread " + std::to_string(place.first) + " in " + place.name;
    text += place.count > 1 ? " and " + std::to_string(place.count - 1) + " more;" : ";";
  }
  return text + " " + std::to_string(waiting) + " wait, " + std::to_string(block.done) + " returned";
}

// ---- waiting

bool is_same(const Site &x, const Site &y) {
  return x.line() == y.line() && (x.file_name() == y.file_name() || strcmp(x.file_name(), y.file_name()) == 0);
}

void wait_in(State state, const char *name, const Site &site) {
  current->state = state;
  current->waits_for = name;
  current->site = site;
  current->fiber.yield();
}

// Ends the warp's collective if everyone is there.
void complete_collective(int index) {
  Warp &warp = block.warps[index];
  const uint32_t present = warp.present;
  if (warp.arrived == 0 || warp.arrived != present) return;
  if (warp.aligned && present != 0xffffffffu) {
    fail(Fault::LaunchFailure, "%s at %s needs all 32 lanes; present are %08x", warp.name, text_of(warp.site).c_str(), present);
  }
  Lane *lanes = &block.lanes[index * kLanes];
  warp.complete(Deposits{lanes, present});
  for (int l = 0; l < kLanes; l++) {
    if (present >> l & 1) lanes[l].state = State::Ready;
  }
  warp.arrived = 0;
}

// Ends the block's barrier if everyone is there.
void complete_barrier() {
  if (block.at_barrier == 0 || block.at_barrier + block.done < block.size) return;
  for (int i = 0; i < block.size; i++) {
    if (block.lanes[i].state == State::AtBarrier) block.lanes[i].state = State::Ready;
  }
  block.at_barrier = 0;
}

void run_lane() {
  work->run_thread();
  current->state = State::Done;
  current->copies.clear(); // of copies that nobody waited for, nobody can see the result
  current->groups.clear();
  current->products.clear();
  current->product_groups.clear();
  block.done++;
  block.warps[current->index / kLanes].present &= ~(1u << current->index % kLanes);
  complete_collective(current->index / kLanes);
  complete_barrier();
}

// ---- blocks

bool begin_block() {
  block.serial++;
  block.at_barrier = 0;
  block.done = 0;
  block.shared.clear();
  block.static_shared_bytes = 0;
  block.waited_for_previous = false;
  for (Warp &warp : block.warps) warp.present = warp.arrived = 0;
  for (auto &barrier : block.named) barrier = {};
  for (int i = 0; i < block.size; i++) {
    Lane &lane = block.lanes[i];
    lane.index = i;
    lane.state = State::Ready;
    lane.copies.clear();
    lane.groups.clear();
    lane.products.clear();
    lane.product_groups.clear();
    block.warps[i / kLanes].present |= 1u << i % kLanes;
    if (!lane.fiber.restart(run_lane)) return false;
  }
  return true;
}

// Runs the lanes of a warp, in turn, until none can go on. Whether any ran.
bool run_warp(int warp, uint64_t &random) {
  int64_t all_lanes[kLanes];
  std::span<int64_t> lanes(all_lanes, static_cast<size_t>(std::min(kLanes, block.size - warp * kLanes)));
  arrange(lanes, random);
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (int64_t l : lanes) {
      Lane &lane = block.lanes[warp * kLanes + l];
      if (lane.state != State::Ready) continue;
      current = &lane;
      lane.fiber.resume();
      ran = again = true;
      if (fault_status != QUANTKV_OK) return true;
    }
  }
  return ran;
}

void run_block(uint64_t &random) {
  if (!begin_block()) return set_fault(Fault::LaunchFailure, "no memory for the stacks of fibers");
  int64_t all_warps[kMaxThreads / kLanes];
  std::span<int64_t> warps(all_warps, static_cast<size_t>((block.size + kLanes - 1) / kLanes));
  while (block.done < block.size) {
    arrange(warps, random);
    bool ran = false;
    for (int64_t warp : warps) {
      ran |= run_warp(static_cast<int>(warp), random);
      if (fault_status != QUANTKV_OK) return;
    }
    if (!ran) return set_fault(Fault::Deadlock, deadlock_text());
  }
  if (work->overlapped && !block.waited_for_previous) {
    set_fault(Fault::LaunchFailure, block_text() + ": launched overlapped, and no thread called wait_for_previous_kernel()");
  }
}

// An odd multiple of the alignment, and of exactly the size asked for: AddressSanitizer sees the bytes beside it.
bool make_dynamic_shared(size_t alignment) {
  if (posix_memalign(&dynamic.allocation, 2 * alignment, alignment + work->shared_bytes) != 0) return false;
#if defined(QUANTKV_SIMT_ASAN)
  ASAN_POISON_MEMORY_REGION(dynamic.allocation, alignment);
#endif
  dynamic.begin = static_cast<unsigned char *>(dynamic.allocation) + alignment;
  dynamic.alignment = alignment;
  return true;
}

// Dynamic shared memory lies behind static arrays: beside those the seam promises no more than the usual alignment.
void check_shared_alignment() {
  if (dynamic.alignment > kSharedAlignment && block.static_shared_bytes > 0) {
    fail(Fault::LaunchFailure, "dynamic shared memory aligned to %zu beside static arrays", dynamic.alignment);
  }
}

} // namespace

void fail(Fault fault, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  set_fault(fault, block_text() + " thread " + std::to_string(current->index) + ": " + text);
  for (;;) current->fiber.yield(); // never resumed
}

void barrier(const Site &site) {
  if (block.at_barrier > 0 && !is_same(block.barrier_site, site)) {
    fail(Fault::LaunchFailure, "sync_threads at %s while others wait at %s", text_of(site).c_str(), text_of(block.barrier_site).c_str());
  }
  block.barrier_site = site;
  block.at_barrier++;
  current->state = State::AtBarrier;
  complete_barrier();
  if (current->state == State::AtBarrier) wait_in(State::AtBarrier, "sync_threads", site);
}

void wait_for(const void *object, const char *name, const Site &site) {
  current->object = object;
  wait_in(State::AtObject, name, site);
}

void wake(const void *object) {
  for (int i = 0; i < block.size; i++) {
    Lane &lane = block.lanes[i];
    if (lane.state == State::AtObject && lane.object == object) lane.state = State::Ready;
  }
}

void named_barrier(int id, int threads, bool waits, const Site &site) {
  if (id < 1 || id > 15 || threads % kLanes != 0) {
    fail(Fault::LaunchFailure, "named barrier %d of %d threads at %s", id, threads, text_of(site).c_str());
  }
  auto &barrier = block.named[id];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fail(Fault::LaunchFailure, "named barrier %d at %s is for %d threads, others say %d", id, text_of(site).c_str(), threads, barrier.threads);
  }
  barrier.threads = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    wake(&barrier);
  } else if (waits) {
    wait_for(&barrier, "named_barrier_sync", site);
  }
}

void rendezvous(const char *name, const Site &site, Complete complete, bool aligned) {
  const int index = current->index / kLanes;
  Warp &warp = block.warps[index];
  if (warp.arrived != 0 && !(warp.complete == complete && is_same(warp.site, site))) {
    fail(Fault::LaunchFailure, "%s at %s while other lanes of the warp wait in %s at %s", name, text_of(site).c_str(), warp.name,
         text_of(warp.site).c_str());
  }
  warp.name = name;
  warp.site = site;
  warp.complete = complete;
  warp.aligned = aligned;
  warp.arrived |= 1u << (current->index % kLanes);
  current->state = State::AtCollective;
  complete_collective(index);
  if (current->state == State::AtCollective) wait_in(State::AtCollective, name, site);
}

void begin_shared(void *array, size_t bytes, uint64_t &last_block) {
  if (last_block == block.serial) return;
  last_block = block.serial;
  memset(array, 0xff, bytes);
  block.shared.push_back({static_cast<unsigned char *>(array), bytes});
  block.static_shared_bytes += bytes;
  check_shared_alignment();
  if (block.static_shared_bytes > work->static_shared_limit) {
    fail(Fault::InvalidValue, "%zu bytes of static shared memory; beside %zu dynamic ones a block has %zu",
         block.static_shared_bytes, work->shared_bytes, work->static_shared_limit);
  }
}

unsigned char *dynamic_shared(size_t alignment) {
  if (work->shared_bytes == 0) return nullptr;
  if (dynamic.allocation == nullptr && !make_dynamic_shared(alignment)) {
    fail(Fault::InvalidValue, "no memory for %zu bytes of shared memory", work->shared_bytes);
  }
  if (dynamic.alignment != alignment) {
    fail(Fault::LaunchFailure, "dynamic shared memory aligned to %zu and to %zu", dynamic.alignment, alignment);
  }
  check_shared_alignment();
  if (dynamic.last_block != block.serial) {
    dynamic.last_block = block.serial;
    memset(dynamic.begin, 0xff, work->shared_bytes);
    block.shared.push_back({dynamic.begin, work->shared_bytes});
  }
  return dynamic.begin;
}

void check_aligned(const char *name, const void *address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(Fault::MisalignedAddress, "%s: address %p is not a multiple of %zu", name, address, bytes);
  }
}

static bool is_shared(const void *address, size_t bytes, bool whole) {
  const auto *begin = static_cast<const unsigned char *>(address), *end = begin + bytes;
  for (const Range &range : block.shared) {
    const unsigned char *range_end = range.begin + range.bytes;
    if (whole ? begin >= range.begin && end <= range_end : begin < range_end && end > range.begin) return true;
  }
  return false;
}

void check_shared(const char *name, const void *address, size_t bytes) {
  if (!is_shared(address, bytes, true)) {
    fail(Fault::LaunchFailure, "%s: %zu bytes at %p are not in the block's shared memory", name, bytes, address);
  }
}

void check_global(const char *name, const void *address, size_t bytes) {
  if (is_shared(address, bytes, false)) fail(Fault::LaunchFailure, "%s: address %p is shared, not global memory", name, address);
}

void waited_for_previous_kernel() { block.waited_for_previous = true; }

int run(const Work &wanted) {
  std::lock_guard<std::mutex> lock(one_launch);
  work = &wanted;
  fault_status = QUANTKV_OK;
  block.size = block_size = wanted.threads;
  grid_size = wanted.grid;
  if (block.lanes.size() < static_cast<size_t>(wanted.threads)) block.lanes.resize(static_cast<size_t>(wanted.threads));

  uint64_t random = order();
  const int64_t plane = static_cast<int64_t>(wanted.grid.x) * wanted.grid.y;
  std::vector<int64_t> blocks(static_cast<size_t>(plane * wanted.grid.z));
  if (wanted.in_order) std::iota(blocks.begin(), blocks.end(), 0);
  else arrange(blocks, random);
  for (int64_t b : blocks) {
    block_index = {static_cast<int>(b % wanted.grid.x), static_cast<int>(b / wanted.grid.x % wanted.grid.y), static_cast<int>(b / plane)};
    run_block(random);
    if (fault_status != QUANTKV_OK) break;
  }
  free(dynamic.allocation);
  dynamic = {};
  current = nullptr;
  work = nullptr;
  return fault_status;
}

} // namespace quantkv::simt

void quantkv_simt_set_order(uint64_t order) {
  std::lock_guard<std::mutex> lock(quantkv::simt::one_launch);
  quantkv::simt::order() = order;
}

const char *quantkv_simt_last_fault(void) { return quantkv::simt::fault_message.c_str(); }
