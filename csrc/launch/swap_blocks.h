// swap_blocks. Between device memory and page-locked host memory small blocks are copied by a kernel (ops/swap_blocks.h), of CUDA's
// library; all else by the device's copy engines. Lists are cut to what fits on the stack, or a kernel's parameters.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"
#if !defined(__HIP__)
#include "../ops/swap_blocks.h"
#endif

namespace quantkv {

// Copies for the copy engines.
class EngineCopies {
  static constexpr size_t kMost = 512;
  void *dst[kMost];
  const void *src[kMost];
  size_t bytes[kMost];
  size_t count = 0;
  quantkv_stream stream;
  bool batched;

public:
  explicit EngineCopies(quantkv_stream stream) : stream(stream), batched(stream != nullptr) {} // the default stream has no batch

  int add(const quantkv_memory_copy &copy) {
    dst[count] = copy.dst;
    src[count] = copy.src;
    bytes[count++] = static_cast<size_t>(copy.bytes);
    return count == kMost ? flush() : QUANTKV_OK;
  }

  int flush() {
    const size_t listed = count;
    count = 0;
    if (listed == 0) return QUANTKV_OK;
    if (batched) {
      const int status = copy_memory_batch(dst, src, bytes, listed, stream);
      if (status != QUANTKV_UNSUPPORTED) return status;
      batched = false;
    }
    for (size_t i = 0; i < listed; i++) QKV_CHECK(copy_memory(dst[i], src[i], bytes[i], stream));
    return QUANTKV_OK;
  }
};

#if defined(__HIP__)

class KernelCopies {
public:
  explicit KernelCopies(quantkv_stream) {}
  bool takes(const quantkv_memory_copy &) const { return false; }
  int add(const quantkv_memory_copy &) { return QUANTKV_OK; }
  int flush() { return QUANTKV_OK; }
};

#else

// What memory addresses are of. The driver is asked once for what was allocated in one piece: pools are few and copies many.
class KnownMemory {
  static constexpr int kMost = 64;
  MemoryRange ranges[kMost];
  int count = 0, next = 0; // the one to be forgotten first, if there are kMost
  int last = 0;            // asked for
  AddressTables tables;

public:
  explicit KnownMemory(const AddressTables &tables) : tables(tables) {}

  // Of all of [address, address + bytes).
  Memory of(const void *address, size_t bytes) {
    // Copies go through layers in turn, or stay with one.
    for (int i = 0; i < count; i++) {
      const int at = last + i < count ? last + i : last + i - count;
      if (!ranges[at].has(address, bytes)) continue;
      last = at;
      return ranges[at].kind;
    }
    const MemoryRange range = memory_around(address, tables);
    if (!range.has(address, bytes)) return Memory::Other;
    last = next;
    next = (next + 1) % kMost;
    if (count < kMost) count++;
    ranges[last] = range;
    return range.kind;
  }
};

// Copies for the kernel. The first lists are short, so that the first copies are under way while the others are looked at.
class KernelCopies {
  // Of larger copies the engines are as fast, and twice as fast both ways at a time.
  static constexpr int64_t kLargest = 128 * 1024;
  SwapList list;
  int64_t longest = 0;
  int32_t most = 16;
  quantkv_stream stream;
  KnownMemory from_memory, to_memory;

public:
  explicit KernelCopies(quantkv_stream stream, const AddressTables &tables = address_tables())
      : stream(stream), from_memory(tables), to_memory(tables) {
    list.count = 0;
  }

  bool takes(const quantkv_memory_copy &copy) {
    if (copy.bytes > kLargest || copy.bytes % 16 != 0 || !is_aligned(copy.dst, 16) || !is_aligned(copy.src, 16)) return false;
    const size_t bytes = static_cast<size_t>(copy.bytes);
    const Memory from = from_memory.of(copy.src, bytes), to = to_memory.of(copy.dst, bytes);
    return (from == Memory::Host && to == Memory::Device) || (from == Memory::Device && to == Memory::Host);
  }

  int add(const quantkv_memory_copy &copy) {
    list.copies[list.count++] = copy;
    if (copy.bytes > longest) longest = copy.bytes;
    return list.count == most ? flush() : QUANTKV_OK;
  }

  int flush() {
    if (list.count == 0) return QUANTKV_OK;
    list.pieces = static_cast<int32_t>(ceil_div(longest, int64_t{kSwapThreads} * kCopyVectors * 16));
    const int status = QKV_LAUNCH((swap_listed_blocks), (Grid{kSwapBlocks, 1, 1}), kSwapThreads, 0, stream, list);
    list.count = 0;
    longest = 0;
    if (most < kSwapCopies) most = 4 * most < kSwapCopies ? 4 * most : kSwapCopies;
    return status;
  }
};

#endif

} // namespace quantkv

int QKV_ENTRY(swap_blocks)(const quantkv_memory_copy *copies, size_t num_copies, quantkv_stream stream) {
  using namespace quantkv;
  if (num_copies == 0) return QUANTKV_OK;
  if (copies == nullptr) return QUANTKV_INVALID_ARGUMENT;
  for (size_t i = 0; i < num_copies; i++) {
    const quantkv_memory_copy &copy = copies[i];
    QKV_CHECK(valid_if(copy.bytes >= 0 && (copy.bytes == 0 || (copy.dst != nullptr && copy.src != nullptr))));
  }
  EngineCopies by_engine(stream);
  KernelCopies by_kernel(stream);
  for (size_t i = 0; i < num_copies; i++) {
    if (copies[i].bytes == 0) continue;
    QKV_CHECK(by_kernel.takes(copies[i]) ? by_kernel.add(copies[i]) : by_engine.add(copies[i]));
  }
  QKV_CHECK(by_engine.flush());
  return by_kernel.flush();
}
