// exp, 1/sqrt, sine and cosine from the few instructions of prim.h, so that every platform has the same ones.
// Errors: exp and inverse_sqrt about 2 ulp of f32; sine and cosine below 1 ulp, at any angle an f32 can tell apart.
#pragma once
#include "../../core/prim.h"

namespace quantkv {
namespace decoder {

// e^x for |x| below about 87; beyond, e^87 or e^-87. NaN stays NaN.
QKV_DEVICE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLog2ETail = 1.92596299e-8f, kLn2 = 0.693147181f;
  x = x > 87.0f ? 87.0f : x < -87.0f ? -87.0f : x;
  float exponent = multiply(x, kLog2E);
  // What rounding the exponent lost: of an exponent of 100, half an ulp is 4e-6 of the result.
  float lost = fused_multiply_add(x, kLog2E, -exponent) + x * kLog2ETail;
  return exp2_approx(exponent) * fused_multiply_add(lost, kLn2, 1.0f);
}

// 1 / sqrt(x): a power of two's worth of precision by exp2 and log2, the rest by one Newton step.
QKV_DEVICE float inverse_sqrt(float x) {
  float y = exp2_approx(-0.5f * log2_approx(x));
  return y * (1.5f - 0.5f * x * y * y);
}

// Reduces to a quarter turn in f64, where k * (pi/2) has 20 bits to spare for k, then sums Taylor's terms, whose
// remainder at pi/4 is below 2e-10.
QKV_DEVICE void sine_cosine(float angle, float &sine, float &cosine) {
  constexpr double kTwoOverPi = 0.63661977236758134308;
  constexpr double kHalfPi = 1.57079632673412561417e+00, kHalfPiTail = 6.07710050650619224932e-11;
  constexpr double kRound = 6755399441055744.0; // 1.5 * 2^52: adding it rounds to a whole number
  double x = angle;
  if (!(x > -1e15 && x < 1e15)) { // infinite, NaN, or a turn is less than an ulp
    sine = angle - angle;
    cosine = 1.0f + (angle - angle);
    return;
  }
  double k = (x * kTwoOverPi + kRound) - kRound;
  double r = (x - k * kHalfPi) - k * kHalfPiTail, z = r * r;
  double s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z / 39916800))));
  double c = 1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 - z / 3628800))));
  int quadrant = static_cast<int>(static_cast<int64_t>(k) & 3);
  double sin_value = quadrant & 1 ? c : s, cos_value = quadrant & 1 ? s : c;
  sine = static_cast<float>(quadrant & 2 ? -sin_value : sin_value);
  cosine = static_cast<float>(quadrant == 1 || quadrant == 2 ? -cos_value : cos_value);
}

} // namespace decoder
} // namespace quantkv
