// Streaming loads and stores, asynchronous copies with their groups, and the order of overlapped kernels.
#include "harness.h"

namespace conformance {
namespace {

template <int N> QKV_KERNEL void stream_kernel(const uint32_t *in, uint32_t *out, int n) {
  int i = block_index_x() * block_threads() + thread_index();
  if (i >= n / N) return;
  Words<N> words = load_stream(reinterpret_cast<const Words<N> *>(in) + i);
  if constexpr (N == 4) {
    store_stream(reinterpret_cast<Words<N> *>(out) + i, words);
  } else {
    for (int w = 0; w < N; w++) out[i * N + w] = words.w[w];
  }
}

template <int N> void streams(Report &report, const char *name) {
  constexpr int kWords = 1 << 14;
  std::vector<uint32_t> in = random_words(kWords, 30);
  Array<uint32_t> input(in), output(kWords);
  Grid grid{kWords / 128, 1, 1};
  check(QKV_LAUNCH((stream_kernel<N>), grid, 128, 0, nullptr, input.get(), output.get(), kWords), name);
  std::vector<uint32_t> got = output.read();
  uint64_t wrong = 0;
  for (int i = 0; i < kWords; i++) wrong += got[i] != in[i];
  report.line(name, kWords, wrong);
}

// A ring of kStages: groups are committed ahead, waited for one by one; odd tiles of every third stage are not valid
// and point past the end of the buffer, where nothing may be read.
constexpr int kStages = 4, kThreads = 64;

// T: 16 bytes, of which some are zeros; or 4.
template <class T> QKV_KERNEL void copy_async_kernel(const T *in, int tiles, T *out) {
  QKV_DYNAMIC_SHARED(bytes);
  T *ring = reinterpret_cast<T *>(bytes); // [kStages][kThreads]
  int thread = thread_index();
  auto start = [&](int tile) {
    if (tile < tiles) {
      T *to = &ring[(tile % kStages) * kThreads + thread];
      if constexpr (sizeof(T) == 16) {
        bool valid = tile % 3 != 2 || thread % 2 == 0;
        const T *source = valid ? in + tile * kThreads + thread : in + tiles * kThreads + thread;
        copy_async_16(to, source, valid);
      } else {
        copy_async_4(to, in + tile * kThreads + thread);
      }
    }
    copy_async_commit(); // empty past the end: the count of groups stays in step
  };
  for (int tile = 0; tile < kStages - 1; tile++) start(tile);
  for (int tile = 0; tile < tiles; tile++) {
    copy_async_wait<kStages - 2>();
    sync_threads();
    // The neighbour's data: needs the barrier, not only the wait.
    out[tile * kThreads + thread] = ring[(tile % kStages) * kThreads + (thread ^ 1)];
    sync_threads();
    start(tile + kStages - 1);
  }
  copy_async_wait<0>();
}

template <class T> void copies(Report &report, const char *name) {
  constexpr int kTiles = 37, kWords = sizeof(T) / 4;
  std::vector<uint32_t> words = random_words(kTiles * kThreads * kWords, 31);
  std::vector<T> in(kTiles * kThreads);
  std::memcpy(in.data(), words.data(), words.size() * 4);
  Array<T> input(in), output(in.size());
  Grid grid{1, 1, 1};
  check(QKV_LAUNCH((copy_async_kernel<T>), grid, kThreads, kStages * kThreads * sizeof(T), nullptr, input.get(), kTiles, output.get()),
        "copy_async");
  std::vector<T> got = output.read();
  uint64_t wrong = 0;
  for (int tile = 0; tile < kTiles; tile++) {
    for (int thread = 0; thread < kThreads; thread++) {
      int from = thread ^ 1;
      T want = {};
      if (kWords == 1 || tile % 3 != 2 || from % 2 == 0) want = in[tile * kThreads + from];
      wrong += std::memcmp(&want, &got[tile * kThreads + thread], sizeof want) != 0;
    }
  }
  report.line(name, got.size(), wrong);
}

// A word as another kernel left it, with its line of L2 asked for before; and the last word of the buffer, beyond which
// nothing is.
QKV_KERNEL void unsettled_kernel(const int32_t *in, int32_t *out, int n) {
  const int i = block_index_x() * block_threads() + thread_index();
  if (i >= n) return;
  prefetch_l2(in + i);
  out[i] = load_unsettled(in + i);
}

void unsettled(Report &report) {
  constexpr int kWords = (1 << 14) + 3;
  const std::vector<uint32_t> words = random_words(kWords, 32);
  const std::vector<int32_t> in(words.begin(), words.end());
  Array<int32_t> input(in), output(kWords);
  check(QKV_LAUNCH((unsettled_kernel), (Grid{kWords / 128 + 1, 1, 1}), 128, 0, nullptr, input.get(), output.get(), kWords),
        "load_unsettled");
  const std::vector<int32_t> got = output.read();
  uint64_t wrong = 0;
  for (int i = 0; i < kWords; i++) wrong += got[i] != in[i];
  report.line("prefetch_l2, load_unsettled", kWords, wrong);
}

// Every block but the first waits for the words of the block before it, adds its own to them, hands them on, and empties the
// place they were in for the next round.
constexpr int kHandingThreads = 128;
constexpr uint32_t kEmpty = 0xffffffffu;

QKV_KERNEL void handing_kernel(uint32_t *places, uint32_t *wrong, uint32_t round) {
  wait_for_previous_kernel();
  const int block = block_index_x(), thread = thread_index();
  Words<4> words = {{round, 1, 2, 3}};
  Words<2> pair = {{round, 7}};
  auto *fours = reinterpret_cast<Words<4> *>(places) + thread;
  auto *twos = reinterpret_cast<Words<2> *>(places + 4 * kHandingThreads * static_cast<int64_t>(grid_size_x())) + thread;
  if (block > 0) {
    bool missing = true;
    for (int look = 0; look < kMostLooks && missing; look++) {
      words = load_relaxed(fours + (block - 1) * kHandingThreads);
      pair = load_relaxed(twos + (block - 1) * kHandingThreads);
      missing = pair.w[0] == kEmpty || pair.w[1] == kEmpty;
      for (int i = 0; i < 4; i++) missing = missing || words.w[i] == kEmpty;
    }
    store_relaxed(fours + (block - 1) * kHandingThreads, Words<4>{{kEmpty, kEmpty, kEmpty, kEmpty}});
    store_relaxed(twos + (block - 1) * kHandingThreads, Words<2>{{kEmpty, kEmpty}});
  }
  const uint32_t from = static_cast<uint32_t>(block), add = static_cast<uint32_t>(thread);
  bool right = pair.w[0] == round + from * add && pair.w[1] == 7 + from;
  for (uint32_t i = 0; i < 4; i++) {
    right = right && words.w[i] == (i == 0 ? round : i) + from * add;
    words.w[i] += add;
  }
  pair.w[0] += add;
  pair.w[1]++;
  if (block + 1 < grid_size_x()) {
    store_relaxed(fours + block * kHandingThreads, words);
    store_relaxed(twos + block * kHandingThreads, pair);
  }
  if (!right) atomic_add(wrong, 1);
}

void handing(Report &report) {
  constexpr int kBlocks = 500, kRounds = 100;
  Array<uint32_t> places(std::vector<uint32_t>(6 * kHandingThreads * kBlocks, kEmpty)), wrong(std::vector<uint32_t>(1, 0));
  for (uint32_t round = 0; round < kRounds; round++) {
    check(QKV_LAUNCH_IN_ORDER((handing_kernel), (Grid{kBlocks, 1, 1}), kHandingThreads, 0, nullptr, places.get(), wrong.get(), round),
          "words handed from block to block");
  }
  report.line("load_relaxed, store_relaxed", kBlocks * kRounds, wrong.read()[0]);
}

// Each kernel adds one to every word the one before it left; all let the next start early, so a wait that does not
// wait shows as a lost addition.
QKV_KERNEL void add_one_kernel(const uint32_t *in, uint32_t *out, int n) {
  allow_next_kernel();
  wait_for_previous_kernel();
  int i = block_index_x() * block_threads() + thread_index();
  if (i < n) out[i] = in[i] + 1;
}

void overlap(Report &report) {
  constexpr int kWords = 1 << 16, kKernels = 64;
  Array<uint32_t> a(std::vector<uint32_t>(kWords, 0)), b(kWords);
  Grid grid{kWords / 256, 1, 1};
  for (int i = 0; i < kKernels; i++) {
    check(QKV_LAUNCH_OVERLAPPED((add_one_kernel), grid, 256, 0, nullptr, i % 2 ? b.get() : a.get(),
                                i % 2 ? a.get() : b.get(), kWords),
          "overlapped launch");
  }
  std::vector<uint32_t> got = a.read();
  uint64_t wrong = 0;
  for (uint32_t x : got) wrong += x != kKernels;
  report.line("overlapped kernels in order", kWords, wrong);
}

} // namespace

void test_memory(Report &report, uint64_t) {
  streams<1>(report, "load_stream, 4 bytes");
  streams<2>(report, "load_stream, 8 bytes");
  streams<4>(report, "load_stream, store_stream, 16 bytes");
  copies<Words<4>>(report, "copy_async_16, commit, wait");
  copies<uint32_t>(report, "copy_async_4, commit, wait");
  unsettled(report);
  handing(report);
  overlap(report);
}

} // namespace conformance
