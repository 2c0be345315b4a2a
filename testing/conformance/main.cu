// Runs the conformance tests: conformance [--step N] [words]. Exit status 0: all as documented; 1: something is not.
//   --step N   in sweeps over all f32, take every N-th (default: all on a device, a prime near 10^4 in the emulator)
//   words      of: arithmetic conversions fp8 matrix memory hopper
#include "harness.h"

namespace conformance {

QKV_KERNEL void features_kernel(Features *out) {
  if (thread_index() == 0) *out = Features{QKV_HAS_FP8_CONVERSION, QKV_HAS_TENSOR_CORES};
}

Features features() {
  Array<Features> out(1);
  Grid grid{1, 1, 1};
  check(QKV_LAUNCH((features_kernel), grid, 32, 0, nullptr, out.get()), "features");
  return out.read()[0];
}

} // namespace conformance

int main(int argc, char **argv) {
  using namespace conformance;
#if defined(QUANTKV_SIMT)
  uint64_t step = 10007;
#else
  uint64_t step = 1;
#endif
  std::vector<std::string> words;
  for (int i = 1; i < argc; i++) {
    if (std::string(argv[i]) == "--step" && i + 1 < argc) {
      step = std::strtoull(argv[++i], nullptr, 10);
      if (step == 0) step = 1;
    } else {
      words.push_back(argv[i]);
    }
  }
  Device device = {};
  int status = current_device(device);
  if (status == QUANTKV_NO_DEVICE) {
    std::printf("skipped: no CUDA device\n");
    return 0;
  }
  check(status, "the device");
  Features has = features();
  std::printf("compute capability %d, %d multiprocessors, FP8 instructions %d, tensor cores %d, every %lluth f32\n",
              device.compute_capability, device.multiprocessors, has.fp8, has.tensor_cores,
              static_cast<unsigned long long>(step));
  const struct {
    const char *name;
    void (*run)(Report &, uint64_t);
  } tests[] = {{"arithmetic", test_arithmetic}, {"conversions", test_conversions}, {"fp8", test_fp8},
               {"matrix", test_matrix},         {"memory", test_memory},
               {"hopper", test_hopper}};
  Report report;
  for (const auto &test : tests) {
    bool wanted = words.empty();
    for (const auto &word : words) wanted = wanted || word == test.name;
    if (wanted) test.run(report, step);
  }
  std::printf("%llu checks, %llu failed\n", static_cast<unsigned long long>(report.checks),
              static_cast<unsigned long long>(report.failed));
  return report.failed == 0 && report.checks != 0 ? 0 : 1;
}
