// linear_cross_entropy: a chunk of logits becomes its loss and, in place, the gradient of that loss. The matrix
// products around it are torch's.
#include <cmath>
#include <cstdint>

#include "tlf/denormals.h"
#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int kLanes = 64;        // four AVX-512 registers: hides the latency of max and add
constexpr int64_t kBlock = 4096;  // float sums of this many terms are gathered in double

// Logits as they are, or each pressed into (-cap, cap).
struct Plain {
  float value(float z) const { return z; }
  float slope(float) const { return 1.0f; }
};
struct Capped {
  float cap;
  float value(float z) const { return cap * tanh_fast(z / cap); }
  float slope(float value) const { return 1.0f - (value / cap) * (value / cap); }
};

template <typename T>
float row_max(const T* z, int64_t n) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float v = to_float(z[i + j]);
      lanes[j] = v > lanes[j] ? v : lanes[j];
    }
  }
  float top = -INFINITY;
  for (; i < n; ++i) top = to_float(z[i]) > top ? to_float(z[i]) : top;
  for (int j = 0; j < kLanes; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

template <typename T, typename Cap>
double sum_exp(const T* z, int64_t n, float top, Cap cap) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = n - start < kBlock ? n : start + kBlock;
    float lanes[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += exp_fast(cap.value(to_float(z[i + j])) - top);
    }
    for (; i < stop; ++i) total += exp_fast(cap.value(to_float(z[i])) - top);
    for (int j = 0; j < kLanes; ++j) total += lanes[j];
  }
  return total;
}

template <typename T, typename Cap>
double sum_values(const T* z, int64_t n, float top, Cap cap) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = n - start < kBlock ? n : start + kBlock;
    float lanes[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += cap.value(to_float(z[i + j])) - top;
    }
    for (; i < stop; ++i) total += cap.value(to_float(z[i])) - top;
    for (int j = 0; j < kLanes; ++j) total += lanes[j];
  }
  return total;
}

// loss = lse - (1 - smoothing) s[label] - smoothing mean(s) + z_loss lse^2, every value taken relative to the largest
template <typename T, typename Cap>
void cross_entropy(T* logits, const int64_t* labels, double* loss, int64_t rows, int64_t vocab, bool write_grad,
                   Cap cap, double smoothing, double z_loss) {
#pragma omp parallel if (rows * vocab > 1 << 15)
  {
    const DenormalsAreZero scope;  // most gradients of a confident row are such numbers
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      T* z = logits + row * vocab;
      const int64_t y = labels[row];
      const float top = cap.value(row_max(z, vocab));  // a cap keeps the order
      const double total = sum_exp(z, vocab, top, cap);
      const float answer = cap.value(to_float(z[y]));
      const double target = static_cast<double>(answer) - top;
      const double lse = std::log(total) + top;
      loss[row] = std::log(total) - target;
      if (smoothing > 0.0) {
        loss[row] += smoothing * (target - sum_values(z, vocab, top, cap) / static_cast<double>(vocab));
      }
      if (z_loss > 0.0) loss[row] += z_loss * lse * lse;
      if (!write_grad) continue;
      const double growth = 2.0 * z_loss * lse;
      const double spread = smoothing / static_cast<double>(vocab);
      const float scale = static_cast<float>((1.0 + growth) / total), shift = static_cast<float>(spread);
      const double hit = exp_fast(static_cast<float>(target));
      for (int64_t i = 0; i < vocab; ++i) {
        const float value = cap.value(to_float(z[i]));
        store(z + i, (exp_fast(value - top) * scale - shift) * cap.slope(value));
      }
      // in double: softmax - 1 cancels where the model is confident
      const double slope = (hit - total) / total + growth * hit / total + (smoothing - spread);
      store(z + y, static_cast<float>(slope) * cap.slope(answer));
    }
  }
}

template <typename T>
void dispatch(void* logits, const int64_t* labels, double* loss, int64_t rows, int64_t vocab, bool write_grad,
              float softcap, double smoothing, double z_loss) {
  T* z = static_cast<T*>(logits);
  if (softcap > 0.0f) {
    cross_entropy(z, labels, loss, rows, vocab, write_grad, Capped{softcap}, smoothing, z_loss);
  } else {
    cross_entropy(z, labels, loss, rows, vocab, write_grad, Plain{}, smoothing, z_loss);
  }
}

}  // namespace

// logits z: [rows, vocab] contiguous, overwritten by d loss / d z if write_grad. loss: [rows]. softcap,
// label_smoothing, z_loss 0: none.
void cross_entropy_rows(void* logits, const int64_t* labels, double* loss, int64_t rows, int64_t vocab, int64_t dtype,
                        int64_t write_grad, double softcap, double label_smoothing, double z_loss) {
  auto* run = dtype == kBFloat16 ? dispatch<BFloat16> : dispatch<float>;
  run(logits, labels, loss, rows, vocab, write_grad != 0, static_cast<float>(softcap), label_smoothing, z_loss);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(cross_entropy_rows);
