// What the device can do at most, for benches to divide by: a plain read, a plain copy, an empty kernel. And a fill with
// random numbers of any storage format, since gigabytes of cache are faster made there than uploaded.
//
// Not part of the library: scripts/gpu.sh and benches/cuda compile it to a shared library of its own, through the same
// seam as the kernels, so that it runs in the emulator too.
#include "core/launch.h"
#include "core/prim.h"

namespace quantkv {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4; // 64 bytes in flight a thread, 128 KB an SM with 8 blocks

// sum: never written (the words' exclusive or is not that constant), but the compiler cannot know.
QKV_KERNEL void read_kernel(const Words<4> *words, int64_t count, uint32_t *sink) {
  int64_t stride = static_cast<int64_t>(grid_size_x()) * kThreads;
  uint32_t sum = 0;
  int64_t i = static_cast<int64_t>(block_index_x()) * kThreads + thread_index();
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    Words<4> r[kUnroll];
    QKV_UNROLL
    for (int u = 0; u < kUnroll; u++) r[u] = load_stream(words + i + u * stride);
    QKV_UNROLL
    for (int u = 0; u < kUnroll; u++) sum ^= r[u].w[0] ^ r[u].w[1] ^ r[u].w[2] ^ r[u].w[3];
  }
  for (; i < count; i += stride) {
    Words<4> r = load_stream(words + i);
    sum ^= r.w[0] ^ r.w[1] ^ r.w[2] ^ r.w[3];
  }
  if (sum == 0x9e3779b9u) *sink = sum;
}

QKV_KERNEL void copy_kernel(Words<4> *dst, const Words<4> *src, int64_t count) {
  int64_t stride = static_cast<int64_t>(grid_size_x()) * kThreads;
  int64_t i = static_cast<int64_t>(block_index_x()) * kThreads + thread_index();
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    Words<4> r[kUnroll];
    QKV_UNROLL
    for (int u = 0; u < kUnroll; u++) r[u] = src[i + u * stride];
    QKV_UNROLL
    for (int u = 0; u < kUnroll; u++) dst[i + u * stride] = r[u];
  }
  for (; i < count; i += stride) dst[i] = src[i];
}

QKV_KERNEL void empty_kernel(int) {
  wait_for_previous_kernel();
  allow_next_kernel();
}

QKV_DEVICE uint32_t mix(uint64_t index, uint32_t seed) {
  uint32_t h = static_cast<uint32_t>(index) * 2654435761u ^ static_cast<uint32_t>(index >> 32) * 2246822519u ^ seed;
  h ^= h >> 16;
  h *= 2246822519u;
  h ^= h >> 13;
  h *= 3266489917u;
  return h ^ h >> 16;
}

// A number in (-1, 1), as stored: FP8 codes of magnitude below one are all but equally likely.
QKV_DEVICE float uniform(uint32_t h) { return static_cast<float>(static_cast<int32_t>(h)) * 4.6566128e-10f; }

QKV_KERNEL void fill_kernel(uint8_t *bytes, int64_t elements, int32_t format, uint32_t seed) {
  int64_t stride = static_cast<int64_t>(grid_size_x()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index_x()) * kThreads + thread_index(); i < elements; i += stride) {
    uint32_t h = mix(static_cast<uint64_t>(i), seed);
    switch (static_cast<Format>(format)) {
    case Format::F32: reinterpret_cast<float *>(bytes)[i] = uniform(h); break;
    case Format::F16: reinterpret_cast<f16 *>(bytes)[i] = to_f16(uniform(h)); break;
    case Format::BF16: reinterpret_cast<bf16 *>(bytes)[i] = to_bf16(uniform(h)); break;
    case Format::E4M3: bytes[i] = static_cast<uint8_t>((h >> 24 & 0x80) | (h & 0xffff) % 0x38); break;
    case Format::E5M2: bytes[i] = static_cast<uint8_t>((h >> 24 & 0x80) | (h & 0xffff) % 0x3c); break;
    case Format::E4M3Fnuz: bytes[i] = static_cast<uint8_t>((h >> 24 & 0x80) | (1 + (h & 0xffff) % 0x3f)); break;
    }
  }
}

// `blocks` a multiprocessor.
int grid_of(int blocks, int64_t work, Grid &grid) {
  Device device = {};
  int status = current_device(device);
  int64_t wanted = ceil_div(work, kThreads), most = static_cast<int64_t>(device.multiprocessors) * blocks;
  grid = Grid{wanted < most ? wanted : most, 1, 1};
  return status;
}

} // namespace
} // namespace quantkv

extern "C" {

// Reads `bytes` (a multiple of 16; `data` aligned to 16) once. `sink`: device, one word, not written.
QUANTKV_API int quantkv_bench_read(const void *data, int64_t bytes, void *sink, int blocks_per_sm, void *stream) {
  using namespace quantkv;
  Grid grid = {};
  int status = grid_of(blocks_per_sm, bytes / 16, grid);
  if (status != QUANTKV_OK) return status;
  return QKV_LAUNCH((read_kernel), grid, kThreads, 0, stream, static_cast<const Words<4> *>(data), bytes / 16,
                    static_cast<uint32_t *>(sink));
}

// Copies `bytes` (a multiple of 16): twice as much traffic.
QUANTKV_API int quantkv_bench_copy(void *dst, const void *src, int64_t bytes, int blocks_per_sm, void *stream) {
  using namespace quantkv;
  Grid grid = {};
  int status = grid_of(blocks_per_sm, bytes / 16, grid);
  if (status != QUANTKV_OK) return status;
  return QKV_LAUNCH((copy_kernel), grid, kThreads, 0, stream, static_cast<Words<4> *>(dst),
                    static_cast<const Words<4> *>(src), bytes / 16);
}

// One block a multiprocessor that does nothing; `overlapped`: by programmatic dependent launch.
QUANTKV_API int quantkv_bench_empty(int overlapped, void *stream) {
  using namespace quantkv;
  Grid grid = {};
  int status = grid_of(1, int64_t{1} << 30, grid);
  if (status != QUANTKV_OK) return status;
  return overlapped != 0 ? QKV_LAUNCH_OVERLAPPED((empty_kernel), grid, kThreads, 0, stream, 0)
                         : QKV_LAUNCH((empty_kernel), grid, kThreads, 0, stream, 0);
}

// Random numbers in (-1, 1) in a quantkv_format; no NaN, no infinity.
QUANTKV_API int quantkv_bench_fill(void *data, int64_t elements, int32_t format, uint32_t seed, void *stream) {
  using namespace quantkv;
  Grid grid = {};
  int status = grid_of(8, elements, grid);
  if (status != QUANTKV_OK) return status;
  return QKV_LAUNCH((fill_kernel), grid, kThreads, 0, stream, static_cast<uint8_t *>(data), elements, format, seed);
}
}
