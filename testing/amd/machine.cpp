#include "machine.h"
#include "powers.h"

#include <algorithm>
#include <bit>
#include <map>
#include <math.h>
#include <mutex>
#include <numeric>
#include <span>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

// The build says what the kernels were compiled for.
#if !defined(QUANTKV_AMD_WAVE)
#error "define QUANTKV_AMD_WAVE (lanes of a wave)"
#endif

// What the IR names: dynamic shared memory, the most that a block can have, and beyond it what nobody may touch.
constexpr size_t kMostShared = 64 * 1024, kCanary = 4096;
extern "C" {
alignas(128) unsigned char amd_dynamic_shared[kMostShared + kCanary];
// A, B and C of the lane that calls amd_product.
alignas(32) unsigned char amd_fragments[3][32];
void amd_register(const amd::Kernel *kernels, int64_t count);
}

namespace amd {
namespace {

using quantkv::simt::Fiber;

constexpr int kWave = QUANTKV_AMD_WAVE, kWarp = 32, kMaxThreads = 1024;

enum class State : uint8_t { Ready, AtCall, AtBarrier, Done };
enum class Call : uint8_t { Permute, Ballot, WaveBarrier, FirstLane, Product };

// What a lane has of a product of matrices.
struct Fragments {
  uint16_t a[16], b[16];
  float c[8];
  uint32_t terms = 0; // of a and b
  bool is_bf16 = false;
};

struct Lane {
  Fiber fiber;
  int index = 0;
  State state = State::Done;
  uint32_t site = 0; // the call's number
  Call call = Call::WaveBarrier;
  uint32_t operand = 0, source = 0; // of Permute: the value, and the lane times 4
  uint64_t result = 0;
  Fragments fragments;
};

// What a kernel finds behind its arguments: the first fields of code object version 5's hidden ones.
struct HiddenArguments {
  uint32_t block_count[3];
  uint16_t group_size[3];
  uint16_t remainder[3];
  unsigned char rest[232];
};

// ---- the launch that runs; there is one at a time, on one thread

std::mutex one_launch;
std::vector<Lane> lanes; // kept from launch to launch, with their stacks
Lane *current = nullptr;
const Kernel *kernel = nullptr;
void *const *arguments = nullptr;
Index3 block = {};
HiddenArguments hidden = {};
int block_size = 0;
std::string fault; // empty: none

std::map<std::string, const Kernel *> &kernels() {
  static std::map<std::string, const Kernel *> all;
  return all;
}

// ---- the order of things

// 0: forward, 1: reversed, else a seed. QUANTKV_AMD_ORDER = forward | reverse | a number from 2.
uint64_t order() {
  static const uint64_t value = [] {
    const char *text = getenv("QUANTKV_AMD_ORDER");
    if (text == nullptr || strcmp(text, "forward") == 0) return uint64_t{0};
    return strcmp(text, "reverse") == 0 ? uint64_t{1} : uint64_t{strtoull(text, nullptr, 10)};
  }();
  return value;
}

// splitmix64
uint64_t next_random(uint64_t &state) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

void arrange(std::span<int64_t> indices, uint64_t &random) {
  std::iota(indices.begin(), indices.end(), 0);
  if (order() == 1) {
    std::reverse(indices.begin(), indices.end());
  } else if (order() > 1) {
    for (size_t i = indices.size(); i > 1; i--) std::swap(indices[i - 1], indices[next_random(random) % i]);
  }
}

// ---- faults

__attribute__((format(printf, 1, 2))) void set_fault(const char *format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  char where[512];
  snprintf(where, sizeof where, "amd: kernel %s, block (%u, %u, %u): ", kernel->name, block.x, block.y, block.z);
  fault = std::string(where) + text;
  fprintf(stderr, "%s\n", fault.c_str());
}

// ---- what lanes do together

uint64_t wait_in(State state, uint32_t site) {
  Lane *self = current;
  self->state = state;
  self->site = site;
  self->fiber.yield();
  return self->result;
}

// gfx90a takes subnormal f16 and bf16 for zero, in and out (rocBLAS's documentation, "MI200 (gfx90a) Considerations").
constexpr bool kFlushes = QUANTKV_AMD_MACHINE == 0x3f;
float flush(float x) { return kFlushes && fpclassify(x) == FP_SUBNORMAL ? copysignf(0.0f, x) : x; }

float half_value(uint16_t bits, bool is_bf16) {
  if (kFlushes && (bits & (is_bf16 ? 0x7f80 : 0x7c00)) == 0) return bits & 0x8000 ? -0.0f : 0.0f;
  if (is_bf16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  float value = exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f : static_cast<float>(fraction + 1024) * power_f32(exponent - 25);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -value : value;
}

// C += A B of 16 x 16 each, by the whole wave. Where the fragments of a lane lie: csrc/core/amdgcn/prim_matrix.h.
//   terms 4 (MFMA)   8 (WMMA, gfx12)   16 (WMMA, gfx11: the upper half of the wave repeats the lower)
bool multiply_matrices(std::span<Lane> wave) {
  const Fragments &any = wave[0].fragments;
  const uint32_t terms = any.terms, sums = kWave == 64 ? 4 : 8;
  if (terms != (kWave == 64 ? 4u : terms == 16 ? 16u : 8u)) return false;
  float a[16][16], b[16][16], c[16][16]; // rows x k, k x columns, rows x columns
  for (size_t l = 0; l < wave.size(); l++) {
    const Fragments &own = wave[l].fragments;
    if (own.terms != terms || own.is_bf16 != any.is_bf16) return false;
    const uint32_t first = terms == 16 ? 0 : static_cast<uint32_t>(l / 16) * terms;
    for (uint32_t i = 0; i < terms; i++) {
      if (terms == 16 && l >= 16 && (own.a[i] != wave[l - 16].fragments.a[i] || own.b[i] != wave[l - 16].fragments.b[i])) return false;
      a[l % 16][first + i] = half_value(own.a[i], any.is_bf16);
      b[first + i][l % 16] = half_value(own.b[i], any.is_bf16);
    }
  }
  const auto row_of = [&](size_t l, uint32_t i) { return terms == 16 ? 2 * i + l / 16 : l / 16 * sums + i; };
  for (size_t l = 0; l < wave.size(); l++) {
    for (uint32_t i = 0; i < sums; i++) c[row_of(l, i)][l % 16] = wave[l].fragments.c[i];
  }
  // Each sum from k = 0 on, a row's sixteen at once.
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < 16; k++) {
      for (int column = 0; column < 16; column++) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (size_t l = 0; l < wave.size(); l++) {
    for (uint32_t i = 0; i < sums; i++) wave[l].fragments.c[i] = flush(c[row_of(l, i)][l % 16]);
  }
  return true;
}

// Makes one call for the lanes of `wave` in `active`, a bit a lane of it.
void make_call(std::span<Lane> wave, uint64_t active) {
  const auto is_active = [&](size_t lane) { return lane < wave.size() && (active >> lane & 1); };
  uint64_t votes = 0;
  size_t first = wave.size();
  for (size_t l = wave.size(); l-- > 0;) {
    if (is_active(l) && wave[l].operand != 0) votes |= uint64_t{1} << l;
    if (is_active(l)) first = l;
  }
  if (wave[first].call == Call::Product) {
    if (wave.size() != static_cast<size_t>(kWave) || std::popcount(active) != kWave) {
      return set_fault("thread %d: a product of matrices without all lanes of the wave", wave[first].index);
    }
    if (!multiply_matrices(wave)) {
      return set_fault("thread %d: lanes of a wave give a product of matrices fragments that do not fit", wave[first].index);
    }
  }
  for (size_t l = 0; l < wave.size(); l++) {
    if (!is_active(l)) continue;
    Lane &lane = wave[l];
    const size_t from = lane.source / 4 % kWave;
    switch (lane.call) {
    // A lane that is not there has nothing sensible to give.
    case Call::Permute: lane.result = is_active(from) ? wave[from].operand : 0xffffffffu; break;
    case Call::Ballot: lane.result = votes; break;
    case Call::FirstLane: lane.result = wave[first].operand; break;
    case Call::WaveBarrier:
    case Call::Product: break;
    }
    lane.state = State::Ready;
  }
}

// Lets the warps of a wave that wait in a call make it. Whether any did.
bool step_wave(std::span<Lane> wave, uint64_t &random) {
  uint64_t waiting[2] = {0, 0};
  uint32_t sites[2] = {0, 0};
  const int warps = kWave / kWarp;
  for (size_t l = 0; l < wave.size(); l++) {
    if (wave[l].state == State::AtCall) waiting[l / kWarp] |= uint64_t{1} << l;
  }
  for (int w = 0; w < warps; w++) {
    if (waiting[w] == 0) continue;
    bool first = true;
    for (size_t l = w * kWarp; l < std::min<size_t>(wave.size(), (w + 1) * kWarp); l++) {
      if (wave[l].state == State::Done) continue;
      if (wave[l].state != State::AtCall || (!first && wave[l].site != sites[w])) {
        set_fault("thread %d: lanes of a warp wait in different places (calls %u and %u)", wave[l].index, sites[w], wave[l].site);
        return false;
      }
      sites[w] = wave[l].site;
      first = false;
    }
  }
  if (waiting[0] == 0 && waiting[1] == 0) return false;
  // A product waits for the other half of the wave, whatever the order.
  const auto is_product = [&](int w) { return waiting[w] != 0 && wave[static_cast<size_t>(w) * kWarp].call == Call::Product; };
  if (warps == 2 && sites[0] == sites[1] && is_product(0) && is_product(1)) {
    make_call(wave, waiting[0] | waiting[1]);
    return true;
  }
  for (int w = 0; w < warps; w++) {
    if (is_product(w) && warps == 2 && waiting[1 - w] != 0) {
      make_call(wave, waiting[1 - w]);
      return true;
    }
  }
  const bool choice = order() == 0 ? true : order() == 1 ? false : next_random(random) % 2 == 0;
  if (waiting[0] != 0 && waiting[1] != 0) {
    if (sites[0] == sites[1] && choice) {
      make_call(wave, waiting[0] | waiting[1]);
      return true;
    }
    // Forward: the earlier call first, as a device does that waits where branches join. Otherwise one of the two.
    const int first = order() == 0 ? sites[1] < sites[0] : order() == 1 ? 1 : choice;
    make_call(wave, waiting[first]);
    return true;
  }
  make_call(wave, waiting[0] | waiting[1]);
  return true;
}

// ---- blocks

void run_lane() {
  kernel->thunk(arguments);
  current->state = State::Done;
}

bool begin_block(uint32_t dynamic_bytes) {
  for (int64_t i = 0; i < kernel->shared_count; i++) memset(kernel->shared[i].address, 0xff, static_cast<size_t>(kernel->shared[i].bytes));
  memset(amd_dynamic_shared, 0xff, dynamic_bytes + kCanary);
  for (int i = 0; i < block_size; i++) {
    lanes[i].index = i;
    lanes[i].state = State::Ready;
    if (!lanes[i].fiber.restart(run_lane)) return false;
  }
  return true;
}

// Runs the lanes of a wave until none can go on. Whether any ran.
bool run_wave(std::span<Lane> wave, uint64_t &random) {
  int64_t all[kWave];
  std::span<int64_t> turns(all, wave.size());
  bool ran = false;
  for (bool again = true; again && fault.empty();) {
    again = false;
    arrange(turns, random);
    for (int64_t l : turns) {
      if (wave[l].state != State::Ready) continue;
      current = &wave[l];
      wave[l].fiber.resume();
      ran = again = true;
      if (!fault.empty()) return true;
    }
    again = step_wave(wave, random) || again;
  }
  return ran;
}

// Ends the barrier if everyone is there who has not returned. Whether it did.
bool end_barrier() {
  const Lane *first = nullptr;
  for (const Lane &lane : std::span(lanes.data(), block_size)) {
    if (lane.state == State::Done) continue;
    if (lane.state != State::AtBarrier) return false;
    if (first != nullptr && lane.site != first->site) {
      set_fault("threads %d and %d wait at different barriers", first->index, lane.index);
      return false;
    }
    if (first == nullptr) first = &lane;
  }
  if (first == nullptr) return false;
  for (Lane &lane : std::span(lanes.data(), block_size)) {
    if (lane.state == State::AtBarrier) lane.state = State::Ready;
  }
  return true;
}

void run_block(uint32_t dynamic_bytes, uint64_t &random) {
  if (!begin_block(dynamic_bytes)) return set_fault("no memory for the stacks of fibers");
  const int count = (block_size + kWave - 1) / kWave;
  int64_t all[kMaxThreads / 32];
  std::span<int64_t> turns(all, count);
  const auto is_done = [] {
    return std::all_of(lanes.begin(), lanes.begin() + block_size, [](const Lane &lane) { return lane.state == State::Done; });
  };
  while (!is_done()) {
    arrange(turns, random);
    bool ran = false;
    for (int64_t w : turns) {
      const size_t first = w * kWave, size = std::min<size_t>(kWave, block_size - first);
      ran |= run_wave(std::span(lanes.data() + first, size), random);
      if (!fault.empty()) return;
    }
    ran |= end_barrier();
    if (!fault.empty()) return;
    if (!ran) return set_fault("deadlock: a barrier that some threads do not reach");
  }
  const unsigned char *end = amd_dynamic_shared + dynamic_bytes;
  if (std::any_of(end, end + kCanary, [](unsigned char byte) { return byte != 0xff; })) {
    set_fault("dynamic shared memory was written past its end");
  }
}

} // namespace

const Kernel *find_kernel(const unsigned char *, const char *name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : found->second;
}

int run(const Kernel &wanted, Index3 grid, uint32_t threads, uint32_t dynamic_bytes, void *const *values) {
  std::lock_guard<std::mutex> lock(one_launch);
  kernel = &wanted;
  arguments = values;
  fault.clear();
  block = {};
  size_t shared = dynamic_bytes;
  for (int64_t i = 0; i < wanted.shared_count; i++) shared += static_cast<size_t>(wanted.shared[i].bytes);
  int status = kSuccess;
  if (threads > kMaxThreads || shared > kMostShared) {
    set_fault("%u threads and %zu bytes of shared memory, which no device has", threads, shared);
    status = kInvalidValue;
  } else {
    block_size = static_cast<int>(threads);
    if (lanes.size() < threads) lanes.resize(threads);
    hidden = {{grid.x, grid.y, grid.z}, {static_cast<uint16_t>(threads), 1, 1}, {0, 0, 0}, {}};
    uint64_t random = order();
    const int64_t plane = static_cast<int64_t>(grid.x) * grid.y;
    std::vector<int64_t> blocks(static_cast<size_t>(plane * grid.z));
    arrange(blocks, random);
    for (int64_t b : blocks) {
      block = {static_cast<uint32_t>(b % grid.x), static_cast<uint32_t>(b / grid.x % grid.y), static_cast<uint32_t>(b / plane)};
      run_block(dynamic_bytes, random);
      if (!fault.empty()) break;
    }
    status = fault.empty() ? kSuccess : kLaunchFailure;
  }
  current = nullptr;
  kernel = nullptr;
  return status;
}

void describe_running(char *text, size_t bytes) {
  if (kernel == nullptr) {
    snprintf(text, bytes, "no kernel is running");
  } else {
    snprintf(text, bytes, "kernel %s, block (%u, %u, %u), thread %d", kernel->name, block.x, block.y, block.z,
             current == nullptr ? -1 : current->index);
  }
}

} // namespace amd

// ---- what the IR calls that is more than a lane's arithmetic (instructions.cpp)

using namespace amd;

namespace {

int lane_of_wave() { return current->index % kWave; }

uint32_t count_below(uint32_t mask, int lanes) { return __builtin_popcount(lanes >= 32 ? mask : mask & ((1u << lanes) - 1)); }

} // namespace

extern "C" {

void amd_register(const Kernel *list, int64_t count) {
  for (int64_t i = 0; i < count; i++) kernels()[list[i].name] = &list[i];
}

const void *amd_implicitarg_ptr() { return &hidden; }
uint32_t amd_workitem_id_x() { return static_cast<uint32_t>(current->index); }
uint32_t amd_workgroup_id_x() { return block.x; }
uint32_t amd_workgroup_id_y() { return block.y; }
uint32_t amd_workgroup_id_z() { return block.z; }
uint32_t amd_mbcnt_lo(uint32_t mask, uint32_t base) { return base + count_below(mask, lane_of_wave()); }
uint32_t amd_mbcnt_hi(uint32_t mask, uint32_t base) {
  return lane_of_wave() <= 32 ? base : base + count_below(mask, lane_of_wave() - 32);
}

uint32_t amd_ds_bpermute(uint32_t site, uint32_t source, uint32_t value) {
  current->call = Call::Permute;
  current->source = source;
  current->operand = value;
  return static_cast<uint32_t>(wait_in(State::AtCall, site));
}
uint64_t amd_ballot_i64(uint32_t site, bool predicate) {
  current->call = Call::Ballot;
  current->operand = predicate;
  return wait_in(State::AtCall, site);
}
uint32_t amd_ballot_i32(uint32_t site, bool predicate) { return static_cast<uint32_t>(amd_ballot_i64(site, predicate)); }
void amd_wave_barrier(uint32_t site) {
  current->call = Call::WaveBarrier;
  wait_in(State::AtCall, site);
}
uint32_t amd_readfirstlane(uint32_t site, uint32_t value) {
  current->call = Call::FirstLane;
  current->operand = value;
  return static_cast<uint32_t>(wait_in(State::AtCall, site));
}
uint32_t amd_readfirstlane_i32(uint32_t site, uint32_t value) { return amd_readfirstlane(site, value); }
void amd_product(uint32_t site, uint32_t terms, bool is_bf16) {
  Lane *self = current;
  self->call = Call::Product;
  self->operand = 0;
  self->fragments.terms = terms;
  self->fragments.is_bf16 = is_bf16;
  memcpy(self->fragments.a, amd_fragments[0], sizeof self->fragments.a);
  memcpy(self->fragments.b, amd_fragments[1], sizeof self->fragments.b);
  memcpy(self->fragments.c, amd_fragments[2], sizeof self->fragments.c);
  wait_in(State::AtCall, site);
  memcpy(amd_fragments[2], self->fragments.c, sizeof self->fragments.c);
}
void amd_s_barrier(uint32_t site) { wait_in(State::AtBarrier, site); }

} // extern "C"
