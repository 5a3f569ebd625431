// adamw: an optimizer step of one weight in one pass over memory, and the sum of squares that clipping needs.
#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/numeric.h"
#include "tlf/rows.h"
#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kChunk = 1 << 14;             // elements of a task; sums of squares are added chunk by chunk
constexpr int64_t kRun = 1 << 10;               // elements that stay in the first-level cache
constexpr int64_t kGroup = 64;                  // elements that are computed together
constexpr int64_t kNext = 256;                  // elements ahead that are fetched; the hardware alone takes 7 % longer
constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

struct Settings {
  float factor, keep, grow1, beta2, grow2, scale, eps, step;
};

template <typename G>
TLF_INLINE void update_some(float* __restrict p, float* __restrict m, float* __restrict v, const G* __restrict grad,
                            int64_t n, const Settings& s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen(grad[i]) * s.factor;
    const float first = m[i] + (g - m[i]) * s.grow1;
    const float second = v[i] * s.beta2 + g * g * s.grow2;
    m[i] = first;
    v[i] = second;
    p[i] = p[i] * s.keep - s.step * first / (__builtin_sqrtf(second) * s.scale + s.eps);
  }
}

template <typename G>
TLF_INLINE void update(float* p, float* m, float* v, const G* grad, int64_t n, const Settings& s) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    for (int64_t k = i + kNext; k < i + kNext + kGroup; k += 16) {
      __builtin_prefetch(p + k, 1);
      __builtin_prefetch(m + k, 1);
      __builtin_prefetch(v + k, 1);
    }
    update_some(p + i, m + i, v + i, grad + i, kGroup, s);
  }
  update_some(p + i, m + i, v + i, grad + i, n - i, s);
}

// The upper half of p's bits after adding a threshold to them: see ops/adamw.py. first: index of p[0] in the weight.
TLF_INLINE void round_weights(const float* __restrict p, bf16* __restrict weight, int64_t n, int64_t first) {
  alignas(64) uint16_t rounded[kRun];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t hashed = static_cast<uint32_t>(first + i) * 0x9E3779B1u;
    hashed = (hashed ^ (hashed >> 15)) * 0x85EBCA77u;
    rounded[i] = static_cast<uint16_t>((float_to_bits(p[i]) + (hashed >> 16)) >> 16);
  }
  int64_t done = 0;
#if defined(TLF_AVX512BF16)
  // past the caches: the lines would be read only to be overwritten
  if (reinterpret_cast<uintptr_t>(weight) % 64 == 0) {
    for (; done + 32 <= n; done += 32) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(weight + done), _mm512_load_si512(rounded + done));
    }
  }
#endif
  if (done < n) __builtin_memcpy(weight + done, rounded + done, sizeof(uint16_t) * static_cast<size_t>(n - done));
}

template <typename G>
void update_all(float* p, float* m, float* v, bf16* weight, const G* grad, int64_t n, const Settings& s) {
  alignas(64) static constexpr G none[kRun] = {};
#pragma omp parallel for schedule(static) if (n > kParallelElements)
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t stop = least(n, at + kChunk);
    for (int64_t i = at; i < stop; i += kRun) {
      const int64_t size = least(kRun, stop - i);
      update(p + i, m + i, v + i, grad == nullptr ? none : grad + i, size, s);
      if (weight != nullptr) round_weights(p + i, weight + i, size, i);
    }
  }
}

template <typename T>
double square_sum_of(const T* x, int64_t n) {
  double lanes[kWidth] = {};
  for (int64_t at = 0; at < n; at += kRun) {
    Vec strands[4] = {};
    const int64_t size = least(kRun, n - at), whole = size / kGroup * kGroup;
    const T* from = x + at;
    for (int64_t i = 0; i < whole; i += kGroup) {
      for (int64_t k = 0; k < kGroup; k += kWidth) {
        const Vec value = load_row(from + i + k);
        strands[k / kWidth % 4] += value * value;
      }
    }
    const Vec sums = (strands[0] + strands[1]) + (strands[2] + strands[3]);
    for (int i = 0; i < kWidth; ++i) lanes[i] += static_cast<double>(sums[i]);
    for (int64_t i = whole; i < size; ++i) lanes[0] += static_cast<double>(widen(from[i])) * widen(from[i]);
  }
  double total = 0.0;
  for (int i = 0; i < kWidth; ++i) total += lanes[i];
  return total;
}

template <typename T>
void square_sum_all(const T* x, double* parts, int64_t n) {
#pragma omp parallel for schedule(static) if (n > kParallelElements)
  for (int64_t at = 0; at < n; at += kChunk) parts[at / kChunk] = square_sum_of(x + at, least(kChunk, n - at));
}

}  // namespace

// p, m, v [n] float32 and, unless null, weight [n] bfloat16 are updated; grad: [n] of dtype, null for zeros. factor
// multiplies the gradient, keep the weight; bias1 and bias2: 1 - beta^step.
void adamw(float* p, float* m, float* v, void* weight, const void* grad, int64_t n, int64_t dtype, double factor,
           double lr, double keep, double beta1, double beta2, double eps, double bias1, double bias2) {
  const Settings s{static_cast<float>(factor),      static_cast<float>(keep),
                   static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
                   static_cast<float>(1.0 - beta2), static_cast<float>(1.0 / __builtin_sqrt(bias2)),
                   static_cast<float>(eps),         static_cast<float>(lr / bias1)};
  if (dtype == kBFloat16) {
    update_all(p, m, v, static_cast<bf16*>(weight), static_cast<const bf16*>(grad), n, s);
  } else {
    update_all(p, m, v, static_cast<bf16*>(weight), static_cast<const float*>(grad), n, s);
  }
}

// parts: one sum for each kChunk elements of x [n]; their order does not depend on the number of threads.
void square_sum(const void* x, double* parts, int64_t n, int64_t dtype) {
  if (dtype == kBFloat16) {
    square_sum_all(static_cast<const bf16*>(x), parts, n);
  } else {
    square_sum_all(static_cast<const float*>(x), parts, n);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(adamw);
TLF_KERNEL(square_sum);
