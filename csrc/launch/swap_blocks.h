// swap_blocks: copies by the device's copy engines, no kernel. Batches are cut to what fits on the stack.
#pragma once
#include "../core/check.h"
#include "../core/launch.h"

namespace {
constexpr size_t kBatch = 512;
}

int QKV_ENTRY(swap_blocks)(const quantkv_memory_copy *copies, size_t num_copies, quantkv_stream stream) {
  using namespace quantkv;
  if (num_copies == 0) return QUANTKV_OK;
  if (copies == nullptr) return QUANTKV_INVALID_ARGUMENT;
  for (size_t i = 0; i < num_copies; i++) {
    const quantkv_memory_copy &copy = copies[i];
    QKV_CHECK(valid_if(copy.bytes >= 0 && (copy.bytes == 0 || (copy.dst != nullptr && copy.src != nullptr))));
  }
  bool batched = stream != nullptr; // there is no batch on the default stream
  void *dst[kBatch];
  const void *src[kBatch];
  size_t bytes[kBatch];
  for (size_t next = 0; next < num_copies;) {
    size_t count = 0;
    for (; next < num_copies && count < kBatch; next++) {
      if (copies[next].bytes == 0) continue;
      dst[count] = copies[next].dst;
      src[count] = copies[next].src;
      bytes[count] = static_cast<size_t>(copies[next].bytes);
      count++;
    }
    if (count == 0) break;
    if (batched) {
      const int status = copy_memory_batch(dst, src, bytes, count, stream);
      if (status == QUANTKV_OK) continue;
      if (status != QUANTKV_UNSUPPORTED) return status;
      batched = false;
    }
    for (size_t i = 0; i < count; i++) QKV_CHECK(copy_memory(dst[i], src[i], bytes[i], stream));
  }
  return QUANTKV_OK;
}
