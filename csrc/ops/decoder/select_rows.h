// out[i] = table[ids[i]], converted: the embedding of a step's tokens, and the rows of a step that need logits.
// A block a row. An id outside the table gives a row of zeros.
#pragma once
#include "elements.h"

namespace quantkv {
namespace decoder {

constexpr int kSelectThreads = 128;

struct SelectRowsParams {
  const void *table;  // [num_rows, width], of W
  const int32_t *ids; // [count]
  void *out;          // [count, width], of A
  int64_t num_rows;
  int64_t width;
  bool packed; // rows in whole packs
};

template <class W, class A> QKV_KERNEL void QKV_LAUNCH_BOUNDS(kSelectThreads, 1) select_rows_kernel(SelectRowsParams p) {
  const int64_t id = p.ids[block_index_x()];
  const bool valid = id >= 0 && id < p.num_rows;
  const W *row = static_cast<const W *>(p.table) + (valid ? id : 0) * p.width;
  A *out = static_cast<A *>(p.out) + block_index_x() * p.width;
  if (!p.packed) {
    for (int64_t i = thread_index(); i < p.width; i += kSelectThreads) out[i] = narrow<A>(valid ? to_f32(row[i]) : 0.0f);
    return;
  }
  for (int64_t i = thread_index() * kPack; i < p.width; i += kSelectThreads * kPack) {
    float x[kPack] = {};
    if (valid) load_pack(row + i, x);
    store_pack(out + i, x);
  }
}

} // namespace decoder
} // namespace quantkv
