// row_argmax: where each row of logits is largest.
#include <cstdint>
#include <cstring>

#include "tlf/kernel.h"
#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kBlock = 1024;                // elements among which the largest is then looked for one by one
constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

// 2 kWidth elements as float, in any order
TLF_INLINE void read(const float* x, Vec* a, Vec* b) { *a = load(x), *b = load(x + kWidth); }
TLF_INLINE void read(const bf16* x, Vec* a, Vec* b) {
  BitVec bits;
  std::memcpy(&bits, x, sizeof(bits));  // x need not be aligned to a float
  *a = (Vec)(bits << 16), *b = (Vec)(bits & 0xffff0000u);
}

TLF_INLINE bool any(IVec mask) {
  int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= mask[i];
  return all != 0;
}

// The largest of count elements that are numbers; *odd: whether some are not.
template <typename T>
float largest_of(const T* x, int64_t count, bool* odd) {
  constexpr int64_t kStep = 4 * kWidth;
  Vec tops[4];
  IVec nans = {};
  for (Vec& top : tops) top = splat(-__builtin_inff());
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    Vec values[4];
    read(x + k, values, values + 1);
    read(x + k + 2 * kWidth, values + 2, values + 3);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      nans |= values[i] != values[i];
      tops[i] = larger(values[i], tops[i]);
    }
  }
  const Vec top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
  float largest = -__builtin_inff();
  for (int i = 0; i < kWidth; ++i) largest = top[i] > largest ? top[i] : largest;
  *odd = any(nans);
  for (; k < count; ++k) {
    const float value = widen(x[k]);
    *odd |= value != value;
    largest = value > largest ? value : largest;
  }
  return largest;
}

template <typename T>
int64_t first_of_largest(const T* x, int64_t columns) {
  float top = 0.0f;
  int64_t place = -1;
  for (int64_t at = 0; at < columns; at += kBlock) {
    const int64_t stop = least(columns, at + kBlock);
    bool odd = false;
    const float largest = largest_of(x + at, stop - at, &odd);
    if (odd) {
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
