// Powers of two by their bits: conversions are most of the emulator's time.
#pragma once
#include <bit>
#include <stdint.h>

inline float power_f32(int exponent) { return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23); }
inline double power_f64(int exponent) { return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52); }
