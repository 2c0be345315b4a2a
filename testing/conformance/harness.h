// Conformance: what each name of csrc/core means on the device at hand, against references written here from the
// definitions. The same sources run on hardware (nvcc) and over the host twins (QUANTKV_SIMT), so that the twins and the
// instructions are held to one standard.
//
// A test fills arrays, runs one kernel over them and compares every element on the host; sweeps over 2^32 inputs
// compare on the device and count. Every check that ran is a line of the report: cases, failures, the first failure.
#pragma once
#include "core/launch.h"
#include "core/prim.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace conformance {

using namespace quantkv;

// ---- device memory: cudaMalloc, or malloc under the emulator

inline void check(int status, const char *what) {
  if (status == QUANTKV_OK) return;
  std::printf("FATAL %s: status %d\n", what, status);
  std::exit(2);
}

#if defined(QUANTKV_SIMT)
inline void *device_alloc(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
inline void device_free(void *p) { std::free(p); }
inline void device_copy(void *dst, const void *src, size_t bytes) { std::memcpy(dst, src, bytes); }
inline void device_wait() {}
#else
inline void *device_alloc(size_t bytes) {
  void *p = nullptr;
  check(status_of(cudaMalloc(&p, bytes)), "cudaMalloc");
  return p;
}
inline void device_free(void *p) { cudaFree(p); }
inline void device_copy(void *dst, const void *src, size_t bytes) {
  check(status_of(cudaMemcpy(dst, src, bytes, cudaMemcpyDefault)), "cudaMemcpy");
}
inline void device_wait() { check(status_of(cudaDeviceSynchronize()), "a kernel"); }
#endif

// An array on the device. Its bytes are 0xA5 where nothing was uploaded: an element no thread wrote is seen.
template <class T> class Array {
public:
  explicit Array(size_t n) : n_(n), p_(static_cast<T *>(device_alloc(n * sizeof(T)))) {
    std::vector<unsigned char> poison(n * sizeof(T), 0xA5);
    device_copy(p_, poison.data(), poison.size());
  }
  explicit Array(const std::vector<T> &host) : n_(host.size()), p_(static_cast<T *>(device_alloc(n_ * sizeof(T)))) {
    device_copy(p_, host.data(), n_ * sizeof(T));
  }
  Array(const Array &) = delete;
  Array &operator=(const Array &) = delete;
  ~Array() { device_free(p_); }

  T *get() const { return p_; }
  size_t size() const { return n_; }
  std::vector<T> read() const {
    device_wait();
    std::vector<T> host(n_);
    device_copy(host.data(), p_, n_ * sizeof(T));
    return host;
  }

private:
  size_t n_;
  T *p_;
};

// ---- the report

struct Report {
  uint64_t checks = 0, failed = 0;

  // One line: `cases` compared, `failures` of them wrong; `detail` is the first failure, or the worst error.
  void line(const std::string &name, uint64_t cases, uint64_t failures, const std::string &detail = "") {
    checks++;
    if (failures != 0 || cases == 0) failed++;
    std::printf("%-4s %-36s %12llu cases %8llu wrong  %s\n", failures == 0 && cases != 0 ? "ok" : "FAIL", name.c_str(),
                static_cast<unsigned long long>(cases), static_cast<unsigned long long>(failures), detail.c_str());
    std::fflush(stdout);
  }
  void skip(const std::string &name, const char *why) {
    std::printf("skip %-36s %s\n", name.c_str(), why);
  }
};

inline std::string hex(uint64_t x) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}
inline std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", x);
  return text;
}

// ---- inputs

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Values at which conversions and arithmetic go wrong: zeros, subnormals, ends of ranges, infinities, NaNs of both
// signs, and the neighbours of each.
inline std::vector<uint32_t> edge_words() {
  const uint32_t centres[] = {0x00000000, 0x00000001, 0x007fffff, 0x00800000, 0x33000000, 0x33800000, 0x38800000,
                              0x3c800000, 0x3f000000, 0x3f800000, 0x40000000, 0x43e00000, 0x43e80000, 0x43700000,
                              0x43780000, 0x47600000, 0x47700000, 0x477fe000, 0x477ff000, 0x7f7fffff, 0x7f800000,
                              0x7f800001, 0x7fbfffff, 0x7fc00000, 0x7fffffff, 0x7f7f7fff, 0x7f7f8000, 0x3b000000};
  std::vector<uint32_t> words;
  for (uint32_t centre : centres) {
    for (int delta = -1; delta <= 1; delta++) {
      uint32_t magnitude = (centre + static_cast<uint32_t>(delta)) & 0x7fffffffu;
      words.push_back(magnitude);
      words.push_back(magnitude | 0x80000000u);
    }
  }
  return words;
}

