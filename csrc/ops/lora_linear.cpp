// lora_linear: dropout whose mask is a hash of (seed, row, column), applied while copying. The products
// around it are torch's. The same hash is in ops/lora_linear.py.
#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 16;  // below this a thread team costs more than it saves

inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

// Two keys a row: with one, rows whose keys differ in low bits only would share stretches of their masks.
struct RowKeys {
  uint32_t first, second;
  RowKeys(int64_t seed, int64_t row)
      : first(mix(static_cast<uint32_t>(row) ^ static_cast<uint32_t>(seed))),
        second(mix(first + static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) + 0x9e3779b9u)) {}
  uint32_t hash(uint32_t column) const {
    uint32_t h = column ^ first;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = ((h ^ (h >> 15)) + second) * 0x846ca68bu;
    return h ^ (h >> 16);
  }
};

inline void copy_if(bool keep, BFloat16 from, BFloat16* to) { to->bits = static_cast<uint16_t>(keep ? from.bits : 0); }
inline void copy_if(bool keep, float from, float* to) { *to = keep ? from : 0.0f; }

template <typename T>
void each_row(const void* source, int64_t lds, void* target, int64_t ldt, int64_t rows, int64_t columns, int64_t row,
              int64_t seed, int64_t threshold) {
  const uint32_t least = static_cast<uint32_t>(threshold);
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
  for (int64_t i = 0; i < rows; ++i) {
    const RowKeys keys(seed, row + i);
    const T* from = static_cast<const T*>(source) + i * lds;
    T* to = static_cast<T*>(target) + i * ldt;
#pragma GCC ivdep
    for (int64_t c = 0; c < columns; ++c) {
      copy_if(keys.hash(static_cast<uint32_t>(c)) >= least, from[c], to + c);
    }
  }
}

}  // namespace

// target = mask * source, which may be the target. The rows are row, row + 1, ... of the matrix that the mask is for;
// strides in elements.
void dropout_copy(const void* source, int64_t lds, void* target, int64_t ldt, int64_t rows, int64_t columns,
                  int64_t row, int64_t seed, int64_t threshold, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? each_row<BFloat16> : each_row<float>;
  run(source, lds, target, ldt, rows, columns, row, seed, threshold);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(dropout_copy);
