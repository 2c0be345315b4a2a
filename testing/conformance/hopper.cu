// The instructions of sm_90a (core/prim_hopper.h): products of a warpgroup from panels against f64, barriers by what
// they order. Elsewhere they are not there, and skipped.
//
// Panels are filled element by element from the picture in prim_hopper.h: a wrong picture gives a wrong product.
#include "core/prim_hopper.h"
#include "harness.h"
#include "reference.h"

#include <cmath>

namespace conformance {
namespace {

constexpr int kRows = 64, kDepth = 128; // of A; k in two panels, or in 128 rows
constexpr int kGroup = 128;             // threads of a warpgroup

struct HopperFeature {
  int32_t products;
};
QKV_KERNEL void feature_kernel(HopperFeature *out) {
  if (thread_index() == 0) out->products = QKV_HAS_WARPGROUP_PRODUCTS;
}

#if QKV_HAS_WARPGROUP_PRODUCTS
QKV_DEVICE unsigned char *align_panels(unsigned char *p) {
  return reinterpret_cast<unsigned char *>((reinterpret_cast<uintptr_t>(p) + 1023) / 1024 * 1024);
}

// Element (row, column) of a matrix in panels of `rows` rows.
QKV_DEVICE uint16_t &panel_at(unsigned char *panels, int rows, int row, int column) {
  unsigned char *panel = panels + column / 64 * rows * kPanelRow;
  return *reinterpret_cast<uint16_t *>(panel + panel_offset(row, column % 64 / 8) + column % 8 * 2);
}

template <size_t kTiles> QKV_DEVICE void store_sums(const float (&sums)[kTiles][4], float *out) {
  constexpr int columns = 8 * static_cast<int>(kTiles);
  const int lane = lane_index(), row = warp_index() % 4 * 16 + lane / 4;
  for (int j = 0; j < columns / 8; j++) {
    for (int i = 0; i < 4; i++) out[(row + 8 * (i / 2)) * columns + 8 * j + lane % 4 * 2 + i % 2] = sums[j][i];
  }
}

QKV_DEVICE void load_fragments(const uint16_t *a, uint32_t (&fragments)[kDepth / 16][4]) {
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  const auto pair = [&](int row, int k) { return a[row * kDepth + k] | static_cast<uint32_t>(a[row * kDepth + k + 1]) << 16; };
  QKV_UNROLL
  for (int step = 0; step < kDepth / 16; step++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) fragments[step][i] = pair(row + 8 * (i % 2), 16 * step + column + 8 * (i / 2));
  }
}
#endif

// out [64, N] = A [64, 128] B^T, B [N, 128]; if `adds`, A's first 16 columns count twice.
template <bool Bf16, int N> QKV_KERNEL void by_rows_kernel(const uint16_t *a, const uint16_t *b, float *out, bool adds) {
#if QKV_HAS_WARPGROUP_PRODUCTS
  QKV_DYNAMIC_SHARED(memory);
  unsigned char *panels_a = align_panels(memory), *panels_b = panels_a + kRows * kDepth * 2;
  for (int i = thread_index(); i < kRows * kDepth; i += kGroup) panel_at(panels_a, kRows, i / kDepth, i % kDepth) = a[i];
  for (int i = thread_index(); i < N * kDepth; i += kGroup) panel_at(panels_b, N, i / kDepth, i % kDepth) = b[i];
  fence_for_products();
  sync_threads();
  float sums[N / 8][4];
  for (int j = 0; j < N / 8; j++) {
    for (int i = 0; i < 4; i++) sums[j][i] = 1e30f; // the first product does not add
  }
  const auto multiply = [&](int step, bool add) {
    const PanelMatrix x = matrix_by_rows(panels_a + step / 4 * kRows * kPanelRow) + 32 * (step % 4);
    const PanelMatrix y = matrix_by_rows(panels_b + step / 4 * N * kPanelRow) + 32 * (step % 4);
    if constexpr (Bf16) {
      multiply_rows_bf16(sums, x, y, add);
    } else {
      multiply_rows_f16(sums, x, y, add);
    }
  };
  products_begin();
  QKV_UNROLL
  for (int step = 0; step < kDepth / 16; step++) multiply(step, step > 0);
  products_commit();
  if (adds) {
    multiply(0, true);
    products_commit();
  }
  products_wait<0>(sums);
  store_sums(sums, out);
#else
  (void)a, (void)b, (void)out, (void)adds;
#endif
}

// out [64, N] = A [64, 128] B, A in registers, B [128, N] by columns, from column kFirst of its panel on. kReplaces: by the product
// that can do without sums that are zero.
template <bool Bf16, int N, int kFirst, bool kReplaces> QKV_KERNEL void by_columns_kernel(const uint16_t *a, const uint16_t *b, float *out) {
#if QKV_HAS_WARPGROUP_PRODUCTS
  QKV_DYNAMIC_SHARED(memory);
  unsigned char *panels = align_panels(memory);
  for (int i = thread_index(); i < kDepth * N; i += kGroup) panel_at(panels, kDepth, i / N, kFirst + i % N) = b[i];
  fence_for_products();
  sync_threads();
  uint32_t fragments[kDepth / 16][4];
  load_fragments(a, fragments);
  float sums[N / 8][4];
  QKV_UNROLL
  for (int j = 0; j < N / 8; j++) {
    QKV_UNROLL
    for (int i = 0; i < 4; i++) sums[j][i] = kReplaces ? 1e30f : 0.0f;
  }
  products_begin();
  QKV_UNROLL
  for (int step = 0; step < kDepth / 16; step++) {
    const PanelMatrix y = matrix_by_columns(panels + 2 * kFirst, kDepth * kPanelRow) + 16 * kPanelRow * step;
    if constexpr (Bf16) {
      multiply_columns_bf16(sums, fragments[step], y);
    } else if constexpr (kReplaces) {
      multiply_columns_f16(sums, fragments[step], y, step > 0);
    } else {
      multiply_columns_f16(sums, fragments[step], y);
    }
  }
  products_commit();
  products_wait<0>(sums);
  store_sums(sums, out);
#else
  (void)a, (void)b, (void)out;
#endif
}

// out [64, N] = A [64, 128] B^T, A in registers, B [N, 128].
template <int N> QKV_KERNEL void register_rows_kernel(const uint16_t *a, const uint16_t *b, float *out) {
#if QKV_HAS_WARPGROUP_PRODUCTS
  QKV_DYNAMIC_SHARED(memory);
  unsigned char *panels = align_panels(memory);
  for (int i = thread_index(); i < kDepth * N; i += kGroup) panel_at(panels, N, i / kDepth, i % kDepth) = b[i];
  fence_for_products();
  sync_threads();
  uint32_t fragments[kDepth / 16][4];
  load_fragments(a, fragments);
  float sums[N / 8][4];
  for (int j = 0; j < N / 8; j++) {
    for (int i = 0; i < 4; i++) sums[j][i] = 1e30f; // the first product does not add
  }
  products_begin();
  QKV_UNROLL
  for (int step = 0; step < kDepth / 16; step++) {
    multiply_rows_f16(sums, fragments[step], matrix_by_rows(panels + step / 4 * N * kPanelRow) + 32 * (step % 4), step > 0);
  }
  products_commit();
  products_wait<0>(sums);
  store_sums(sums, out);
#else
  (void)a, (void)b, (void)out;
#endif
}

enum class Kind { Rows, RowsTwice, RegisterRows, Columns };

// `integers`: small ones, whose sums are exact in any order; otherwise random values over many binades.
template <bool Bf16, int N = 128, int kFirst = 0, bool kReplaces = N <= 32> void products(Report &report, const char *name, Kind kind, bool integers) {
  const SmallFloat format = Bf16 ? small_bf16() : small_f16();
  const bool rows = kind != Kind::Columns;
  constexpr int columns = N;
  std::mt19937 random(Bf16 ? 31 : 30);
  const auto value = [&]() -> float {
    if (integers) return static_cast<float>(static_cast<int>(random() % 17) - 8);
    const double x = static_cast<double>(random()) / 2147483648.0 - 1.0;
    return static_cast<float>(std::ldexp(x, static_cast<int>(random() % 12) - 6));
  };
  std::vector<uint16_t> a(kRows * kDepth), b(static_cast<size_t>(columns) * kDepth);
  for (auto &x : a) x = static_cast<uint16_t>(round_to(format, as_bits(value())));
  for (auto &x : b) x = static_cast<uint16_t>(round_to(format, as_bits(value())));
  Array<uint16_t> da(a), db(b);
  Array<float> out(static_cast<size_t>(kRows) * columns);
  const Grid grid{1, 1, 1};
  const size_t shared = 1024 + (kRows + 128) * kDepth * 2;
  int status = QUANTKV_OK;
  if (kind == Kind::Columns) {
    status = QKV_LAUNCH((by_columns_kernel<Bf16, N, kFirst, kReplaces>), grid, kGroup, shared, nullptr, da.get(), db.get(), out.get());
  } else if (kind == Kind::RegisterRows) {
    if constexpr (!Bf16) {
      status = QKV_LAUNCH((register_rows_kernel<N>), grid, kGroup, shared, nullptr, da.get(), db.get(), out.get());
    }
  } else if constexpr (N >= 64) {
    status = QKV_LAUNCH((by_rows_kernel<Bf16, N>), grid, kGroup, shared, nullptr, da.get(), db.get(), out.get(), kind == Kind::RowsTwice);
  }
  check(status, name);
  const std::vector<float> got = out.read();
  uint64_t wrong = 0;
  double worst = 0;
  for (int m = 0; m < kRows; m++) {
    for (int n = 0; n < columns; n++) {
      double want = 0, magnitude = 0;
      for (int k = 0; k < kDepth; k++) {
        const uint16_t y = rows ? b[static_cast<size_t>(n) * kDepth + k] : b[static_cast<size_t>(k) * columns + n];
        const double product = value_of(format, a[m * kDepth + k]) * value_of(format, y);
        const int times = kind == Kind::RowsTwice && k < 16 ? 2 : 1;
        want += times * product;
        magnitude += times * std::abs(product);
      }
      const double error = std::abs(got[static_cast<size_t>(m) * columns + n] - want);
      // As for mma (matrix.cu): each of the additions is off by at most an ulp of what has been summed.
      const bool good = integers ? error == 0 : error <= (kDepth + 17) * std::ldexp(magnitude, -23);
      worst = std::max(worst, error / std::max(magnitude, 1e-30));
      wrong += !good || std::isnan(got[static_cast<size_t>(m) * columns + n]);
    }
  }
  report.line(std::string(name) + (Bf16 ? "_bf16" : "_f16") + (integers ? ", integers" : ""), got.size(), wrong,
              "worst " + number(worst * 16777216.0) + " of 2^-24 sum|ab|");
}

// A ring of two slots between a producing and a consuming warpgroup, which also hand registers to each other: each
// number must come through once and in order. Then both take turns at a counter by named barriers.
constexpr int kNumbers = 64, kTurns = 20;
QKV_KERNEL void QKV_LAUNCH_BOUNDS(2 * kGroup, 1) ring_kernel(uint32_t *out, uint32_t *turns) {
#if QKV_HAS_WARPGROUP_PRODUCTS
  struct Slots {
    uint32_t values[2][kGroup];
    uint64_t full[2], empty[2];
    uint32_t counter;
  };
  QKV_SHARED(Slots, slots, 1);
  const int thread = thread_index() % kGroup, group = thread_index() / kGroup;
  if (thread_index() == 0) {
    for (int i = 0; i < 2; i++) {
      phase_barrier_init(&slots->full[i], kGroup);
      phase_barrier_init(&slots->empty[i], kGroup);
    }
    slots->counter = 0;
  }
  sync_threads();
  if (group == 0) {
    give_registers<40>();
    for (int n = 0; n < kNumbers; n++) {
      phase_barrier_wait(&slots->empty[n % 2], (n / 2 & 1) ^ 1);
      slots->values[n % 2][thread] = static_cast<uint32_t>(n * kGroup + thread);
      phase_barrier_arrive(&slots->full[n % 2]);
    }
  } else {
    take_registers<80>();
    for (int n = 0; n < kNumbers; n++) {
      phase_barrier_wait(&slots->full[n % 2], n / 2 & 1);
      out[n * kGroup + thread] = slots->values[n % 2][(thread + 32) % kGroup];
      phase_barrier_arrive(&slots->empty[n % 2]);
    }
  }
  // Group 0 begins; each passes the turn to the other.
  for (int turn = 0; turn < kTurns; turn++) {
    if (group != 0 || turn != 0) named_barrier_sync(1 + group, 2 * kGroup);
    if (thread == 0) turns[turn * 2 + group] = slots->counter++;
    if (group == 0 || turn != kTurns - 1) named_barrier_arrive(1 + (group ^ 1), 2 * kGroup);
  }
#else
  (void)out, (void)turns;
#endif
}

void test_ring(Report &report) {
  Array<uint32_t> out(kNumbers * kGroup), turns(2 * kTurns);
  const Grid grid{1, 1, 1};
  check(QKV_LAUNCH((ring_kernel), grid, 2 * kGroup, 0, nullptr, out.get(), turns.get()), "ring");
  uint64_t wrong = 0;
  const std::vector<uint32_t> got = out.read(), order = turns.read();
  for (int n = 0; n < kNumbers; n++) {
    for (int thread = 0; thread < kGroup; thread++) {
      wrong += got[static_cast<size_t>(n) * kGroup + thread] != static_cast<uint32_t>(n * kGroup + (thread + 32) % kGroup);
    }
  }
  report.line("phase_barrier, a ring", got.size(), wrong);
  wrong = 0;
  for (size_t i = 0; i < order.size(); i++) wrong += order[i] != i;
  report.line("named_barrier, turns", order.size(), wrong);
}

} // namespace

