// connector_mlp: an activation and its gradient in one pass, and transposed copies for products by a transposed left
// side. The products are torch's and those of other ops; so is the forward activation.
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "tlf/denormals.h"
#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kTile = 64;                   // rows and columns that are turned at a time: 16 KB of floats
constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

enum Activation : int64_t { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// f(x) and f'(x) together: they share the exponential.
struct Slope {
  float value, slope;
};

template <int64_t A>
inline Slope activate(float x) {
  if constexpr (A == kGelu) {
    // erfc(z) = exp(-z^2) P(1 / (1 + 0.4 z)), z = |x| / sqrt 2; a minimax fit, 7e-10 at most
    const float size = x < 0.0f ? -x : x;
    const float t = 1.0f / (1.0f + 0.282842712f * size);
    float p = 0.07783198f;
    p = p * t - 0.41042391f;
    p = p * t + 0.71382482f;
    p = p * t - 0.40293306f;
    p = p * t + 0.42485087f;
    p = p * t + 0.13479804f;
    p = p * t + 0.23712707f;
    p = p * t + 0.22492418f;
    const float bell = exp_fast(-0.5f * x * x);
    const float tail = 0.5f * p * t * bell;
    const float phi = x < 0.0f ? tail : 1.0f - tail;
    return {x * phi, phi + x * bell * 0.398942280f};
  } else if constexpr (A == kGeluTanh) {
    const float square = x * x;  // 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const float s = 1.0f / (1.0f + exp_fast(-1.59576912f * x * (1.0f + 0.044715f * square)));
    return {x * s, s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * square)};
  } else if constexpr (A == kRelu) {
    return {x > 0.0f ? x : x * 0.0f, x > 0.0f ? 1.0f : 0.0f};  // x * 0: NaN stays
  } else {
    const float s = 1.0f / (1.0f + exp_fast(-x));
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
}

#ifdef __SSE2__
inline void turn8(const BFloat16* from, int64_t lds, BFloat16* to, int64_t ldt) {
  __m128i a[8], b[8];
  for (int k = 0; k < 8; ++k) a[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k * lds));
  for (int k = 0; k < 8; k += 2) {  // rows in pairs
    b[k] = _mm_unpacklo_epi16(a[k], a[k + 1]);
    b[k + 1] = _mm_unpackhi_epi16(a[k], a[k + 1]);
  }
  for (int k = 0; k < 2; ++k) {  // in fours: columns 4 k .. 4 k + 3
    a[4 * k] = _mm_unpacklo_epi32(b[k], b[k + 2]);
    a[4 * k + 1] = _mm_unpackhi_epi32(b[k], b[k + 2]);
    a[4 * k + 2] = _mm_unpacklo_epi32(b[k + 4], b[k + 6]);
    a[4 * k + 3] = _mm_unpackhi_epi32(b[k + 4], b[k + 6]);
  }
  for (int k = 0; k < 4; ++k) {  // in eights: columns 2 k and 2 k + 1
    const int at = (k / 2) * 4 + k % 2;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * k * ldt), _mm_unpacklo_epi64(a[at], a[at + 2]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * k + 1) * ldt), _mm_unpackhi_epi64(a[at], a[at + 2]));
  }
}
#endif

// A tile of values, written out as columns: target[c, r] for c < columns, r < rows.
inline void write_turned(const float (*tile)[kTile], float* target, int64_t ldt, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) target[c * ldt + r] = tile[r][c];
  }
}

inline void write_turned(const BFloat16 (*tile)[kTile], BFloat16* target, int64_t ldt, int64_t rows, int64_t columns) {
  int64_t whole = 0;
#ifdef __SSE2__
  whole = rows / 8 * 8;
  const int64_t across = columns / 8 * 8;
  for (int64_t c = 0; c < across; c += 8) {
    for (int64_t r = 0; r < whole; r += 8) turn8(&tile[r][c], kTile, target + c * ldt + r, ldt);
  }
  for (int64_t c = across; c < columns; ++c) {
    for (int64_t r = 0; r < whole; ++r) target[c * ldt + r] = tile[r][c];
  }
#endif
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = whole; r < rows; ++r) target[c * ldt + r] = tile[r][c];
  }
}

template <typename T, int64_t A>
void backward(void* hidden_, void* grad_, int64_t size) {
  T *hidden = static_cast<T*>(hidden_), *grad = static_cast<T*>(grad_);
#pragma omp parallel if (size > kParallelElements)
  {
    const DenormalsAreZero scope;  // the tails of an activation are such numbers
#pragma omp for simd schedule(static)
    for (int64_t i = 0; i < size; ++i) {
      const Slope f = activate<A>(to_float(hidden[i]));
      store(grad + i, to_float(grad[i]) * f.slope);
      store(hidden + i, f.value);
    }
  }
}

template <typename T>
void turn(const void* source, int64_t lds, void* target, int64_t rows, int64_t columns) {
  const int64_t row_tiles = (rows + kTile - 1) / kTile, column_tiles = (columns + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
  for (int64_t i = 0; i < row_tiles * column_tiles; ++i) {
    const int64_t r0 = i % row_tiles * kTile, c0 = i / row_tiles * kTile;
    const int64_t m = rows - r0 < kTile ? rows - r0 : kTile, n = columns - c0 < kTile ? columns - c0 : kTile;
    T tile[kTile][kTile];
    for (int64_t r = 0; r < m; ++r) {
      const T* __restrict from = static_cast<const T*>(source) + (r0 + r) * lds + c0;
      for (int64_t c = 0; c < n; ++c) tile[r][c] = from[c];
    }
    write_turned(tile, static_cast<T*>(target) + c0 * rows + r0, rows, m, n);
  }
}

template <typename T>
void backward_of(int64_t activation, void* hidden, void* grad, int64_t size) {
  if (activation == kGelu) return backward<T, kGelu>(hidden, grad, size);
  if (activation == kGeluTanh) return backward<T, kGeluTanh>(hidden, grad, size);
  if (activation == kRelu) return backward<T, kRelu>(hidden, grad, size);
  backward<T, kSilu>(hidden, grad, size);
}

}  // namespace

// grad *= f'(hidden), hidden = f(hidden), in place; size: elements of each.
void activation_bwd(void* hidden, void* grad, int64_t size, int64_t activation, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? backward_of<BFloat16> : backward_of<float>;
  run(activation, hidden, grad, size);
}

// target [columns, rows], contiguous, = source [rows, columns] transposed; lds: elements from row to row.
void transpose(const void* source, int64_t lds, void* target, int64_t rows, int64_t columns, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? turn<BFloat16> : turn<float>;
  run(source, lds, target, rows, columns);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(activation_bwd);
TLF_KERNEL(transpose);
