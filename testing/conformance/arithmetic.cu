// divide, multiply and fused_multiply_add to the last bit; exp2_approx, reciprocal_approx and log2_approx within what PTX promises;
// byte_permute; the collectives and atomics of platform.h.
#include "harness.h"

#include <cmath>

namespace conformance {
namespace {

struct Operands {
  float x, y, z;
};
struct Divide {
  static QKV_DEVICE float apply(Operands o) { return divide(o.x, o.y); }
};
struct Multiply {
  static QKV_DEVICE float apply(Operands o) { return multiply(o.x, o.y); }
};
// What a contracted multiply-add would get wrong: the product alone is rounded before the sum.
struct MultiplyThenAdd {
  static QKV_DEVICE float apply(Operands o) { return multiply(o.x, o.y) + o.z; }
};
struct Fused {
  static QKV_DEVICE float apply(Operands o) { return fused_multiply_add(o.x, o.y, o.z); }
};
struct Exp2 {
  static QKV_DEVICE float apply(float x) { return exp2_approx(x); }
};
struct Reciprocal {
  static QKV_DEVICE float apply(float x) { return reciprocal_approx(x); }
};
struct Log2 {
  static QKV_DEVICE float apply(float x) { return log2_approx(x); }
};

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || as_bits(a) == as_bits(b); }

// The emulator interprets a few hundred thousand operations a second; a device does not mind.
#if defined(QUANTKV_SIMT)
constexpr size_t kCases = 1 << 15;
#else
constexpr size_t kCases = 1 << 23;
#endif

std::vector<Operands> operands() {
  std::vector<uint32_t> edges = edge_words(), x = random_words(kCases, 1), y = random_words(kCases, 2),
                        z = random_words(kCases, 3);
  std::vector<Operands> all;
  for (uint32_t a : edges) {
    for (uint32_t b : edges) all.push_back({as_float(a), as_float(b), as_float(edges[(a ^ b) % edges.size()])});
  }
  for (size_t i = 0; i < kCases; i++) all.push_back({as_float(x[i]), as_float(y[i]), as_float(z[i])});
  return all;
}

template <class Op, class Want>
void exact(Report &report, const char *name, const std::vector<Operands> &in, Want want) {
  std::vector<float> got = map<Op, float>(in);
  uint64_t wrong = 0;
  std::string first;
  for (size_t i = 0; i < in.size(); i++) {
    volatile float expected = want(in[i].x, in[i].y, in[i].z);
    if (same(got[i], expected)) continue;
    if (wrong++ == 0) {
      first = hex(as_bits(in[i].x)) + ", " + hex(as_bits(in[i].y)) + ", " + hex(as_bits(in[i].z)) + " give " +
              hex(as_bits(got[i])) + ", not " + hex(as_bits(expected));
    }
  }
  report.line(name, in.size(), wrong, first);
}

// One ulp of the f32 nearest to y.
double ulp(double y) {
  int exponent;
  std::frexp(y, &exponent);
  return std::ldexp(1.0, std::max(exponent, -125) - 24);
}

void test_exp2(Report &report) {
  std::vector<float> in;
  for (uint32_t word : random_words(kCases, 4)) in.push_back(as_float(word));
  std::mt19937 random(5);
  for (size_t i = 0; i < kCases; i++) in.push_back(static_cast<float>(random() / 4294967296.0 * 300.0 - 160.0));
  std::vector<float> got = map<Exp2, float>(in);
  uint64_t wrong = 0;
  double worst = 0;
  std::string first;
  for (size_t i = 0; i < in.size(); i++) {
    float x = in[i];
    double want = std::exp2(static_cast<double>(x));
    bool good;
    if (std::isnan(x)) {
      good = std::isnan(got[i]);
    } else if (want >= std::ldexp(1.0, 128) * (1 - std::ldexp(1.0, -23))) {
      good = std::isinf(got[i]) || got[i] >= 3.402823e38f;
    } else if (want < std::ldexp(1.0, -126) * (1 - std::ldexp(1.0, -22))) {
      good = got[i] == 0.0f; // flushed
    } else if (want <= std::ldexp(1.0, -126) * (1 + std::ldexp(1.0, -22))) {
      good = got[i] == 0.0f || std::abs(got[i] - want) <= 2.5 * ulp(want); // beside the edge of flushing
    } else {
      double error = std::abs(got[i] - want) / ulp(want);
      worst = std::max(worst, error);
      good = error <= 2.5; // 2 ulp of the rounded result, half of one for rounding
    }
    if (!good && wrong++ == 0) first = number(x) + " gives " + number(got[i]);
  }
  report.line("exp2_approx", in.size(), wrong, wrong ? first : "worst " + number(worst) + " ulp");
}

void test_reciprocal(Report &report) {
  std::vector<float> in;
  for (uint32_t word : edge_words()) in.push_back(as_float(word));
  for (uint32_t word : random_words(kCases, 8)) in.push_back(as_float(word));
  std::vector<float> got = map<Reciprocal, float>(in);
  uint64_t wrong = 0;
  double worst = 0;
  std::string first;
  const double smallest = std::ldexp(1.0, -126);
  for (size_t i = 0; i < in.size(); i++) {
    const double x = in[i], want = 1.0 / x;
    bool good;
    if (std::isnan(x)) {
      good = std::isnan(got[i]);
    } else if (std::abs(x) < smallest) {
      good = std::isinf(got[i]) && std::signbit(got[i]) == std::signbit(x);
    } else if (std::abs(want) < smallest) {
      good = got[i] == 0.0f || std::abs(want) > smallest * (1 - std::ldexp(1.0, -22)); // flushed; or beside the edge
    } else {
      const double error = std::abs(got[i] - want) / ulp(want);
      worst = std::max(worst, error);
      good = error <= 1.5; // 1 ulp of the rounded result, half of one for rounding
    }
    if (!good && wrong++ == 0) first = number(in[i]) + " gives " + number(got[i]);
  }
  report.line("reciprocal_approx", in.size(), wrong, wrong ? first : "worst " + number(worst) + " ulp");
}

void test_log2(Report &report) {
  std::vector<float> in;
  for (uint32_t word : random_words(kCases, 6)) in.push_back(as_float(word & 0x7fffffffu));
  std::mt19937 random(7);
  for (size_t i = 0; i < kCases; i++) in.push_back(static_cast<float>(random() / 4294967296.0 * 2.0));
  std::vector<float> got = map<Log2, float>(in);
  uint64_t wrong = 0;
  double worst_near = 0, worst_far = 0;
  std::string first;
  for (size_t i = 0; i < in.size(); i++) {
    float x = in[i];
    double want = std::log2(static_cast<double>(x)), error = std::abs(got[i] - want);
    bool good;
    if (std::isnan(x)) {
      good = std::isnan(got[i]);
    } else if (x == 0.0f || std::isinf(x)) {
      good = got[i] == static_cast<float>(want);
    } else if (x > 0.5f && x < 2.0f) {
      worst_near = std::max(worst_near, error);
      good = error <= std::ldexp(1.0, -22) * 1.01; // absolute: the result passes through zero
    } else {
      worst_far = std::max(worst_far, error / std::abs(want));
      good = error <= std::ldexp(1.0, -22) * 1.01 * std::abs(want);
    }
    if (!good && wrong++ == 0) first = number(x) + " gives " + number(got[i]) + ", not " + number(want);
  }
  report.line("log2_approx", in.size(), wrong,
              wrong ? first : "worst " + number(worst_near) + " in (0.5, 2), relative " + number(worst_far) + " outside");
}

struct Permute {
  uint32_t a, b, selector;
};
struct BytePermute {
  static QKV_DEVICE uint32_t apply(Permute p) { return byte_permute(p.a, p.b, p.selector); }
};

void test_byte_permute(Report &report) {
  std::mt19937 random(8);
  std::vector<Permute> in;
  for (uint32_t i = 0; i < 4096; i++) { // every selector of nibbles 0..7
    uint32_t selector = (i & 7) | (i >> 3 & 7) << 4 | (i >> 6 & 7) << 8 | (i >> 9 & 7) << 12;
    in.push_back({static_cast<uint32_t>(random()), static_cast<uint32_t>(random()), selector});
  }
  std::vector<uint32_t> got = map<BytePermute, uint32_t>(in);
  uint64_t wrong = 0;
  for (size_t i = 0; i < in.size(); i++) {
    uint64_t both = static_cast<uint64_t>(in[i].b) << 32 | in[i].a;
    uint32_t want = 0;
    for (int byte = 0; byte < 4; byte++) {
      uint32_t from = in[i].selector >> (4 * byte) & 7;
      want |= static_cast<uint32_t>(both >> (8 * from) & 0xff) << (8 * byte);
    }
    wrong += got[i] != want;
  }
  report.line("byte_permute", in.size(), wrong);
}

// ---- the warp and the block

struct Collected { // by one thread
  uint32_t xor_5, from_7, up_3, ballot_odd, any_31, any_none;
};

QKV_KERNEL void collectives_kernel(const uint32_t *in, Collected *out, uint32_t *sum, uint32_t *mask, float *maximum) {
  int lane = lane_index(), id = block_index_x() * block_threads() + thread_index();
  uint32_t x = in[id];
  Collected c;
  c.xor_5 = shuffle_xor(x, 5);
  c.from_7 = shuffle(x, 7);
  c.up_3 = shuffle_up(x, 3);
  c.ballot_odd = quantkv::ballot((x & 1) != 0);
  c.any_31 = quantkv::any(lane == 31);
  c.any_none = quantkv::any(false);
  out[id] = c;
  atomic_add(sum, x & 0xff);
  atomic_or(mask, 1u << (x & 31));
  atomic_max_nonnegative(maximum, static_cast<float>(x & 0xffffff));
}

void test_collectives(Report &report) {
  constexpr int kBlocks = 8, kThreads = 96;
  std::vector<uint32_t> in = random_words(kBlocks * kThreads, 9);
  Array<uint32_t> input(in), sum(std::vector<uint32_t>(1, 0)), mask(std::vector<uint32_t>(1, 0));
  Array<float> maximum(std::vector<float>(1, 0.0f));
  Array<Collected> output(in.size());
  Grid grid{kBlocks, 1, 1};
  check(QKV_LAUNCH((collectives_kernel), grid, kThreads, 0, nullptr, input.get(), output.get(), sum.get(), mask.get(),
                   maximum.get()),
        "collectives");
  std::vector<Collected> got = output.read();
  uint64_t wrong = 0;
  uint32_t want_sum = 0, want_mask = 0, want_max = 0;
  for (size_t i = 0; i < in.size(); i++) {
    size_t warp = i / 32 * 32, lane = i % 32;
    uint32_t odd = 0;
    for (size_t l = 0; l < 32; l++) odd |= (in[warp + l] & 1) << l;
    wrong += got[i].xor_5 != in[warp + (lane ^ 5)] || got[i].from_7 != in[warp + 7] ||
             got[i].up_3 != in[lane < 3 ? i : i - 3] || got[i].ballot_odd != odd || got[i].any_31 != 1 ||
             got[i].any_none != 0;
    want_sum += in[i] & 0xff;
    want_mask |= 1u << (in[i] & 31);
    want_max = std::max(want_max, in[i] & 0xffffff);
  }
  report.line("shuffles, ballot, any", in.size(), wrong);
  wrong = (sum.read()[0] != want_sum) + (mask.read()[0] != want_mask) +
          (maximum.read()[0] != static_cast<float>(want_max));
  report.line("atomics", 3, wrong);
}

} // namespace

void test_arithmetic(Report &report, uint64_t) {
  std::vector<Operands> in = operands();
  exact<Divide>(report, "divide", in, [](float x, float y, float) { return x / y; });
  exact<Multiply>(report, "multiply", in, [](float x, float y, float) { return x * y; });
  exact<MultiplyThenAdd>(report, "multiply is not fused", in, [](float x, float y, float z) {
    volatile float product = x * y;
    return product + z;
  });
  exact<Fused>(report, "fused_multiply_add", in, [](float x, float y, float z) { return std::fmaf(x, y, z); });
  test_exp2(report);
  test_reciprocal(report);
  test_log2(report);
  test_byte_permute(report);
  test_collectives(report);
}

} // namespace conformance
