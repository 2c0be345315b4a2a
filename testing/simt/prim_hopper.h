// Host twin of csrc/core/prim_hopper.h: what each instruction computes, written out.
//
// Products are as late as allowed: done in products_wait(), group by group, from what shared memory holds then, and
// never if nobody waits. Like mma's, their sums are plain f32 from k = 0 on. Fences do nothing here: memory is
// sequentially consistent.
#pragma once
#include "prim.h"

#define QKV_HAS_WARPGROUP_PRODUCTS (QUANTKV_SIMT_ARCH == 90)
#define QKV_PANELS_SHARED(name) unsigned char *name = quantkv::simt::dynamic_shared(1024)

namespace quantkv {

#if QKV_HAS_WARPGROUP_PRODUCTS

struct PanelMatrix {
  const unsigned char *start;
  int panel_bytes; // of a matrix by columns
};
inline PanelMatrix matrix_by_rows(const void *start) { return {static_cast<const unsigned char *>(start), 0}; }
inline PanelMatrix matrix_by_columns(const void *start, int panel_bytes) {
  return {static_cast<const unsigned char *>(start), panel_bytes};
}
inline PanelMatrix operator+(PanelMatrix matrix, int bytes) { return {matrix.start + bytes, matrix.panel_bytes}; }

namespace simt {

struct Product : PendingProduct {
  float *sums; // [columns / 8][4]
  int columns;
  bool adds, is_bf16, a_in_registers;
  uint32_t a_words[4];
  PanelMatrix a, b;
};
static_assert(sizeof(Product) <= sizeof(PendingProductSpace));

inline float product_operand(uint16_t bits, bool is_bf16) { return is_bf16 ? to_f32(bf16{bits}) : to_f32(f16{bits}); }

// Eight elements that lie together, `step` apart in `x`, from where hardware reads them: chunks of 16 bytes are swapped
// by the address's own bits.
inline void load_chunk(float *x, int step, const unsigned char *address, bool is_bf16) {
  const auto bits = reinterpret_cast<uintptr_t>(address);
  const auto *swapped = reinterpret_cast<const unsigned char *>(bits ^ (bits >> 3 & 0x70));
  uint16_t elements[8];
  check_shared("a product's operand", swapped, sizeof elements);
  memcpy(elements, swapped, sizeof elements);
  for (int i = 0; i < 8; i++) x[i * step] = product_operand(elements[i], is_bf16);
}

// One product of one warp.
inline void multiply(Lane *lanes, size_t index) {
  const auto product_of = [&](int lane) -> const Product & {
    return *reinterpret_cast<const Product *>(&lanes[lane].products[index]);
  };
  const Product &first = product_of(0);
  constexpr int kColumns = 128;
  float a[16][16], b[16][kColumns], sums[16][kColumns]; // rows x k, k x columns, rows x columns
  for (int lane = 0; lane < kLanes && first.a_in_registers; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      for (int half = 0; half < 2; half++) {
        const auto bits = static_cast<uint16_t>(product_of(lane).a_words[i] >> 16 * half);
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = product_operand(bits, first.is_bf16);
      }
    }
  }
  const unsigned char *rows = first.a.start + lanes[0].index / kLanes % 4 * 16 * 128;
  for (int row = 0; row < 16 && !first.a_in_registers; row++) {
    for (int k = 0; k < 16; k += 8) load_chunk(&a[row][k], 1, rows + row * 128 + 2 * k, first.is_bf16);
  }
  if (first.b.panel_bytes == 0) {
    for (int n = 0; n < first.columns; n++) {
      for (int k = 0; k < 16; k += 8) load_chunk(&b[k][n], kColumns, first.b.start + n * 128 + 2 * k, first.is_bf16);
    }
  } else {
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < first.columns; n += 8) {
        load_chunk(&b[k][n], 1, first.b.start + n / 64 * first.b.panel_bytes + k * 128 + n % 64 * 2, first.is_bf16);
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    for (int n = 0; n < first.columns; n += 8) multiply_row(&sums[row][n], a[row], &b[0][n], kColumns);
  }
  for (int lane = 0; lane < kLanes; lane++) {
    const Product &mine = product_of(lane);
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < mine.columns / 8; j++) {
      for (int i = 0; i < 4; i++) {
        float &c = mine.sums[4 * j + i];
        c = (mine.adds ? c : 0.0f) + sums[g + 8 * (i / 2)][8 * j + 2 * t + i % 2];
      }
    }
  }
}

// Runs the oldest groups of a warp until `left` are under way.
inline void finish_products(const Deposits &warp) {
  const size_t left = warp.operand<size_t>(0);
  for (int lane = 0; lane < kLanes; lane++) {
    if (warp.lanes[lane].products.size() != warp.lanes[0].products.size() ||
        warp.lanes[lane].product_groups != warp.lanes[0].product_groups) {
      fail(Fault::LaunchFailure, "products_wait: lanes of the warp have issued different products");
    }
  }
  size_t count = 0;
  while (warp.lanes[0].product_groups.size() > left) {
    count += warp.lanes[0].product_groups.front();
    for (int lane = 0; lane < kLanes; lane++) {
      auto &groups = warp.lanes[lane].product_groups;
      groups.erase(groups.begin());
    }
  }
  for (size_t i = 0; i < count; i++) multiply(warp.lanes, i);
  for (int lane = 0; lane < kLanes; lane++) {
    auto &products = warp.lanes[lane].products;
    products.erase(products.begin(), products.begin() + static_cast<ptrdiff_t>(count));
  }
}

