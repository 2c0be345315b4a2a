// Every function of platform.h, with answers that hold in any order of blocks, warps and lanes.
#include "check.h"

#include <vector>

namespace tests {
namespace {

// out: [blocks][threads], the block's indices packed.
QKV_KERNEL void QKV_LAUNCH_BOUNDS(64, 1) indices(uint32_t *out) {
  const int block = (block_index_z() * grid_size_y() + block_index_y()) * grid_size_x() + block_index_x();
  const int packed = (block_index_x() << 16 | block_index_y() << 8 | block_index_z()) + (lane_index() << 24) + (warp_index() << 30);
  out[block * block_threads() + thread_index()] = static_cast<uint32_t>(packed);
}

void test_indices() {
  const Grid grid = {3, 4, 2};
  std::vector<uint32_t> out(3 * 4 * 2 * 64);
  CHECK(QKV_LAUNCH((indices), grid, 64, 0, nullptr, out.data()) == QUANTKV_OK);
  bool good = true;
  for (int z = 0, i = 0; z < 2; z++) {
    for (int y = 0; y < 4; y++) {
      for (int x = 0; x < 3; x++) {
        for (int t = 0; t < 64; t++, i++) good &= out[i] == static_cast<uint32_t>((x << 16 | y << 8 | z) + (t % 32 << 24) + (t / 32 << 30));
      }
    }
  }
  CHECK(good);
  const Grid nothing = {3, 0, 1};
  CHECK(QKV_LAUNCH((indices), nothing, 64, 0, nullptr, static_cast<uint32_t *>(nullptr)) == QUANTKV_OK);
}

// Reverses a block's values through static and dynamic shared memory. Several blocks: poison and contents are theirs.
QKV_KERNEL void reverse(const float *in, float *out, int *not_poisoned) {
  QKV_SHARED(float, tile, 96);
  QKV_DYNAMIC_SHARED(bytes);
  float *other = reinterpret_cast<float *>(bytes);
  const int t = thread_index(), n = block_threads(), at = block_index_x() * n;
  if (!is_poison(tile[t]) || !is_poison(other[t])) *not_poisoned += 1;
  sync_threads();
  tile[t] = in[at + t];
  sync_threads();
  other[t] = tile[n - 1 - t];
  sync_threads();
  out[at + t] = other[t ^ 1] + 0.5f * other[t];
}

void test_shared() {
  const Grid grid = {5, 1, 1};
  std::vector<float> in(5 * 96), out(5 * 96);
  for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i);
  int not_poisoned = 0;
  CHECK(QKV_LAUNCH((reverse), grid, 96, 96 * 4, nullptr, in.data(), out.data(), &not_poisoned) == QUANTKV_OK);
  CHECK(not_poisoned == 0);
  bool good = true;
  for (int b = 0; b < 5; b++) {
    for (int t = 0; t < 96; t++) {
      const float *block = &in[static_cast<size_t>(b) * 96];
      good &= out[static_cast<size_t>(b) * 96 + t] == block[95 - (t ^ 1)] + 0.5f * block[95 - t];
    }
  }
  CHECK(good);
}

QKV_KERNEL void address_of_shared(uintptr_t *plain, uintptr_t *panels) {
  if (plain != nullptr) {
    QKV_DYNAMIC_SHARED(bytes);
    *plain = reinterpret_cast<uintptr_t>(bytes);
  } else {
    QKV_PANELS_SHARED(bytes);
    *panels = reinterpret_cast<uintptr_t>(bytes);
  }
}

// To what the kernel declares, and no more.
void test_shared_alignment() {
  uintptr_t plain = 0, panels = 0, *const none = nullptr;
  CHECK(QKV_LAUNCH((address_of_shared), kOneBlock, 32, 4096, nullptr, &plain, none) == QUANTKV_OK && plain % 256 == 128);
  CHECK(QKV_LAUNCH((address_of_shared), kOneBlock, 32, 4096, nullptr, none, &panels) == QUANTKV_OK && panels % 2048 == 1024);
  CHECK(QKV_LAUNCH((address_of_shared), kOneBlock, 32, 0, nullptr, &plain, none) == QUANTKV_OK && plain == 0);
}

// out: [7][threads]
QKV_KERNEL void collectives(const int *in, int *out) {
  const int t = thread_index(), n = block_threads();
  const int x = in[t];
  out[0 * n + t] = shuffle_xor(x, 5);
  out[1 * n + t] = shuffle(x, x & 31);
  out[2 * n + t] = shuffle_up(x, 3);
  out[3 * n + t] = static_cast<int>(ballot(x % 3 == 0));
  out[4 * n + t] = any(x == in[0]);
  float sum = static_cast<float>(x);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  out[5 * n + t] = static_cast<int>(sum);
  // One warp meets more often than the other.
  int turns = 0;
  for (int i = 0; i <= warp_index(); i++, turns++) sync_warp();
  out[6 * n + t] = turns;
}

void test_collectives() {
  constexpr int n = 64;
  std::vector<int> in(n), out(7 * n);
  for (int t = 0; t < n; t++) in[t] = (t * 37 + 11) % 101;
  CHECK(QKV_LAUNCH((collectives), kOneBlock, n, 0, nullptr, in.data(), out.data()) == QUANTKV_OK);
  bool good = true;
  for (int t = 0; t < n; t++) {
    const int *warp = &in[t / 32 * 32];
    const int lane = t % 32;
    uint32_t votes = 0;
    int sum = 0;
    bool seen = false;
    for (int l = 0; l < 32; l++) {
      votes |= static_cast<uint32_t>(warp[l] % 3 == 0) << l;
      sum += warp[l];
      seen |= warp[l] == in[0];
    }
    good &= out[0 * n + t] == warp[lane ^ 5] && out[1 * n + t] == warp[in[t] % 32];
    good &= out[2 * n + t] == (lane < 3 ? in[t] : warp[lane - 3]);
    good &= out[3 * n + t] == static_cast<int>(votes) && out[4 * n + t] == seen;
    good &= out[5 * n + t] == sum && out[6 * n + t] == t / 32 + 1;
  }
  CHECK(good);
}

// Threads past `n` return early; barriers and collectives are for those who stay.
QKV_KERNEL void early_return(int n, uint32_t *votes, float *from_lane_31, uint32_t *arrived) {
  if (thread_index() >= n) return;
  atomic_add(arrived, 1);
  sync_threads();
  votes[thread_index()] = ballot(true);
  from_lane_31[thread_index()] = shuffle(1.0f, 31);
  if (*arrived != static_cast<uint32_t>(n)) votes[thread_index()] = 0;
}

void test_early_return() {
  uint32_t votes[64] = {}, arrived = 0;
  float from_lane_31[64] = {};
  CHECK(QKV_LAUNCH((early_return), kOneBlock, 64, 0, nullptr, 40, votes, from_lane_31, &arrived) == QUANTKV_OK);
  CHECK(votes[0] == 0xffffffffu && votes[39] == 0xffu);
  CHECK(from_lane_31[31] == 1.0f && is_poison(from_lane_31[39]));
}

QKV_KERNEL void atomics(uint32_t *words, float *maximum, uint32_t *tickets) {
  const uint32_t t = static_cast<uint32_t>(thread_index());
  atomic_or(&words[0], 1u << t % 20);
  tickets[atomic_add(&words[1], 1)] += 1;
  atomic_max_nonnegative(maximum, static_cast<float>(t * 7 % 128) / 4.0f);
  set_fault(&words[2], QUANTKV_FAULT_SLOT << t % 3);
  set_fault(nullptr, 1);
}

void test_atomics() {
  uint32_t words[3] = {}, tickets[256] = {};
  float maximum = 3.5f;
  const Grid grid = {2, 1, 1};
  CHECK(QKV_LAUNCH((atomics), grid, 128, 0, nullptr, words, &maximum, tickets) == QUANTKV_OK);
  CHECK(words[0] == (1u << 20) - 1 && words[1] == 256 && words[2] == 7 && maximum == 127.0f / 4);
  bool once = true;
  for (uint32_t ticket : tickets) once &= ticket == 1;
  CHECK(once);
}

struct Large {
  int64_t values[100];
};

QKV_KERNEL void sum_of(Large large, float scale, int64_t *out) {
  if (thread_index() > 0) return;
  *out = 0;
  for (int64_t value : large.values) *out += value;
  *out = static_cast<int64_t>(static_cast<float>(*out) * scale);
}

void test_parameters() {
  Large large;
  for (int i = 0; i < 100; i++) large.values[i] = i;
  int64_t out = 0;
  CHECK(QKV_LAUNCH((sum_of), kOneBlock, 32, 0, nullptr, large, 2, &out) == QUANTKV_OK); // 2 becomes a float
  CHECK(out == 9900);
}

} // namespace

void test_platform() {
  test_indices();
  test_shared();
  test_shared_alignment();
  test_collectives();
  test_early_return();
  test_atomics();
  test_parameters();
}

} // namespace tests
