// Single instructions of sm_90a behind names, as prim.h has those of all devices: products of a warpgroup (wgmma),
// barriers in shared memory (mbarrier), barriers of some warps, registers handed from warp to warp. Each has a host
// twin in testing/simt/prim_hopper.h and a conformance test that runs on hardware.
//
// A warpgroup is four warps in a row, the first a multiple of four. Its products are D [64, n] += A [64, 16] B [16, n]:
// warp w holds rows 16w .. 16w + 16, and of every 16 x 8 of them the fragments that prim.h draws, for A and for D.
//
// Matrices in shared memory are *panels*: [rows, 64] elements of 16 bits, 128 bytes a row, aligned to 1024 bytes. The
// 16-byte chunk c of row r lies at c ^ (r % 8), so that the same chunk of eight rows meets all banks.
//   by rows      A and B^T lie in panels with k along the row: 16 of k are 32 bytes of each row. A step in k of 16 is
//                32 bytes on, and after 64 the next panel begins.
//   by columns   B lies in panels with n along the row; 64 of n a panel, of which 16 or 32 may be a quarter or half. A step in k of 16 is 16 rows on.
#pragma once
#include "prim.h"

namespace quantkv {

// Bytes of a panel's row, and the place of a chunk in a panel.
constexpr int kPanelRow = 128;
QKV_DEVICE int panel_offset(int row, int chunk) { return row * kPanelRow + ((chunk ^ (row & 7)) << 4); }

} // namespace quantkv

//   QKV_PANELS_SHARED(name)   the launch's dynamic shared memory, aligned to 1024 bytes; the kernel has no other array in shared memory

#if defined(QUANTKV_SIMT)

#include "simt/prim_hopper.h" // testing/simt

#else

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QKV_HAS_WARPGROUP_PRODUCTS 1
#else
#define QKV_HAS_WARPGROUP_PRODUCTS 0
#endif

namespace quantkv {

#define QKV_PANELS_SHARED(name)                                                                                        \
  extern __shared__ __align__(1024) unsigned char qkv_panels_shared[];                                                 \
  unsigned char *name = qkv_panels_shared

#if QKV_HAS_WARPGROUP_PRODUCTS

QKV_DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- products of a warpgroup

// Where an operand begins, and how its panels lie.
struct PanelMatrix {
  uint64_t descriptor;
};
// k along the rows.
QKV_DEVICE PanelMatrix matrix_by_rows(const void *start) {
  return {uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (shared_address(start) >> 4 & 0x3fff)};
}
// n along the rows; its next 64 are `panel_bytes` on.
QKV_DEVICE PanelMatrix matrix_by_columns(const void *start, int panel_bytes) {
  return {uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
          (shared_address(start) >> 4 & 0x3fff)};
}
QKV_DEVICE PanelMatrix operator+(PanelMatrix matrix, int bytes) {
  return {matrix.descriptor + static_cast<uint64_t>(bytes >> 4)};
}

// Registers that products read or add to, written by this warpgroup until now, are theirs from here on.
QKV_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
QKV_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Sums [tiles][4] as operands of an instruction, by how many they are, and their names.
#define QKV_SUMS_4(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define QKV_SUMS_8(c, j) QKV_SUMS_4(c, j), QKV_SUMS_4(c, j + 1)
#define QKV_SUMS_16(c, j) QKV_SUMS_8(c, j), QKV_SUMS_8(c, j + 2)
#define QKV_SUMS_32(c, j) QKV_SUMS_16(c, j), QKV_SUMS_16(c, j + 4)
#define QKV_SUMS_64(c, j) QKV_SUMS_32(c, j), QKV_SUMS_32(c, j + 8)
#define QKV_SUMS_128(c, j) QKV_SUMS_64(c, j), QKV_SUMS_64(c, j + 16)
#define QKV_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QKV_NAMES_16 QKV_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QKV_NAMES_32                                                                                                   \
  QKV_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QKV_NAMES_64                                                                                                   \
  QKV_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                     \
               "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// Waits until at most N of this warp's groups of products are under way; `sums`, of those before, may then be read.
#define QKV_PRODUCTS_WAIT(tiles, floats)                                                                               \
  template <int N> QKV_DEVICE void products_wait(float (&sums)[tiles][4]) {                                            \
    asm volatile("wgmma.wait_group.sync.aligned %" #floats ";" : QKV_SUMS_##floats(sums, 0) : "n"(N) : "memory");      \
  }
QKV_PRODUCTS_WAIT(2, 8)
QKV_PRODUCTS_WAIT(4, 16)
QKV_PRODUCTS_WAIT(8, 32)
QKV_PRODUCTS_WAIT(16, 64)
QKV_PRODUCTS_WAIT(32, 128)
#undef QKV_PRODUCTS_WAIT

// All of these run in the background: operands are left alone, sums neither read nor written, until products_wait.

// sums [64, n] = or += A B, both by rows.
#define QKV_PRODUCTS_OF_PANELS(type, n, tiles, floats, name_of_a, name_of_b, name_of_adds)                             \
  QKV_DEVICE void multiply_rows_##type(float (&sums)[tiles][4], PanelMatrix a, PanelMatrix b, bool adds) {             \
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " name_of_adds ", 0; "                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type                                     \
                 " {" QKV_NAMES_##floats "}, " name_of_a ", " name_of_b ", adds, 1, 1, 0, 0; }"                        \
                 : QKV_SUMS_##floats(sums, 0)                                                                          \
                 : "l"(a.descriptor), "l"(b.descriptor), "r"(static_cast<int>(adds)));                                 \
  }
QKV_PRODUCTS_OF_PANELS(f16, 64, 8, 32, "%32", "%33", "%34")
QKV_PRODUCTS_OF_PANELS(bf16, 64, 8, 32, "%32", "%33", "%34")
QKV_PRODUCTS_OF_PANELS(f16, 128, 16, 64, "%64", "%65", "%66")
QKV_PRODUCTS_OF_PANELS(bf16, 128, 16, 64, "%64", "%65", "%66")
#undef QKV_PRODUCTS_OF_PANELS

// sums [64, n] += A B, A in registers, B by columns.
#define QKV_PRODUCTS_BY_COLUMNS(type, n, tiles, floats, names_of_a, name_of_b)                                         \
  QKV_DEVICE void multiply_columns_##type(float (&sums)[tiles][4], const uint32_t (&a)[4], PanelMatrix b) {            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type                                     \
                 " {" QKV_NAMES_##floats "}, {" names_of_a "}, " name_of_b ", 1, 1, 1, 1;"                             \
                 : QKV_SUMS_##floats(sums, 0)                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor));                                     \
  }
