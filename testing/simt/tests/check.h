// The shim's own tests: small kernels with answers known beforehand. The instructions of prim.h are tested by
// testing/conformance, which runs on hardware as well; here is what only the shim has (orders, faults, poison) and the
// functions of platform.h.
#pragma once
#include "core/launch.h"
#include "core/prim_hopper.h"

#include <stdio.h>
#include <string.h>

namespace tests {

using namespace quantkv;

inline int failures = 0;
inline int checks = 0;

inline void check(bool good, const char *what, const char *file, int line) {
  checks++;
  if (good) return;
  failures++;
  printf("%s:%d: wrong: %s\n", file, line, what);
}
#define CHECK(condition) tests::check((condition), #condition, __FILE__, __LINE__)

constexpr Grid kOneBlock = {1, 1, 1};

// What a kernel left where it wrote nothing, or read from shared memory before anyone wrote.
inline bool is_poison(float x) { return bits_of(x) == 0xffffffffu; }

void test_platform(); // in every order
void test_orders();
void test_faults();

} // namespace tests
