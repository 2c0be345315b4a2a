// Which calls the decode kernel (ops/paged_attention_decode.h) takes, and its launch. Instantiations are compiled a
// format a file: paged_attention_decode_{e4m3,e5m2,f16,bf16}.cu; those of packed rows in ..._packed_{fp8,16_bit}.cu.
#pragma once
#include "../launch/paged_attention_kernels.h"
#include "../ops/paged_attention_decode.h"

namespace quantkv {

// One format's part of these two: `run` with a shape chosen, or 0 / QUANTKV_UNSUPPORTED.
template <Format F, Order O> DecodeConfig decode_config_of(const quantkv_paged_attention &op, const Device &device, int32_t rows);
template <Format F, Order O> int launch_decode_of(const AttentionParams &params, const WorkList &list, const Device &device, void *stream);

// Formats that these kernels are compiled for; others go to the kernels that take what these do not.
constexpr bool decode_has(Format format) {
  return kHasAllFormats ? format != Format::F32 : format == Format::E4M3 || format == Format::BF16;
}

// Calls visit.template run<Shape>() for the head dim, rows and scales at hand.
template <Format F, int D, int RowTiles, bool Dynamic, Order O, class Visit> int visit_decode_shape(Visit visit) {
  if constexpr (DecodeShape<F, D, RowTiles, Dynamic, O>::kFits && decode_has(F)) {
    return visit.template run<F, D, RowTiles, Dynamic, O>();
  } else {
    return QUANTKV_UNSUPPORTED;
  }
}

template <Format F, int D, Order O, class Visit> int visit_decode_rows(int32_t rows, bool dynamic, Visit visit) {
  if constexpr (is_quantized(F) && O == Order::Rows) {
    if (dynamic) {
      return rows <= 8 ? visit_decode_shape<F, D, 1, true, O>(visit) : visit_decode_shape<F, D, 2, true, O>(visit);
    }
  }
  if (dynamic) return QUANTKV_UNSUPPORTED;
  return rows <= 8 ? visit_decode_shape<F, D, 1, false, O>(visit) : visit_decode_shape<F, D, 2, false, O>(visit);
}

template <Format F, Order O, class Visit> int visit_decode(const quantkv_paged_attention &op, int32_t rows, Visit visit) {
  const bool dynamic = has_dynamic_scales(op.cache);
  switch (op.cache.k.head_dim) {
  case 64: return visit_decode_rows<F, 64, O>(rows, dynamic, visit);
  case 96: return visit_decode_rows<F, 96, O>(rows, dynamic, visit);
  case 128: return visit_decode_rows<F, 128, O>(rows, dynamic, visit);
  case 192:
    // No model of engines that pack rows has these.
    if constexpr (O == Order::Packed) return QUANTKV_UNSUPPORTED;
    else return visit_decode_rows<F, 192, O>(rows, dynamic, visit);
  case 256: return visit_decode_rows<F, 256, O>(rows, dynamic, visit);
  default: return QUANTKV_UNSUPPORTED;
  }
}

constexpr int kReservedShared = 1024; // by the system, a block

template <class Shape>
constexpr int kStaticShared = static_cast<int>(2 * sizeof(DecodeQuery<Shape>) + sizeof(DecodeWork) + Shape::kWarps * sizeof(DecodeWarp<Shape>));

// Blocks of a shape that are resident together: registers allow blocks_on(), shared memory maybe fewer.
struct CountDecodeBlocks {
  const Device &device;
  int32_t &blocks;

  template <Format F, int D, int RowTiles, bool Dynamic, Order O> int run() {
    using Shape = DecodeShape<F, D, RowTiles, Dynamic, O>;
    const int each = Shape::kSharedBytes + kStaticShared<Shape> + kReservedShared;
    blocks = (device.max_shared_bytes + kReservedShared) / each;
    const int32_t most = Shape::blocks_on(device.compute_capability);
    if (blocks > most) blocks = most;
    return blocks > 0 ? QUANTKV_OK : QUANTKV_UNSUPPORTED;
  }
};

struct LaunchDecode {
  const AttentionParams &params;
  const WorkList &list;
  const Device &device;
  void *stream;

  // Dynamic shared memory of a block: so much that no more blocks than the plan counts on are resident. The next launch's
  // would take the places that are left, and multiprocessors would have more of them or fewer.
  template <class Shape> int shared_bytes() const {
    if constexpr (!Shape::kMayFitMore) return Shape::kSharedBytes;
    const int blocks = list.workers / device.multiprocessors;
    const int each = (device.max_shared_bytes + kReservedShared) / (blocks + 1) / 16 * 16 + 16;
    const int bytes = each - kStaticShared<Shape> / 16 * 16 - kReservedShared;
    return bytes > Shape::kSharedBytes ? bytes : Shape::kSharedBytes;
  }

  template <Format F, int D, int RowTiles, bool Dynamic, Order O> int run() {
    using Shape = DecodeShape<F, D, RowTiles, Dynamic, O>;
    return QKV_LAUNCH_IN_ORDER((paged_attention_decode<F, D, RowTiles, Dynamic, O>), (Grid{list.workers, 1, 1}),
                               Shape::kThreads, shared_bytes<Shape>(), stream, params, list);
  }
};

} // namespace quantkv

// What each format's file holds.
#define QKV_INSTANTIATE_DECODE(F, O)                                                                                   \
  namespace quantkv {                                                                                                  \
  template <> DecodeConfig decode_config_of<F, O>(const quantkv_paged_attention &op, const Device &device, int32_t rows) { \
    DecodeConfig config = {16, 0};                                                                                     \
    for (; config.max_rows > 0; config.max_rows -= 8) {                                                                \
      int32_t needed = rows < config.max_rows ? rows : config.max_rows;                                                \
      if (visit_decode<F, O>(op, config.max_rows, CountDecodeBlocks{device, config.blocks_per_multiprocessor}) != QUANTKV_OK) \
        continue;                                                                                                      \
      visit_decode<F, O>(op, needed, CountDecodeBlocks{device, config.blocks_per_multiprocessor});                     \
      return config;                                                                                                   \
    }                                                                                                                  \
    return DecodeConfig{0, 0};                                                                                         \
  }                                                                                                                    \
  template <>                                                                                                          \
  int launch_decode_of<F, O>(const AttentionParams &params, const WorkList &list, const Device &device, void *stream) { \
    return visit_decode<F, O>(params.op, list.rows, LaunchDecode{params, list, device, stream});                       \
  }                                                                                                                    \
  }
