// bfloat16 and exp for kernel code, written so that the compiler vectorizes the loops that call them.
//
// Everything lives in tlf::TLF_ISA: each pass has its own copies, and no AVX-512 inline can be linked into the
// baseline pass (see kernel.h).
#pragma once

#include <cstdint>

#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {

struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

inline void store(float* target, float value) { *target = value; }

// Round to nearest even; NaN stays NaN (adding the rounding term could carry it to infinity or zero).
inline void store(BFloat16* target, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  target->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp(x) to 2 ulp for x in [-87, 88]; smaller arguments give exp(-87) ~ 1e-38, NaN gives NaN.
inline float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;  // ln 2 in two parts (Cody-Waite)
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
}

// tanh(x) to 2 ulp: a series near zero (Cephes tanhf), where the exponential form would cancel. NaN gives NaN.
inline float tanh_fast(float x) {
  const float size = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = x + x * square * p;
  const float far = 1.0f - 2.0f / (exp_fast(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace TLF_ISA
}  // namespace tlf