void test_hopper(Report &report, uint64_t) {
  Array<HopperFeature> has(1);
  check(QKV_LAUNCH((feature_kernel), (Grid{1, 1, 1}), 32, 0, nullptr, has.get()), "feature");
  if (has.read()[0].products == 0) {
    report.skip("multiply_rows, multiply_columns", "products of warpgroups are for sm_90a");
    return;
  }
  for (bool integers : {true, false}) {
    products<false>(report, "multiply_rows", Kind::Rows, integers);
    products<true>(report, "multiply_rows", Kind::Rows, integers);
    products<false>(report, "multiply_rows, adding", Kind::RowsTwice, integers);
    products<false, 64>(report, "multiply_rows [64]", Kind::Rows, integers);
    products<true, 64>(report, "multiply_rows [64]", Kind::Rows, integers);
    products<false>(report, "multiply_columns [128]", Kind::Columns, integers);
    products<true>(report, "multiply_columns [128]", Kind::Columns, integers);
    products<false, 64>(report, "multiply_columns [64]", Kind::Columns, integers);
    products<true, 64>(report, "multiply_columns [64]", Kind::Columns, integers);
    products<false, 64, 0, true>(report, "multiply_columns [64], replacing", Kind::Columns, integers);
    products<false, 32, 0, true>(report, "multiply_columns [32], replacing", Kind::Columns, integers);
    products<false, 32, 32, true>(report, "multiply_columns [32], from 32", Kind::Columns, integers);
    products<false, 16, 0, true>(report, "multiply_columns [16], replacing", Kind::Columns, integers);
    products<false, 16, 32, true>(report, "multiply_columns [16], from 32", Kind::Columns, integers);
    products<false>(report, "multiply_rows [128], A in registers", Kind::RegisterRows, integers);
    products<false, 64>(report, "multiply_rows [64], A in registers", Kind::RegisterRows, integers);
    products<false, 32>(report, "multiply_rows [32], A in registers", Kind::RegisterRows, integers);
    products<false, 16>(report, "multiply_rows [16], A in registers", Kind::RegisterRows, integers);
  }
  test_ring(report);
}

} // namespace conformance
