// The parts of a decoding step. Every thread of a team calls them with the same arguments, and leaves them after a
// barrier; outside a parallel region the caller is the team. So an op opens one region for one part, and decode_step
// one for all layers.
#pragma once

#include <cmath>
#include <cstdint>

#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {

#if defined(TLF_ISA_IS_amx)
constexpr int64_t kRowsTogether = 32;  // of x beside one reading of a weight
#else
constexpr int64_t kRowsTogether = 16;
#endif

// y [rows, outputs] = x Wᵀ + bias as the op decode_linear defines it; any number of rows,
// kRowsTogether at a time. scratch: float [16 * (columns + 128)].
void linear_of_team(const void* x, int64_t ldx, const void* w, const float* scale, const void* bias, float* scratch,
                    void* y, int64_t rows, int64_t outputs, int64_t columns, int64_t dtype);

// The same with the packed weight of the op nf4_linear_few.
void nf4_of_team(const void* x, int64_t ldx, const uint8_t* packed, const float* absmax, int64_t blocksize,
                 const void* bias, float* scratch, void* y, int64_t rows, int64_t outputs, int64_t columns,
                 int64_t dtype);

struct AttentionShape {
  int64_t heads, kv_heads, size, k_row, k_head, v_row, v_head;
  float scale, softcap;
};

// The rows of the pool that a query sees: its own and those of a shared prefix.
struct Sight {
  int64_t start, used, shared, prefix;
};

// q, out: [sequences, heads, size]. window > 0: a query sees its last window own rows only.
void attention_of_team(const void* q, const void* k, const void* v, void* out, const Sight* sights, int64_t sequences,
                       int64_t window, const AttentionShape& shape, int64_t dtype);

namespace {

template <typename T>
TLF_INLINE float rounded_to(float x) {
  T value;
  narrow(x, &value);
  return widen(value);
}

// y = weight round(x / sqrt(mean x² + eps)); x and y may be one
template <typename T>
void norm_row(const T* x, const T* weight, float eps, T* y, int64_t columns) {
  float parts[kWidth] = {};  // as many sums side by side as a vector holds
  const int64_t whole = columns / kWidth * kWidth;
  for (int64_t k = 0; k < whole; k += kWidth) {
    for (int i = 0; i < kWidth; ++i) parts[i] += widen(x[k + i]) * widen(x[k + i]);
  }
  float squares = 0.0f;
  for (int64_t k = whole; k < columns; ++k) squares += widen(x[k]) * widen(x[k]);
  for (int i = 0; i < kWidth; ++i) squares += parts[i];
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(columns) + eps);
  for (int64_t k = 0; k < columns; ++k) narrow(widen(weight[k]) * rounded_to<T>(widen(x[k]) * factor), y + k);
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

// y = round(silu(gate)) up
template <typename T>
void gate_part(const T* gate, const T* up, T* y, int64_t width) {
  const auto open = [&](int64_t k, int count) {
    Vec g = {};
    for (int i = 0; i < count; ++i) g[i] = widen(gate[k + i]);
    const Vec arg = -kLog2e * g;
    const Vec e = arg > 127.0f ? splat(INFINITY) : exp2v(arg);  // exp2v wraps beyond 2^127
    const Vec opened = g / (1.0f + e);
    for (int i = 0; i < count; ++i) narrow(rounded_to<T>(opened[i]) * widen(up[k + i]), y + k + i);
  };
  int64_t k = 0;
  for (; k + kWidth <= width; k += kWidth) open(k, kWidth);  // a constant count becomes vectors
  if (k < width) open(k, static_cast<int>(width - k));
}

}  // namespace
}  // namespace TLF_ISA
}  // namespace tlf