QKV_PRODUCTS_BY_COLUMNS(f16, 64, 8, 32, "%32,%33,%34,%35", "%36")
QKV_PRODUCTS_BY_COLUMNS(bf16, 64, 8, 32, "%32,%33,%34,%35", "%36")
QKV_PRODUCTS_BY_COLUMNS(f16, 128, 16, 64, "%64,%65,%66,%67", "%68")
QKV_PRODUCTS_BY_COLUMNS(bf16, 128, 16, 64, "%64,%65,%66,%67", "%68")
#undef QKV_PRODUCTS_BY_COLUMNS

// sums [64, n] = or += A B, A in registers, B by rows or by columns. (By columns of 128 see above.)
#define QKV_PRODUCTS_OF_REGISTERS(way, transposes, n, tiles, floats, names_of_a, name_of_b, name_of_adds)              \
  QKV_DEVICE void multiply_##way##_f16(float (&sums)[tiles][4], const uint32_t (&a)[4], PanelMatrix b, bool adds) {    \
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " name_of_adds ", 0; "                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16"                                              \
                 " {" QKV_NAMES_##floats "}, {" names_of_a "}, " name_of_b ", adds, 1, 1, " #transposes "; }"          \
                 : QKV_SUMS_##floats(sums, 0)                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(static_cast<int>(adds)));        \
  }
#define QKV_PRODUCTS_BOTH_WAYS(...)                                                                                    \
  QKV_PRODUCTS_OF_REGISTERS(rows, 0, __VA_ARGS__)                                                                      \
  QKV_PRODUCTS_OF_REGISTERS(columns, 1, __VA_ARGS__)
QKV_PRODUCTS_BOTH_WAYS(16, 2, 8, "%8,%9,%10,%11", "%12", "%13")
QKV_PRODUCTS_BOTH_WAYS(32, 4, 16, "%16,%17,%18,%19", "%20", "%21")
QKV_PRODUCTS_BOTH_WAYS(64, 8, 32, "%32,%33,%34,%35", "%36", "%37")
QKV_PRODUCTS_OF_REGISTERS(rows, 0, 128, 16, 64, "%64,%65,%66,%67", "%68", "%69")
#undef QKV_PRODUCTS_BOTH_WAYS
#undef QKV_PRODUCTS_OF_REGISTERS

// This thread's writes to shared memory until now are seen by products, its own and, after a barrier, others'.
QKV_DEVICE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- barriers in shared memory: 8 bytes, in phases; a phase ends when as many have arrived as it was made for

QKV_DEVICE void phase_barrier_init(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
QKV_DEVICE void phase_barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the phase of this parity: of phases 0, 2, .. with 0, of 1, 3, .. with 1. A new barrier counts as
// one whose phase of parity 1 has ended.
QKV_DEVICE void phase_barrier_wait(uint64_t *barrier, int parity) {
  asm volatile("{ .reg .pred ended; again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1; "
               "@ended bra.uni done; bra.uni again; done: }" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}

// ---- barriers of some warps of the block, 1 to 15, for `threads` threads; those that arrive do not wait

QKV_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
QKV_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- registers of a thread, for all threads of the warpgroup; multiples of 8

template <int kRegisters> QKV_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> QKV_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif // QKV_HAS_WARPGROUP_PRODUCTS

} // namespace quantkv

#endif
