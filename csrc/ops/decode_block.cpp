// decode_block: what lies between the products of a Llama-style decoder layer, a call each instead of a dozen.
#include <cstdint>

#include "tlf/attention_simd.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

template <typename T>
TLF_INLINE float rounded_to(float x) {
  T value;
  narrow(x, &value);
  return widen(value);
}

template <typename T>
void norm_rows(const T* x, const T* weight, float eps, T* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
  for (int64_t n = 0; n < rows; ++n) {
    const T* from = x + n * columns;
    T* to = y + n * columns;
    float parts[kWidth] = {};  // as many sums side by side as a vector holds
    const int64_t whole = columns / kWidth * kWidth;
    for (int64_t k = 0; k < whole; k += kWidth) {
      for (int i = 0; i < kWidth; ++i) parts[i] += widen(from[k + i]) * widen(from[k + i]);
    }
    float squares = 0.0f;
    for (int64_t k = whole; k < columns; ++k) squares += widen(from[k]) * widen(from[k]);
    for (int i = 0; i < kWidth; ++i) squares += parts[i];
    const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(columns) + eps);
    for (int64_t k = 0; k < columns; ++k) narrow(widen(weight[k]) * rounded_to<T>(widen(from[k]) * factor), to + k);
  }
}

template <typename T>
void rotate_head(const T* x, const T* cosine, const T* sine, T* y, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = widen(x[i]), b = widen(x[half + i]);
    narrow(a * widen(cosine[i]) - b * widen(sine[i]), y + i);
    narrow(b * widen(cosine[half + i]) + a * widen(sine[half + i]), y + half + i);
  }
}

template <typename T>
void gate_rows(const T* x, T* y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > kParallelElements)
  for (int64_t n = 0; n < rows; ++n) {
    const T *gate = x + 2 * n * width, *up = gate + width;
    T* to = y + n * width;
    const auto open = [&](int64_t k, int count) {
      Vec g = {};
      for (int i = 0; i < count; ++i) g[i] = widen(gate[k + i]);
      const Vec opened = g / (1.0f + exp2v(-kLog2e * g));
      for (int i = 0; i < count; ++i) narrow(rounded_to<T>(opened[i]) * widen(up[k + i]), to + k + i);
    };
    int64_t k = 0;
    for (; k + kWidth <= width; k += kWidth) open(k, kWidth);  // a constant count becomes vectors
    if (k < width) open(k, static_cast<int>(width - k));
  }
}

}  // namespace

// x, y: [rows, columns]; weight: [columns]
void rms_norm(const void* x, const void* weight, double eps, void* y, int64_t rows, int64_t columns, int64_t dtype) {
  if (dtype == kBFloat16) {
    norm_rows(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), static_cast<float>(eps),
              static_cast<bf16*>(y), rows, columns);
  } else {
    norm_rows(static_cast<const float*>(x), static_cast<const float*>(weight), static_cast<float>(eps),
              static_cast<float*>(y), rows, columns);
  }
}

// x: [rows, all heads, size]; the first `heads` of them go to y [rows, heads, size], rotated. cosine, sine: [rows,
// size]
void rotate_heads(const void* x, int64_t ldx, const void* cosine, const void* sine, void* y, int64_t rows,
                  int64_t heads, int64_t size, int64_t dtype) {
  const auto run = [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for schedule(static) if (rows * heads * size > kParallelElements)
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t h = 0; h < heads; ++h) {
        rotate_head(static_cast<const T*>(x) + n * ldx + h * size, static_cast<const T*>(cosine) + n * size,
                    static_cast<const T*>(sine) + n * size, static_cast<T*>(y) + (n * heads + h) * size, size);
      }
    }
  };
  if (dtype == kBFloat16) {
    run(bf16{});
  } else {
    run(0.0f);
  }
}

// x: [rows, 2 * width] gate, then up; y: [rows, width]
void silu_gate(const void* x, void* y, int64_t rows, int64_t width, int64_t dtype) {
  if (dtype == kBFloat16) {
    gate_rows(static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, width);
  } else {
    gate_rows(static_cast<const float*>(x), static_cast<float*>(y), rows, width);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(rms_norm);
TLF_KERNEL(rotate_heads);
TLF_KERNEL(silu_gate);
