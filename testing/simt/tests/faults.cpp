// What the shim is for: kernels with one bug each, and what shows it. A race shows as poison in at least one order; what
// hardware would hang on or trap at ends the launch with a status and a message.
#include "check.h"

#include <stdlib.h>
#include <string>
#include <vector>

namespace tests {
namespace {

// ---- orders

QKV_KERNEL void log_order(int *log, uint32_t *count) {
  log[atomic_add(count, 1)] = block_index_x() * block_threads() + thread_index();
}

std::vector<int> order_of_threads(uint64_t order) {
  std::vector<int> log(4 * 96);
  uint32_t count = 0;
  const Grid grid = {4, 1, 1};
  quantkv_simt_set_order(order);
  CHECK(QKV_LAUNCH((log_order), grid, 96, 0, nullptr, log.data(), &count) == QUANTKV_OK);
  CHECK(count == log.size());
  return log;
}

// ---- bugs that show as poison or as a wrong number

enum Bug { NONE, NO_BARRIER, NO_WARP_BARRIER, NO_COPY_WAIT, WAIT_TOO_LAX, WAIT_WITHOUT_BARRIER };

// out[t] = in[reversed t] + in[2nd reversed t] + in[t ^ 1], each through another kind of shared memory.
QKV_KERNEL void gather_shared(const float *in, float *out, Bug bug) {
  QKV_SHARED(float, block_tile, 64);
  QKV_SHARED(float, warp_tile, 64);
  QKV_DYNAMIC_SHARED(bytes); // two stages of 64 x 16 bytes
  const int t = thread_index();
  for (int stage = 0; stage < 2; stage++) {
    copy_async_16(bytes + stage * 1024 + t * 16, in + stage * 256 + t * 4, true);
    copy_async_commit();
  }
  block_tile[t] = in[t];
  warp_tile[t] = in[t];
  if (bug != NO_WARP_BARRIER) sync_warp();
  float sum = warp_tile[t ^ 1];
  if (bug != NO_BARRIER) sync_threads();
  sum += block_tile[63 - t];
  if (bug == WAIT_TOO_LAX) {
    copy_async_wait<1>();
  } else if (bug != NO_COPY_WAIT) {
    copy_async_wait<0>();
  }
  if (bug != WAIT_WITHOUT_BARRIER) sync_threads();
  const float *second = reinterpret_cast<const float *>(bytes + 1024);
  out[t] = sum + second[4 * (63 - t)];
}

// Whether the bug changes the result in one of the orders.
bool shows(Bug bug) {
  alignas(16) float in[512];
  for (int i = 0; i < 512; i++) in[i] = static_cast<float>(i * i % 97);
  bool right = true;
  for (uint64_t order = 0; order < 4; order++) {
    float out[64];
    quantkv_simt_set_order(order);
    CHECK(QKV_LAUNCH((gather_shared), kOneBlock, 64, 2048, nullptr, in, out, bug) == QUANTKV_OK);
    for (int t = 0; t < 64; t++) right &= out[t] == in[t ^ 1] + in[63 - t] + in[256 + 4 * (63 - t)];
  }
  quantkv_simt_set_order(0);
  return !right;
}

// ---- bugs that end the launch

enum Trap {
  SHUFFLE_IN_A_BRANCH,
  TWO_BARRIERS,
  TWO_COLLECTIVES,
  LANES_MISSING,
  MISALIGNED_LOAD,
  MISALIGNED_COPY,
  MISALIGNED_MATRIX_ROW,
  COPY_TO_GLOBAL,
  MATRIX_FROM_GLOBAL,
  LOAD_FROM_SHARED,
  MISALIGNED_ATOMIC,
  TWO_ALIGNMENTS
};

QKV_KERNEL void trap(Trap which, unsigned char *global) {
  QKV_DYNAMIC_SHARED(shared);
  const int t = thread_index();
  uint32_t r[4];
  switch (which) {
  case SHUFFLE_IN_A_BRANCH:
    if (t < 20) (void)shuffle_xor(t, 1);
    sync_threads();
    break;
  case TWO_BARRIERS:
    if (t < 32) {
      sync_threads();
    } else {
      sync_threads();
    }
    break;
  case TWO_COLLECTIVES:
    if (t % 2) {
      (void)shuffle(t, 0);
    } else {
      (void)ballot(true);
    }
    break;
  case LANES_MISSING:
    if (t % 32 == 31) return;
    (void)transpose_8x8(0);
    break;
  case MISALIGNED_LOAD: (void)load_stream(reinterpret_cast<const Words<4> *>(global + 8)); break;
  case MISALIGNED_COPY: copy_async_16(shared + 16 * t, global + 4, true); break;
  case MISALIGNED_MATRIX_ROW: load_matrix_x4(r, shared + 8 * t); break;
  case COPY_TO_GLOBAL: copy_async_16(global, global + 16, true); break;
  case MATRIX_FROM_GLOBAL: load_matrix_x4_transposed(r, global); break;
  case LOAD_FROM_SHARED: (void)load_stream(reinterpret_cast<const Words<1> *>(shared)); break;
  case MISALIGNED_ATOMIC: atomic_or(reinterpret_cast<uint32_t *>(global + 2), 1); break;
  case TWO_ALIGNMENTS: {
    QKV_PANELS_SHARED(panels);
    panels[0] = 0;
    break;
  }
  }
}

// The launch fails with this fault, and the message has these words.
bool ends_with(Trap which, simt::Fault fault, const char *words) {
  alignas(16) unsigned char global[64] = {};
  bool good = true;
  for (uint64_t order = 0; order < 4; order++) {
    quantkv_simt_set_order(order);
    const int status = QKV_LAUNCH((trap), kOneBlock, 64, 1024, nullptr, which, global);
    const std::string message = quantkv_simt_last_fault();
    good &= status == simt::status_of(fault) && message.find(words) != std::string::npos && message.find("trap") != std::string::npos;
    if (!good) {
      printf("status %d, %s\n", status, message.c_str());
      break;
    }
  }
  quantkv_simt_set_order(0);
  return good;
}

QKV_KERNEL void wait_or_not(int wait) {
  allow_next_kernel();
  if (wait) wait_for_previous_kernel();
}

QKV_KERNEL void panels_beside_static_shared(bool panels_first) {
  if (panels_first) {
    QKV_PANELS_SHARED(panels);
    panels[0] = 0;
  }
  QKV_SHARED(unsigned char, bytes, 32);
  bytes[thread_index()] = 0;
  QKV_PANELS_SHARED(panels);
  panels[0] = 0;
}

template <int kBytes> QKV_KERNEL void large_static_shared(unsigned char value) {
  QKV_SHARED(unsigned char, bytes, kBytes);
  bytes[thread_index()] = value;
}

int launch_trap(Grid grid, int threads, size_t shared) {
  return QKV_LAUNCH((trap), grid, threads, shared, nullptr, MISALIGNED_ATOMIC, static_cast<unsigned char *>(nullptr));
}

void test_configurations() {
  const int bad = simt::status_of(simt::Fault::InvalidConfiguration);
  CHECK(launch_trap(kOneBlock, 0, 0) == bad && launch_trap(kOneBlock, 1025, 0) == bad);
  CHECK(launch_trap({1, 65536, 1}, 32, 0) == bad && launch_trap({1, 1, 65536}, 32, 0) == bad);
  CHECK(launch_trap({int64_t(1) << 31, 1, 1}, 32, 0) == bad && launch_trap({-1, 1, 1}, 32, 0) == bad);
  Device device = {};
  CHECK(current_device(device) == QUANTKV_OK && device.multiprocessors == 4 && device.compute_capability == QUANTKV_SIMT_ARCH);
  CHECK(launch_trap(kOneBlock, 32, static_cast<size_t>(device.max_shared_bytes) + 1) == simt::status_of(simt::Fault::InvalidValue));
  CHECK(QKV_LAUNCH((large_static_shared<48 * 1024>), kOneBlock, 32, 0, nullptr, 7) == QUANTKV_OK);
  const int too_much = simt::status_of(simt::Fault::InvalidValue);
  CHECK(QKV_LAUNCH((large_static_shared<48 * 1024 + 1>), kOneBlock, 32, 0, nullptr, 7) == too_much);
  // 48 KB together, unless the launch asks for more.
  CHECK(QKV_LAUNCH((large_static_shared<25 * 1024>), kOneBlock, 32, 23 * 1024, nullptr, 7) == QUANTKV_OK);
  CHECK(QKV_LAUNCH((large_static_shared<25 * 1024>), kOneBlock, 32, 24 * 1024, nullptr, 7) == too_much);
  CHECK(QKV_LAUNCH((large_static_shared<25 * 1024>), kOneBlock, 32, 25 * 1024, nullptr, 7) == QUANTKV_OK);

  setenv("QUANTKV_SIMT_CC", "86", 1);
  CHECK(current_device(device) == QUANTKV_OK && device.compute_capability == 86 && device.max_shared_bytes == 99 * 1024);
  setenv("QUANTKV_SIMT_CC", "70", 1);
  CHECK(launch_trap(kOneBlock, 32, 0) == QUANTKV_NO_KERNEL_FOR_DEVICE);
  setenv("QUANTKV_SIMT_CC", "none", 1);
  CHECK(current_device(device) == QUANTKV_NO_DEVICE && launch_trap(kOneBlock, 32, 0) == QUANTKV_NO_DEVICE);
  unsetenv("QUANTKV_SIMT_CC");
}

} // namespace

void test_orders() {
  const std::vector<int> forward = order_of_threads(0), reversed = order_of_threads(1);
  bool good = true;
  for (size_t i = 0; i < forward.size(); i++) {
    good &= forward[i] == static_cast<int>(i) && reversed[i] == static_cast<int>(forward.size() - 1 - i);
  }
  CHECK(good);
  CHECK(order_of_threads(2) == order_of_threads(2));
  CHECK(order_of_threads(2) != order_of_threads(3) && order_of_threads(2) != forward && order_of_threads(2) != reversed);
  quantkv_simt_set_order(0);
}

void test_faults() {
  CHECK(!shows(NONE));
  CHECK(shows(NO_BARRIER));
  CHECK(shows(NO_WARP_BARRIER));
  CHECK(shows(NO_COPY_WAIT));
  CHECK(shows(WAIT_TOO_LAX));
  CHECK(shows(WAIT_WITHOUT_BARRIER));

  using simt::Fault;
  CHECK(ends_with(SHUFFLE_IN_A_BRANCH, Fault::Deadlock, "in shuffle_xor at faults.cpp"));
  CHECK(ends_with(TWO_BARRIERS, Fault::LaunchFailure, "sync_threads"));
  CHECK(ends_with(TWO_COLLECTIVES, Fault::LaunchFailure, "while other lanes of the warp wait in"));
  CHECK(ends_with(LANES_MISSING, Fault::LaunchFailure, "transpose_8x8"));
  CHECK(ends_with(MISALIGNED_LOAD, Fault::MisalignedAddress, "load_stream"));
  CHECK(ends_with(MISALIGNED_COPY, Fault::MisalignedAddress, "copy_async_16, source"));
  CHECK(ends_with(MISALIGNED_MATRIX_ROW, Fault::MisalignedAddress, "load_matrix_x4"));
  CHECK(ends_with(COPY_TO_GLOBAL, Fault::LaunchFailure, "copy_async_16, destination"));
  CHECK(ends_with(MATRIX_FROM_GLOBAL, Fault::LaunchFailure, "load_matrix_x4_transposed"));
  CHECK(ends_with(LOAD_FROM_SHARED, Fault::LaunchFailure, "load_stream"));
  CHECK(ends_with(MISALIGNED_ATOMIC, Fault::MisalignedAddress, "atomic_or"));
  CHECK(ends_with(TWO_ALIGNMENTS, Fault::LaunchFailure, "aligned to 128 and to 1024"));
  for (const bool panels_first : {false, true}) {
    CHECK(QKV_LAUNCH((panels_beside_static_shared), kOneBlock, 32, 1024, nullptr, panels_first) == simt::status_of(Fault::LaunchFailure));
  }

  CHECK(QKV_LAUNCH_OVERLAPPED((wait_or_not), kOneBlock, 64, 0, nullptr, 1) == QUANTKV_OK);
  CHECK(QKV_LAUNCH_OVERLAPPED((wait_or_not), kOneBlock, 64, 0, nullptr, 0) == simt::status_of(Fault::LaunchFailure));
  CHECK(QKV_LAUNCH((wait_or_not), kOneBlock, 64, 0, nullptr, 0) == QUANTKV_OK);

  test_configurations();
}

} // namespace tests