inline void issue(const Product &product) {
  if (current->index / kLanes / 4 * 4 * kLanes + 4 * kLanes > block_size) {
    fail(Fault::LaunchFailure, "a product needs a whole warpgroup");
  }
  PendingProductSpace space = {};
  memcpy(&space, &product, sizeof product);
  current->products.push_back(space);
}

template <size_t kTiles>
void multiply_rows(float (&sums)[kTiles][4], PanelMatrix a, PanelMatrix b, bool adds, bool is_bf16) {
  check_aligned("multiply_rows, operand", a.start, 32);
  check_aligned("multiply_rows, operand", b.start, 32);
  issue(Product{{}, &sums[0][0], 8 * kTiles, adds, is_bf16, false, {}, a, b});
}
template <size_t kTiles>
void multiply_rows(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b, bool adds, bool is_bf16) {
  check_aligned("multiply_rows, operand", b.start, 32);
  issue(Product{{}, &sums[0][0], 8 * kTiles, adds, is_bf16, true, {a[0], a[1], a[2], a[3]}, {}, b});
}
template <size_t kTiles>
void multiply_columns(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b, bool adds, bool is_bf16) {
  check_aligned("multiply_columns, operand", b.start, kTiles <= 4 ? 64 : 1024);
  issue(Product{{}, &sums[0][0], 8 * kTiles, adds, is_bf16, true, {a[0], a[1], a[2], a[3]}, {}, b});
}

} // namespace simt

inline void products_begin() {}
inline void products_commit() {
  simt::Lane &lane = *simt::current;
  size_t grouped = 0;
  for (size_t group : lane.product_groups) grouped += group;
  lane.product_groups.push_back(lane.products.size() - grouped);
}
template <int N, size_t kTiles> void products_wait(float (&)[kTiles][4], simt::Site site = simt::Site::current()) {
  simt::collective<int>("products_wait", site, static_cast<size_t>(N), simt::finish_products, true);
}

template <size_t kTiles> void multiply_rows_f16(float (&sums)[kTiles][4], PanelMatrix a, PanelMatrix b, bool adds) {
  simt::multiply_rows(sums, a, b, adds, false);
}
template <size_t kTiles> void multiply_rows_bf16(float (&sums)[kTiles][4], PanelMatrix a, PanelMatrix b, bool adds) {
  simt::multiply_rows(sums, a, b, adds, true);
}
template <size_t kTiles>
void multiply_rows_f16(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b, bool adds) {
  simt::multiply_rows(sums, a, b, adds, false);
}
template <size_t kTiles>
void multiply_columns_f16(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b, bool adds = true) {
  simt::multiply_columns(sums, a, b, adds, false);
}
template <size_t kTiles> void multiply_columns_bf16(float (&sums)[kTiles][4], const uint32_t (&a)[4], PanelMatrix b) {
  simt::multiply_columns(sums, a, b, true, true);
}
inline void fence_for_products() {}

// ---- barriers

namespace simt {

// In the 8 bytes of a barrier.
struct PhaseBarrier {
  uint16_t arrivals, missing;
  uint32_t ended; // phases
};
static_assert(sizeof(PhaseBarrier) == 8);

inline PhaseBarrier &phase_barrier(const char *name, uint64_t *barrier) {
  check_aligned(name, barrier, 8);
  check_shared(name, barrier, 8);
  return *reinterpret_cast<PhaseBarrier *>(barrier);
}

} // namespace simt

inline void phase_barrier_init(uint64_t *barrier, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  simt::phase_barrier("phase_barrier_init", barrier) = {count, count, 0};
}
inline void phase_barrier_arrive(uint64_t *barrier) {
  simt::PhaseBarrier &state = simt::phase_barrier("phase_barrier_arrive", barrier);
  if (--state.missing > 0) return;
  state.missing = state.arrivals;
  state.ended++;
  simt::wake(barrier);
}
inline void phase_barrier_wait(uint64_t *barrier, int parity, simt::Site site = simt::Site::current()) {
  const simt::PhaseBarrier &state = simt::phase_barrier("phase_barrier_wait", barrier);
  // The phase under way is number `ended`: one of the other parity has ended last.
  while (static_cast<int>(state.ended & 1) == parity) simt::wait_for(barrier, "phase_barrier_wait", site);
}

inline void named_barrier_sync(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::named_barrier(id, threads, true, site);
}
inline void named_barrier_arrive(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::named_barrier(id, threads, false, site);
}

template <int kRegisters> void give_registers() {}
template <int kRegisters> void take_registers() {}

#endif // QKV_HAS_WARPGROUP_PRODUCTS

} // namespace quantkv
