// decode_block: what lies between the products of a Llama-style decoder layer, a call each instead of a dozen.
#include <cstdint>

#include "tlf/decode.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

template <typename T>
void norm_rows(const T* x, const T* weight, float eps, T* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
  for (int64_t n = 0; n < rows; ++n) norm_row(x + n * columns, weight, eps, y + n * columns, columns);
}

template <typename T>
void gate_rows(const T* x, T* y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > kParallelElements)
  for (int64_t n = 0; n < rows; ++n) gate_part(x + 2 * n * width, x + (2 * n + 1) * width, y + n * width, width);
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
