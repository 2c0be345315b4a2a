// Launches of gather.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#include "../ops/gather.h"

namespace quantkv {
namespace {

// Blocks of a launch at most: each looks at all sequence bounds once.
constexpr int64_t kMaxGatherBlocks = 2048;

template <bool kRaw, Format A> int launch_gather(GatherParams &p, bool vectors, int width, void *stream) {
  const int heads = p.op.cache.num_kv_heads;
  p.share = share_rows(p.op.num_tokens, 2 * heads, vectors ? width : kWarp, 1, 1);
  const int64_t columns = vectors ? ceil_div(p.share.rows, p.share.block_rows) : 1;
  p.tile = 4;
  while (p.tile < kMaxTile && ceil_div(p.op.num_tokens, 2 * p.tile) * columns >= kMaxGatherBlocks / 2) p.tile *= 2;
  // Without rows there may still be bounds to find fault with.
  const int64_t tiles = p.op.num_tokens > 0 ? ceil_div(p.op.num_tokens, p.tile) : 1;
  const Grid grid = {tiles < kMaxGatherBlocks ? tiles : kMaxGatherBlocks, columns, 1};
  if (vectors) return QKV_LAUNCH_OVERLAPPED((gather_vectors<kRaw, A>), grid, kRowThreads, 0, stream, p);
  return QKV_LAUNCH_OVERLAPPED((gather_elements<kRaw, A>), grid, kRowThreads, 0, stream, p);
}

int check(const quantkv_gather &op) {
  const bool raw = op.activation == -1;
  QKV_CHECK(check_cache(op.cache, !raw));
  const int32_t heads = op.cache.num_kv_heads, k_dim = op.cache.k.head_dim, v_dim = op.cache.v.head_dim;
  QKV_CHECK(check_rows(op.key, raw ? op.cache.k.format : op.activation, op.num_tokens, heads, k_dim, raw));
  QKV_CHECK(check_rows(op.value, raw ? op.cache.v.format : op.activation, op.num_tokens, heads, v_dim, raw));
  const bool sizes = op.num_seqs >= 0 && op.num_seqs <= 0x7fffffff &&
                     product_plus(op.num_seqs, op.block_table_stride, 0) >= 0;
  const bool pointers = op.cu_seq_lens != nullptr && is_aligned(op.cu_seq_lens, 4) && is_aligned(op.starts, 4) &&
                        is_aligned(op.block_tables, 4) && (op.block_tables != nullptr || op.block_table_stride == 0);
  return valid_if(sizes && (op.num_seqs == 0 || pointers));
}

} // namespace
} // namespace quantkv

int QKV_ENTRY(gather)(const quantkv_gather *op, quantkv_stream stream) {
  using namespace quantkv;
  if (op == nullptr) return QUANTKV_INVALID_ARGUMENT;
  GatherParams p = {*op, {}, {}, 0};
  const quantkv_half &k = op->cache.k, &v = op->cache.v;
  const bool raw = op->activation == -1;
  if (raw) {
    p.op.key.token_stride = static_cast<int64_t>(op->cache.num_kv_heads) * k.head_dim;
    p.op.key.head_stride = k.head_dim;
    p.op.value.token_stride = static_cast<int64_t>(op->cache.num_kv_heads) * v.head_dim;
    p.op.value.head_stride = v.head_dim;
  }
  QKV_CHECK(check(p.op));
  if (op->num_seqs == 0) return QUANTKV_OK;
  p.op.cache = used_strides(op->cache);
  p.op.key = used_strides(p.op.key, op->num_tokens, op->cache.num_kv_heads);
  p.op.value = used_strides(p.op.value, op->num_tokens, op->cache.num_kv_heads);
  p.paging = paging_of(op->cache);
  const int32_t key_format = raw ? k.format : op->activation, value_format = raw ? v.format : op->activation;
  const bool vectors = rows_have_vectors(p.op.key, key_format, k.head_dim) && half_has_vectors(k) &&
                       rows_have_vectors(p.op.value, value_format, v.head_dim) && half_has_vectors(v);
  const int width = (k.head_dim > v.head_dim ? k.head_dim : v.head_dim) / kVector;
  switch (op->activation) {
  case QUANTKV_F32: return launch_gather<false, Format::F32>(p, vectors, width, stream);
  case QUANTKV_F16: return launch_gather<false, Format::F16>(p, vectors, width, stream);
  case QUANTKV_BF16: return launch_gather<false, Format::BF16>(p, vectors, width, stream);
  default: return launch_gather<true, Format::F32>(p, vectors, width, stream);
  }
}
