// merge_states: two attention results over disjoint keys into one, and the gradients of both. Memory-bound: one pass
// over the rows, with the weights of kWidth of them worked out side by side.
#include <cmath>
#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/rows.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 16;  // below this a thread team costs more than it saves

// What each side counts for in kWidth rows, and their log-sum-exp.
struct Shares {
  Vec a, b, lse;
};

TLF_INLINE Vec exponential(Vec x) {  // of x <= 0
  return select(x < -87.0f, Vec{}, exp2v(x * kLog2e));
}

TLF_INLINE Shares shares(Vec a, Vec b) {
  const Vec peak = select((a > b) | (a != a), a, b);
  const IVec blind = peak == -INFINITY;  // neither side saw a key
  const Vec ea = exponential(a - peak), eb = exponential(b - peak), total = ea + eb;
  // log(total) = 2 artanh(s), s = (total - 1) / (total + 1) <= 1/3; the smaller of the two is total - 1, unrounded
  const Vec rest = select(ea > eb, eb, ea);
  const Vec s = rest / (rest + 2.0f), square = s * s;
  Vec p = splat(1.0f / 13.0f);
  p = p * square + 1.0f / 11.0f;
  p = p * square + 1.0f / 9.0f;
  p = p * square + 1.0f / 7.0f;
  p = p * square + 1.0f / 5.0f;
  p = p * square + 1.0f / 3.0f;
  p = p * square + 1.0f;
  return {select(blind, Vec{}, ea / total), select(blind, Vec{}, eb / total), select(blind, peak, peak + 2.0f * s * p)};
}

// the first `count` of kWidth floats
TLF_INLINE Vec load_some(const float* p, int64_t count) {
  if (count >= kWidth) return load(p);
  Vec x = {};
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
}

template <typename T>
void merge(const T* out_a, const float* lse_a, const T* out_b, const float* lse_b, T* out, float* lse, int64_t rows,
           int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > kParallelElements)
  for (int64_t first = 0; first < rows; first += kWidth) {
    const int64_t count = least(kWidth, rows - first);
    const Shares share = shares(load_some(lse_a + first, count), load_some(lse_b + first, count));
    for (int64_t i = 0; i < count; ++i) {
      const float wa = share.a[i], wb = share.b[i];
      lse[first + i] = share.lse[i];
      const int64_t at = (first + i) * size;
      const T *a = out_a + at, *b = out_b + at;
      T* to = out + at;
      int64_t d = 0;
      for (; d + kWidth <= size; d += kWidth) store_row(to + d, wa * load_row(a + d) + wb * load_row(b + d));
      for (; d < size; ++d) narrow(wa * widen(a[d]) + wb * widen(b[d]), to + d);
    }
  }
}

template <typename T>
void differentiate(const T* dout, const float* dlse, const T* out_a, const float* lse_a, const T* out_b,
                   const float* lse_b, T* d_out_a, float* d_lse_a, T* d_out_b, float* d_lse_b, int64_t rows,
                   int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > kParallelElements)
  for (int64_t first = 0; first < rows; first += kWidth) {
    const int64_t count = least(kWidth, rows - first);
    const Shares share = shares(load_some(lse_a + first, count), load_some(lse_b + first, count));
    for (int64_t i = 0; i < count; ++i) {
      const float wa = share.a[i], wb = share.b[i];
      const int64_t at = (first + i) * size;
      const T *grad = dout + at, *a = out_a + at, *b = out_b + at;
      T *da = d_out_a + at, *db = d_out_b + at;
      Vec strands = {};
      int64_t d = 0;
      for (; d + kWidth <= size; d += kWidth) {
        const Vec g = load_row(grad + d);
        strands += g * (load_row(a + d) - load_row(b + d));
        store_row(da + d, wa * g);
        store_row(db + d, wb * g);
      }
      float dot = sum(strands);
      for (; d < size; ++d) {
        const float g = widen(grad[d]);
        dot += g * (widen(a[d]) - widen(b[d]));
        narrow(wa * g, da + d);
        narrow(wb * g, db + d);
      }
      const float gap = wa * wb * dot, through = dlse == nullptr ? 0.0f : dlse[first + i];
      d_lse_a[first + i] = wa * through + gap;
      d_lse_b[first + i] = wb * through - gap;
    }
  }
}

template <typename T>
void forward(const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, void* out, float* lse,
             int64_t rows, int64_t size) {
  merge(static_cast<const T*>(out_a), lse_a, static_cast<const T*>(out_b), lse_b, static_cast<T*>(out), lse, rows,
        size);
}

template <typename T>
void backward(const void* dout, const float* dlse, const void* out_a, const float* lse_a, const void* out_b,
              const float* lse_b, void* d_out_a, float* d_lse_a, void* d_out_b, float* d_lse_b, int64_t rows,
              int64_t size) {
  differentiate(static_cast<const T*>(dout), dlse, static_cast<const T*>(out_a), lse_a, static_cast<const T*>(out_b),
                lse_b, static_cast<T*>(d_out_a), d_lse_a, static_cast<T*>(d_out_b), d_lse_b, rows, size);
}

}  // namespace

// out_a, out_b, out: [rows, size]; lse_a, lse_b, lse: [rows]; all contiguous.
void merge_states_fwd(const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, void* out,
                      float* lse, int64_t rows, int64_t size, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? &forward<bf16> : dtype == kFloat16 ? &forward<half> : &forward<float>;
  run(out_a, lse_a, out_b, lse_b, out, lse, rows, size);
}

// The gradients of the four, shaped as they are. dlse: [rows] or null.
void merge_states_bwd(const void* dout, const float* dlse, const void* out_a, const float* lse_a, const void* out_b,
                      const float* lse_b, void* d_out_a, float* d_lse_a, void* d_out_b, float* d_lse_b, int64_t rows,
                      int64_t size, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? &backward<bf16> : dtype == kFloat16 ? &backward<half> : &backward<float>;
  run(dout, dlse, out_a, lse_a, out_b, lse_b, d_out_a, d_lse_a, d_out_b, d_lse_b, rows, size);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(merge_states_fwd);
TLF_KERNEL(merge_states_bwd);
