// connector_mlp: an activation and its gradient in one pass. The products are torch's and those of other ops; so is the
// forward activation.
#include <cstdint>

#include "tlf/denormals.h"
#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

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

template <typename T, int64_t A>
void backward(const void* hidden_, void* value_, void* grad_, int64_t size) {
  const T* __restrict hidden = static_cast<const T*>(hidden_);
  T* __restrict value = static_cast<T*>(value_), * __restrict grad = static_cast<T*>(grad_);
#pragma omp parallel if (size > kParallelElements)
  {
    const DenormalsAreZero scope;  // the tails of an activation are such numbers
#pragma omp for simd schedule(static)
    for (int64_t i = 0; i < size; ++i) {
      const Slope f = activate<A>(to_float(hidden[i]));
      store(grad + i, to_float(grad[i]) * f.slope);
      store(value + i, f.value);
    }
  }
}

template <typename T>
void backward_of(int64_t activation, const void* hidden, void* value, void* grad, int64_t size) {
  if (activation == kGelu) return backward<T, kGelu>(hidden, value, grad, size);
  if (activation == kGeluTanh) return backward<T, kGeluTanh>(hidden, value, grad, size);
  if (activation == kRelu) return backward<T, kRelu>(hidden, value, grad, size);
  backward<T, kSilu>(hidden, value, grad, size);
}

}  // namespace

// grad *= f'(hidden), value = f(hidden); size: elements of each.
void activation_bwd(const void* hidden, void* value, void* grad, int64_t size, int64_t activation, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? backward_of<BFloat16> : backward_of<float>;
  run(activation, hidden, value, grad, size);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(activation_bwd);
