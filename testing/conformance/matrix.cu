// Tensor-core products against f64, and the moves of fragments, by the layouts prim.h draws.
//
// Each warp multiplies one A [16, 16] by one B [16, 8] and adds C [16, 8]; rows of A, columns of B are loaded into
// fragments by the picture in prim.h, element by element, so that a wrong picture gives a wrong product.
#include "harness.h"
#include "reference.h"

#include <cmath>

namespace conformance {
namespace {

constexpr int kA = 16 * 16, kB = 16 * 8, kC = 16 * 8;

template <bool Bf16>
QKV_KERNEL void product_kernel(const uint16_t *a, const uint16_t *b, const float *c, float *out) {
#if QKV_HAS_TENSOR_CORES
  int tile = block_index_x(), lane = thread_index(), g = lane / 4, t = lane % 4;
  a += tile * kA;
  b += tile * kB;
  c += tile * kC;
  out += tile * kC;
  auto pair_a = [&](int row, int k) { return a[row * 16 + k] | static_cast<uint32_t>(a[row * 16 + k + 1]) << 16; };
  auto pair_b = [&](int k, int n) { return b[k * 8 + n] | static_cast<uint32_t>(b[(k + 1) * 8 + n]) << 16; };
  uint32_t fragment_a[4] = {pair_a(g, 2 * t), pair_a(g + 8, 2 * t), pair_a(g, 2 * t + 8), pair_a(g + 8, 2 * t + 8)};
  float sums[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  if constexpr (Bf16) {
    mma_16816_bf16(sums, fragment_a, pair_b(2 * t, g), pair_b(2 * t + 8, g));
  } else {
    mma_16816_f16(sums, fragment_a, pair_b(2 * t, g), pair_b(2 * t + 8, g));
  }
  out[g * 8 + 2 * t] = sums[0];
  out[g * 8 + 2 * t + 1] = sums[1];
  out[(g + 8) * 8 + 2 * t] = sums[2];
  out[(g + 8) * 8 + 2 * t + 1] = sums[3];
#else
  (void)a, (void)b, (void)c, (void)out;
#endif
}

#if defined(QUANTKV_SIMT)
constexpr int kTiles = 64;
#else
constexpr int kTiles = 4096;
#endif

// `integers`: small ones, whose sums are exact in any order; otherwise random values over many binades.
template <bool Bf16> void products(Report &report, const char *name, bool integers) {
  SmallFloat format = Bf16 ? small_bf16() : small_f16();
  std::mt19937 random(Bf16 ? 21 : 20);
  auto value = [&]() -> float {
    if (integers) return static_cast<float>(static_cast<int>(random() % 17) - 8);
    double x = static_cast<double>(random()) / 2147483648.0 - 1.0;
    return static_cast<float>(std::ldexp(x, static_cast<int>(random() % 12) - 6));
  };
  std::vector<uint16_t> a(kTiles * kA), b(kTiles * kB);
  std::vector<float> c(kTiles * kC);
  for (auto &x : a) x = static_cast<uint16_t>(round_to(format, as_bits(value())));
  for (auto &x : b) x = static_cast<uint16_t>(round_to(format, as_bits(value())));
  for (auto &x : c) x = value();
  Array<uint16_t> da(a), db(b);
  Array<float> dc(c), out(c.size());
  Grid grid{kTiles, 1, 1};
  check(QKV_LAUNCH((product_kernel<Bf16>), grid, 32, 0, nullptr, da.get(), db.get(), dc.get(), out.get()), name);
  std::vector<float> got = out.read();
  uint64_t wrong = 0;
  double worst = 0;
  for (int tile = 0; tile < kTiles; tile++) {
    for (int m = 0; m < 16; m++) {
      for (int n = 0; n < 8; n++) {
        size_t at = static_cast<size_t>(tile) * kC + m * 8 + n;
        double want = c[at], magnitude = std::abs(want);
        for (int k = 0; k < 16; k++) {
          double product = value_of(format, a[tile * kA + m * 16 + k]) * value_of(format, b[tile * kB + k * 8 + n]);
          want += product;
          magnitude += std::abs(product);
        }
        double error = std::abs(got[at] - want);
        // 16 additions, each off by at most an ulp (the unit cuts, it does not round) of what has been summed.
        bool good = integers ? error == 0 : error <= 17 * std::ldexp(magnitude, -23);
        worst = std::max(worst, error / std::max(magnitude, 1e-30));
        wrong += !good || std::isnan(got[at]);
      }
    }
  }
  report.line(name, got.size(), wrong, "worst " + number(worst * 16777216.0) + " of 2^-24 sum|ab|");
}

QKV_KERNEL void transpose_kernel(const uint32_t *in, uint32_t *out) { out[thread_index()] = transpose_8x8(in[thread_index()]); }

// in: four matrices [8][8] of 16-bit elements, rows 16 bytes each; matrix i at i*64 elements.
QKV_KERNEL void load_matrix_kernel(const uint16_t *in, uint32_t *out, bool transposed) {
  QKV_SHARED(Words<4>, tile, 32);
  int lane = thread_index();
  uint16_t *elements = reinterpret_cast<uint16_t *>(tile);
  for (int i = 0; i < 8; i++) elements[lane * 8 + i] = in[lane * 8 + i];
  sync_threads();
  uint32_t r[4];
  if (transposed) {
    load_matrix_x4_transposed(r, &tile[lane]);
  } else {
    load_matrix_x4(r, &tile[lane]);
  }
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
}

void test_moves(Report &report) {
  std::mt19937 random(22);
  std::vector<uint16_t> in(256);
  for (auto &x : in) x = static_cast<uint16_t>(random());
  // transpose_8x8: lane 4g + t holds [g][2t..]
  std::vector<uint32_t> pairs(32);
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    pairs[lane] = in[g * 8 + 2 * t] | static_cast<uint32_t>(in[g * 8 + 2 * t + 1]) << 16;
  }
  Array<uint32_t> dpairs(pairs), dtransposed(32);
  Grid grid{1, 1, 1};
  check(QKV_LAUNCH((transpose_kernel), grid, 32, 0, nullptr, dpairs.get(), dtransposed.get()), "transpose_8x8");
  std::vector<uint32_t> got = dtransposed.read();
  uint64_t wrong = 0;
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    uint32_t want = in[2 * t * 8 + g] | static_cast<uint32_t>(in[(2 * t + 1) * 8 + g]) << 16;
    wrong += got[lane] != want;
  }
  report.line("transpose_8x8", 32, wrong);
  for (bool transposed : {false, true}) {
    Array<uint16_t> din(in);
    Array<uint32_t> dout(128);
    check(QKV_LAUNCH((load_matrix_kernel), grid, 32, 0, nullptr, din.get(), dout.get(), transposed), "load_matrix");
    got = dout.read();
    wrong = 0;
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 4; i++) {
        int g = lane / 4, t = lane % 4;
        auto element = [&](int row, int column) -> uint32_t {
          return transposed ? in[i * 64 + column * 8 + row] : in[i * 64 + row * 8 + column];
        };
        wrong += got[lane * 4 + i] != (element(g, 2 * t) | element(g, 2 * t + 1) << 16);
      }
    }
    report.line(transposed ? "load_matrix_x4_transposed" : "load_matrix_x4", 128, wrong);
  }
}

} // namespace

void test_matrix(Report &report, uint64_t) {
  if (features().tensor_cores != 0) {
    products<false>(report, "mma_16816_f16, integers", true);
    products<false>(report, "mma_16816_f16", false);
    products<true>(report, "mma_16816_bf16, integers", true);
    products<true>(report, "mma_16816_bf16", false);
  } else {
    report.skip("mma_16816", "no tensor cores in this compilation (sm_80 and up)");
  }
  test_moves(report);
}

} // namespace conformance
