// A stand-in for librocblas.so.5: the functions that this crate loads, with the ABI of rocBLAS 3 to 5, over whatever
// libamdhip64.so.7 this process has. Products are sums in f64, rounded to f32 and then to their type.
//
//   handles    keep a stream that the runtime must know, and a workspace on the device
//   matrices   must have types that go together, leading dimensions that are long enough, and lie in one allocation each
//              with all their bytes; C may be D, and else neither may overlap another
//   numbers    the real library's (rocblas-types.h). What is refused is said on standard error; a handle destroyed when
//              it must not be ends the process, since nobody looks at that answer
//
// QUANTKV_AMD_GEMM_STATUS: every product answers this status and computes nothing.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mutex>
#include <set>

extern "C" {
int hipMalloc(void **pointer, size_t bytes);
int hipFree(void *pointer);
int hipStreamIsCapturing(void *stream, int *status);
int hipMemGetAddressRange(void **start, size_t *bytes, void *pointer);
}

namespace {

enum : int {
  Success = 0,
  InvalidHandle = 1,
  NotImplemented = 2,
  InvalidPointer = 3,
  InvalidSize = 4,
  MemoryError = 5,
  InvalidValue = 11,
};
enum : int { F16 = 150, F32 = 151, BF16 = 168 };
enum : int { None = 111, Transpose = 112 };

constexpr size_t kWorkspace = 1 << 16;

struct Handle {
  void *stream = nullptr;
  void *workspace = nullptr;
  bool has_stream = false; // else the null stream, in no order with this crate's own
  bool atomics = true;
};

std::mutex handle_lock;
std::set<Handle *> handles;

Handle *find(void *pointer) {
  std::lock_guard<std::mutex> lock(handle_lock);
  const auto found = handles.find(static_cast<Handle *>(pointer));
  return found == handles.end() ? nullptr : *found;
}

int refuse(int status, const char *why) {
  fprintf(stderr, "rocblas: %s\n", why);
  return status;
}

// ---- elements

size_t size_of(int type) { return type == F32 ? 4 : 2; }

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float read(int type, const void *matrix, size_t at) {
  if (type == F32) return static_cast<const float *>(matrix)[at];
  const uint16_t bits = static_cast<const uint16_t *>(matrix)[at];
  if (type == BF16) return float_of(uint32_t{bits} << 16);
  // f16: its exponent is 112 less; f32 has infinities and NaN at the top, and subnormals as multiples of 2^-24.
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// Rounds to nearest even: adds just under half of the last place that is kept, and half if that is odd.
uint32_t rounded_shift(uint32_t value, int shift) {
  return (value + (1u << (shift - 1)) - 1 + (value >> shift & 1)) >> shift;
}

void write(int type, void *matrix, size_t at, float x) {
  if (type == F32) {
    static_cast<float *>(matrix)[at] = x;
    return;
  }
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t narrow;
  if (magnitude > 0x7f800000) {
    narrow = type == BF16 ? 0x7fc0 : 0x7e00;
  } else if (type == BF16) {
    narrow = rounded_shift(magnitude, 16);
  } else if (magnitude >= 0x47800000) { // 65536
    narrow = 0x7c00;
  } else if (magnitude >= 0x38800000) { // 2^-14; above 65519 it becomes infinite by itself
    narrow = rounded_shift(magnitude - (112u << 23), 13);
  } else {
    narrow = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); // f32's unit there is 2^-24
  }
  static_cast<uint16_t *>(matrix)[at] = static_cast<uint16_t>(sign | narrow);
}

// ---- matrices

struct Matrix {
  const char *name;
  const void *data;
  int type;
  size_t rows, columns, leading; // as it lies in memory, columns one after another
};

const char *bytes_of(const Matrix &matrix, size_t &bytes) {
  bytes = (matrix.leading * (matrix.columns - 1) + matrix.rows) * size_of(matrix.type);
  return static_cast<const char *>(matrix.data);
}

bool overlap(const Matrix &a, const Matrix &b) {
  size_t a_bytes, b_bytes;
  const char *a_data = bytes_of(a, a_bytes), *b_data = bytes_of(b, b_bytes);
  return a_data < b_data + b_bytes && b_data < a_data + a_bytes;
}

// Whether it lies on the device, whole, in one allocation.
bool is_allocated(const Matrix &matrix) {
  size_t bytes, length;
  const char *data = bytes_of(matrix, bytes);
  void *start;
  if (reinterpret_cast<uintptr_t>(data) % size_of(matrix.type) != 0) return false;
  if (hipMemGetAddressRange(&start, &length, const_cast<char *>(data)) != 0) return false;
  return static_cast<size_t>(data - static_cast<char *>(start)) + bytes <= length;
}

bool go_together(int a, int b, int c, int d) {
  if (a != b || c != d) return false;
  return a == F32 ? c == F32 : (a == F16 || a == BF16) && (c == a || c == F32);
}

} // namespace

#define ROCBLAS extern "C" __attribute__((visibility("default")))

ROCBLAS int rocblas_create_handle(void **handle) {
  if (handle == nullptr) return InvalidHandle;
  auto made = new Handle;
  if (hipMalloc(&made->workspace, kWorkspace) != 0) {
    delete made;
    return MemoryError;
  }
  std::lock_guard<std::mutex> lock(handle_lock);
  handles.insert(made);
  *handle = made;
  return Success;
}

