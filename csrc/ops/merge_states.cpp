// merge_states: two attention results over disjoint keys into one. Memory-bound, hence one pass.
#include <cmath>
#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 16;  // below this a thread team costs more than it saves

template <typename T>
void merge(const T* out_a, const float* lse_a, const T* out_b, const float* lse_b, T* out, float* lse, int64_t rows,
           int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > kParallelElements)
  for (int64_t r = 0; r < rows; ++r) {
    const float a = lse_a[r], b = lse_b[r];
    const float peak = a > b || a != a ? a : b;
    if (peak == -INFINITY) {  // neither side saw a key
      lse[r] = peak;
      for (int64_t d = 0; d < size; ++d) store(out + r * size + d, 0.0f);
      continue;
    }
    const float ea = std::exp(a - peak), eb = std::exp(b - peak), total = ea + eb;
    const float wa = ea / total, wb = eb / total;
    lse[r] = peak + std::log(total);
    for (int64_t d = 0; d < size; ++d) {
      store(out + r * size + d, wa * to_float(out_a[r * size + d]) + wb * to_float(out_b[r * size + d]));
    }
  }
}

}  // namespace

// out_a, out_b, out: [rows, size]; lse_a, lse_b, lse: [rows]; all contiguous.
void merge_states_fwd(const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, void* out,
                      float* lse, int64_t rows, int64_t size, int64_t dtype) {
  if (dtype == kBFloat16) {
    merge(static_cast<const BFloat16*>(out_a), lse_a, static_cast<const BFloat16*>(out_b), lse_b,
          static_cast<BFloat16*>(out), lse, rows, size);
  } else {
    merge(static_cast<const float*>(out_a), lse_a, static_cast<const float*>(out_b), lse_b, static_cast<float*>(out),
          lse, rows, size);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(merge_states_fwd);
