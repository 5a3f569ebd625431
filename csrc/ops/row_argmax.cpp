// row_argmax: where each row of logits is largest.
#include <cstdint>

#include "tlf/attention_simd.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kBlock = 1024;                // elements among which the largest is then looked for one by one
constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

template <typename T>
int64_t first_of_largest(const T* x, int64_t columns) {
  float top = 0.0f;
  int64_t place = -1;
  for (int64_t at = 0; at < columns; at += kBlock) {
    const int64_t stop = least(columns, at + kBlock), whole = at + (stop - at) / kWidth * kWidth;
    float tops[kWidth];
    int32_t odd = 0;  // whether something is not a number
    for (int i = 0; i < kWidth; ++i) tops[i] = -__builtin_inff();
    for (int64_t k = at; k < whole; k += kWidth) {
      for (int i = 0; i < kWidth; ++i) {
        const float value = widen(x[k + i]);
        odd |= value != value;
        tops[i] = value > tops[i] ? value : tops[i];
      }
    }
    float largest = -__builtin_inff();
    for (int i = 0; i < kWidth; ++i) largest = tops[i] > largest ? tops[i] : largest;
    for (int64_t k = whole; k < stop; ++k) {
      const float value = widen(x[k]);
      odd |= value != value;
      largest = value > largest ? value : largest;
    }
    if (odd != 0) {
      for (int64_t k = at; k < stop; ++k) {
        if (widen(x[k]) != widen(x[k])) return k;
      }
    }
    if (place < 0 || largest > top) top = largest, place = at;
  }
  while (widen(x[place]) != top) ++place;
  return place;
}

template <typename T>
void run(const T* x, int64_t ldx, int64_t* out, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * columns > kParallelElements)
  for (int64_t n = 0; n < rows; ++n) out[n] = first_of_largest(x + n * ldx, columns);
}

}  // namespace

// x: [rows, columns >= 1], ldx elements a row; out: [rows]
void row_argmax(const void* x, int64_t ldx, int64_t* out, int64_t rows, int64_t columns, int64_t dtype) {
  if (dtype == kBFloat16) {
    run(static_cast<const bf16*>(x), ldx, out, rows, columns);
  } else {
    run(static_cast<const float*>(x), ldx, out, rows, columns);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(row_argmax);