ROCBLAS int rocblas_destroy_handle(void *handle) {
  Handle *found = find(handle);
  int capturing;
  if (found == nullptr || hipStreamIsCapturing(found->stream, &capturing) != 0 || hipFree(found->workspace) != 0) {
    refuse(InvalidHandle, "destroys what is no handle, or one that outlived its stream");
    abort();
  }
  std::lock_guard<std::mutex> lock(handle_lock);
  handles.erase(found);
  delete found;
  return Success;
}

ROCBLAS int rocblas_set_stream(void *handle, void *stream) {
  Handle *found = find(handle);
  if (found == nullptr) return refuse(InvalidHandle, "no handle");
  int capturing;
  if (hipStreamIsCapturing(stream, &capturing) != 0) return refuse(InvalidValue, "a stream that the runtime does not know");
  found->stream = stream;
  found->has_stream = true;
  return Success;
}

ROCBLAS int rocblas_set_atomics_mode(void *handle, int mode) {
  Handle *found = find(handle);
  if (found == nullptr) return refuse(InvalidHandle, "no handle");
  if (mode != 0 && mode != 1) return refuse(InvalidValue, "no mode of atomics");
  found->atomics = mode == 1;
  return Success;
}

ROCBLAS const char *rocblas_status_to_string(int status) {
  switch (status) {
  case Success: return "rocblas_status_success";
  case InvalidHandle: return "rocblas_status_invalid_handle";
  case NotImplemented: return "rocblas_status_not_implemented";
  case InvalidPointer: return "rocblas_status_invalid_pointer";
  case InvalidSize: return "rocblas_status_invalid_size";
  case MemoryError: return "rocblas_status_memory_error";
  case InvalidValue: return "rocblas_status_invalid_value";
  default: return "<undefined rocblas_status value>";
  }
}

ROCBLAS int rocblas_gemm_ex(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a,
                            int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, const void *c,
                            int c_type, int ldc, void *d, int d_type, int ldd, int compute_type, int algo, int solution,
                            unsigned flags) {
  const Handle *found = find(handle);
  if (found == nullptr) return refuse(InvalidHandle, "no handle");
  if (const char *status = getenv("QUANTKV_AMD_GEMM_STATUS")) return atoi(status);
  int capturing;
  if (hipStreamIsCapturing(found->stream, &capturing) != 0) return refuse(InvalidHandle, "the handle's stream is gone");
  if (!found->has_stream) return refuse(InvalidValue, "the handle was given no stream");
  if (found->atomics) return refuse(InvalidValue, "sums by atomics differ from run to run; this crate wants none");
  if ((trans_a != None && trans_a != Transpose) || (trans_b != None && trans_b != Transpose) || algo != 0 ||
      solution != 0 || flags != 0 || compute_type != F32) {
    return refuse(InvalidValue, "an operation, algorithm, flag or compute type that is not known here");
  }
  if (!go_together(a_type, b_type, c_type, d_type)) return refuse(NotImplemented, "types that do not go together");
  if (m < 0 || n < 0 || k < 0) return refuse(InvalidSize, "a negative size");
  if (m == 0 || n == 0) return Success;
  if (alpha == nullptr || beta == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr) {
    return refuse(InvalidPointer, "a null pointer");
  }
  if (lda < (trans_a == None ? m : k) || ldb < (trans_b == None ? k : n) || ldc < m || ldd < m || k == 0) {
    return refuse(InvalidSize, "a leading dimension shorter than a column, or nothing to sum");
  }
  const auto wide = [](int x) { return static_cast<size_t>(x); };
  const Matrix left = {"A", a, a_type, wide(trans_a == None ? m : k), wide(trans_a == None ? k : m), wide(lda)};
  const Matrix right = {"B", b, b_type, wide(trans_b == None ? k : n), wide(trans_b == None ? n : k), wide(ldb)};
  const Matrix before = {"C", c, c_type, wide(m), wide(n), wide(ldc)}, after = {"D", d, d_type, wide(m), wide(n), wide(ldd)};
  for (const Matrix &matrix : {left, right, before, after}) {
    if (!is_allocated(matrix)) {
      fprintf(stderr, "rocblas: %s is not in one allocation of the device\n", matrix.name);
      return InvalidPointer;
    }
  }
  if (overlap(after, left) || overlap(after, right) || (c == d ? ldc != ldd : overlap(before, after))) {
    return refuse(InvalidValue, "matrices that overlap");
  }
  const float scale = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
  const size_t a_row = trans_a == None ? 1 : left.leading, a_term = trans_a == None ? left.leading : 1;
  const size_t b_term = trans_b == None ? 1 : right.leading, b_column = trans_b == None ? right.leading : 1;
  for (size_t column = 0; column < after.columns; column++) {
    for (size_t row = 0; row < after.rows; row++) {
      double sum = 0;
      for (size_t term = 0; term < wide(k); term++) {
        sum += double{read(a_type, a, row * a_row + term * a_term)} * read(b_type, b, term * b_term + column * b_column);
      }
      sum *= scale;
      // C is not read where beta is 0.
      if (keep != 0) sum += double{keep} * read(c_type, c, row + column * before.leading);
      write(d_type, d, row + column * after.leading, static_cast<float>(sum));
    }
  }
  return Success;
}