// All pairs of edges, then random bit patterns, then random values near one.
inline std::vector<uint32_t> random_words(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint32_t> words = edge_words();
  while (words.size() < n) {
    words.push_back(static_cast<uint32_t>(random()));
    words.push_back(as_bits(static_cast<float>(static_cast<double>(random()) / 2147483648.0 - 1.0)));
  }
  words.resize(n);
  return words;
}

// ---- elementwise kernels: Op is a struct with a static QKV_DEVICE function, so that one kernel serves all.

// out[i] = Op::apply(in[i])
template <class Op, class In, class Out> QKV_KERNEL void map_kernel(const In *in, Out *out, int64_t n) {
  int64_t stride = static_cast<int64_t>(grid_size_x()) * block_threads();
  for (int64_t i = static_cast<int64_t>(block_index_x()) * block_threads() + thread_index(); i < n; i += stride) {
    out[i] = Op::apply(in[i]);
  }
}

template <class Op, class Out, class In> std::vector<Out> map(const std::vector<In> &in) {
  Array<In> input(in);
  Array<Out> output(in.size());
  Grid grid{64, 1, 1};
  check(QKV_LAUNCH((map_kernel<Op, In, Out>), grid, 128, 0, nullptr, input.get(), output.get(),
                   static_cast<int64_t>(in.size())),
        "map");
  return output.read();
}

// What a sweep found.
struct Found {
  uint32_t wrong, first_input, first_got, first_want;
};

// Op::got(x) against Op::want(x) for x = start, start + step, ... of the 2^32 words; Op::same decides.
template <class Op> QKV_KERNEL void sweep_kernel(uint64_t start, uint64_t step, Found *found) {
  uint64_t threads = static_cast<uint64_t>(grid_size_x()) * static_cast<uint64_t>(block_threads());
  uint64_t id = static_cast<uint64_t>(block_index_x()) * static_cast<uint64_t>(block_threads()) +
                static_cast<uint64_t>(thread_index());
  for (uint64_t x = start + id * step; x < (1ull << 32); x += threads * step) {
    uint32_t word = static_cast<uint32_t>(x);
    uint32_t got = Op::got(word), want = Op::want(word);
    if (!Op::same(got, want) && atomic_add(&found->wrong, 1u) == 0) {
      found->first_input = word;
      found->first_got = got;
      found->first_want = want;
    }
  }
}

// `step` 1 is every f32. The emulator takes a large step.
template <class Op> void sweep(Report &report, const std::string &name, uint64_t step) {
  Array<Found> found(std::vector<Found>(1, Found{0, 0, 0, 0}));
#if defined(QUANTKV_SIMT)
  Grid grid{4, 1, 1};
#else
  Grid grid{2048, 1, 1};
#endif
  check(QKV_LAUNCH((sweep_kernel<Op>), grid, 256, 0, nullptr, uint64_t{0}, step, found.get()), name.c_str());
  Found f = found.read()[0];
  std::string detail;
  if (f.wrong != 0) detail = hex(f.first_input) + " gives " + hex(f.first_got) + ", not " + hex(f.first_want);
  report.line(name, ((1ull << 32) + step - 1) / step, f.wrong, detail);
}

// Which optional instructions the device code was compiled with (the host pass cannot know).
struct Features {
  int32_t fp8, tensor_cores;
};
Features features();

// The tests, by file.
void test_arithmetic(Report &report, uint64_t step);
void test_conversions(Report &report, uint64_t step);
void test_fp8(Report &report, uint64_t step);
void test_matrix(Report &report, uint64_t step);
void test_memory(Report &report, uint64_t step);
void test_hopper(Report &report, uint64_t step);

} // namespace conformance
