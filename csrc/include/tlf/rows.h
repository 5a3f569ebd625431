// Rows of float32, bfloat16 or float16 as vectors of float: kWidth elements at a time, then one at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {

struct half {
  uint16_t bits;
};

typedef uint32_t WordVec __attribute__((vector_size(kWidth * 4), may_alias));
typedef uint16_t ShortVec __attribute__((vector_size(kWidth * 2), may_alias, aligned(2)));

TLF_INLINE float widen(half x) {
  const uint32_t size = (x.bits & 0x7fffu) << 13;
  uint32_t bits;
  const float scale = 5.192296858534828e33f;  // 2^112, the distance of the two exponents' zeros; exact for denormals
  float value;
  std::memcpy(&value, &size, 4);
  value *= scale;
  std::memcpy(&bits, &value, 4);
  if (size >= 0x0f800000u) bits = size | 0x7f800000u;  // infinity and nan
  bits |= (x.bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}
TLF_INLINE void narrow(float x, half* out) {  // round to nearest even; nan stays nan
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t result;
  if (size > 0x7f800000u) {
    result = 0x7e00u;
  } else if (size >= 0x47800000u) {  // 2^16 and more
    result = 0x7c00u;
  } else if (size < 0x38800000u) {  // less than 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits
    float shifted;
    std::memcpy(&shifted, &size, 4);
    shifted += 0.5f;
    std::memcpy(&result, &shifted, 4);
    result -= 0x3f000000u;
  } else {
    result = (size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | result);
}

TLF_INLINE Vec load_row(const float* p) { return load(p); }
TLF_INLINE Vec load_row(const bf16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const ShortVec*>(p), WordVec) << 16);
}
TLF_INLINE Vec load_row(const half* p) {
#if defined(TLF_AVX512)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(TLF_ISA_IS_avx2)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = widen(p[i]);
  return x;
#endif
}

TLF_INLINE void store_row(float* p, Vec x) { store(p, x); }
TLF_INLINE void store_row(bf16* p, Vec x) {
#if defined(TLF_AVX512BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const WordVec bits = (WordVec)x;
  const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec nan = WordVec{} + 0x7fc0u;
  *reinterpret_cast<ShortVec*>(p) = __builtin_convertvector(x == x ? rounded : nan, ShortVec);
#endif
}
TLF_INLINE void store_row(half* p, Vec x) {
#if defined(TLF_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(TLF_ISA_IS_avx2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) narrow(x[i], p + i);
#endif
}

TLF_INLINE float sum(Vec x) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

}  // namespace TLF_ISA
}  // namespace tlf
