#include "check.h"

int main() {
  for (uint64_t order = 0; order < 6; order++) {
    quantkv_simt_set_order(order);
    tests::test_platform();
  }
  quantkv_simt_set_order(0);
  tests::test_orders();
  tests::test_faults();
  printf("simt: %d checks, %d failed\n", tests::checks, tests::failures);
  return tests::failures == 0 ? 0 : 1;
}
