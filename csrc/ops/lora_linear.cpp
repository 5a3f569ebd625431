// lora_linear: what the adapter adds to a linear layer. The dropout mask is a hash of (seed, row, column), the same as
// in ops/lora_linear.py.
//
// A product with R columns, or of depth R, spends its time on passes over the wide matrix beside it, not on
// multiplying. Where vectors multiply bfloat16 as fast as torch's own product does (avx512bf16), each of the three
// kinds of product reads or writes that matrix once, masking as it goes:
//   lora_down   out [N, R] = scale (mask x) [N, C] factor
//   lora_up     out [N, C] += mask scale (u [N, R] factor)
//   lora_grad   out [R, C] = scale leftᵀ [R, N] (mask right) [N, C], or its transpose
// C and R are even: pairs of bfloat16 along the depth are multiplied at once.
#include <omp.h>

#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/simd.h"

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
  // of a column, or of each lane's
  template <typename U>
  TLF_INLINE U hash(U column) const {
    U h = column ^ first;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = ((h ^ (h >> 15)) + second) * 0x846ca68bu;
    return h ^ (h >> 16);
  }
};

inline void copy_if(bool keep, bf16 from, bf16* to) { to->bits = static_cast<uint16_t>(keep ? from.bits : 0); }
inline void copy_if(bool keep, float from, float* to) { *to = keep ? from : 0.0f; }

template <typename T>
inline void copy_kept(const RowKeys& keys, uint32_t threshold, const T* from, T* to, int64_t columns) {
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    copy_if(keys.hash(static_cast<uint32_t>(c)) >= threshold, from[c], to + c);
  }
}

template <typename T>
void each_row(const void* source, int64_t lds, void* target, int64_t ldt, int64_t rows, int64_t columns, int64_t row,
              int64_t seed, int64_t threshold) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
  for (int64_t i = 0; i < rows; ++i) {
    copy_kept(RowKeys(seed, row + i), static_cast<uint32_t>(threshold), static_cast<const T*>(source) + i * lds,
              static_cast<T*>(target) + i * ldt, columns);
  }
}

}  // namespace

// target = mask * source, which may be the target. The rows are row, row + 1, ... of the matrix that the mask is for;
// strides in elements.
void dropout_copy(const void* source, int64_t lds, void* target, int64_t ldt, int64_t rows, int64_t columns,
                  int64_t row, int64_t seed, int64_t threshold, int64_t dtype) {
  auto* run = dtype == kBFloat16 ? each_row<bf16> : each_row<float>;
  run(source, lds, target, ldt, rows, columns, row, seed, threshold);
}

#if defined(TLF_ISA_IS_avx512bf16)
namespace {

constexpr int64_t kRows = 24;  // of the wide matrix at a time
constexpr int64_t kTileRows = 12;
constexpr int64_t kWide = 2048;  // columns from which a block of kRows spreads over too many pages
constexpr int64_t kPairs = 96;   // lanes of a panel that a tile goes through at a time
constexpr int64_t kDepth = 128;  // rows whose pairs are laid out at a time for a gradient

// bit i: whether column + i stays
TLF_INLINE __mmask16 kept(const RowKeys& keys, int64_t column, uint32_t threshold) {
  const BitVec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const BitVec h = keys.hash(lanes + static_cast<uint32_t>(column));
  return _mm512_cmpge_epu32_mask((__m512i)h, _mm512_set1_epi32(static_cast<int32_t>(threshold)));
}

TLF_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kWidth ? 0xffff : (1 << count) - 1);
}

// Asks for kTileRows rows that will be read after those of the present block: their stride defeats the hardware.
TLF_INLINE void fetch(const bf16* rows, int64_t ld, int64_t columns) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t c = 0; c < columns; c += 32) __builtin_prefetch(rows + r * ld + c, 0, 2);
  }
}

// Columns of a factor that are laid out side by side, and of which a tile of a product reads some; the last panel is
// as wide as there are columns.
struct Panels {
  int64_t depth, width;
  TLF_INLINE int64_t count() const { return ceil_div(width, kPanel); }
  TLF_INLINE int64_t columns(int64_t panel) const { return least(kPanel, width - panel * kPanel); }
  TLF_INLINE int64_t ld(int64_t panel) const { return round_up(columns(panel), kWidth); }
  TLF_INLINE int64_t at(int64_t panel) const { return panel * kPanel * (depth / 2); }
};

// out: the panels one after the other, each as lanes [depth / 2, ld]. factor: [depth, width], or turned [width, depth].
// By a team.
void lay_out(const bf16* factor, bool turned, const Panels& panels, float* out) {
  const int64_t depth = panels.depth, width = panels.width, pairs = depth / 2;
#pragma omp for schedule(static) collapse(2)
  for (int64_t p = 0; p < panels.count(); ++p) {
    for (int64_t k = 0; k < pairs; k += kWidth) {
      const int64_t count = least(kWidth, pairs - k), columns = panels.columns(p), ld = panels.ld(p);
      float* to = out + panels.at(p) + k * ld;
      if (turned) {
        transpose(factor + p * kPanel * depth + 2 * k, pairs, columns, count, to, ld);
      } else {
        uint32_t* lanes = reinterpret_cast<uint32_t*>(to);
        interleave(factor + 2 * k * width + p * kPanel, width, 2 * count, columns, lanes, ld);
        for (int64_t i = 0; i < count; ++i) clear(lanes + i * ld + columns, ld - columns);
      }
    }
  }
}

// Columns of a panel, with which the thread that has most of them has least.
TLF_INLINE int64_t fair_panel(int64_t columns, int64_t threads) {
  int64_t best = kPanel, load = 0;
  for (int64_t width = kPanel; width >= kPanel / 2; width -= kWidth) {
    const int64_t most_columns = ceil_div(ceil_div(columns, width), threads) * width;
    if (width == kPanel || most_columns < load) best = width, load = most_columns;
  }
  return best;
}

// lanes of count rows from right on, masked: out[i, c] = (row 2 i, row 2 i + 1) of a panel of columns
TLF_INLINE void pair_kept(const bf16* right, int64_t ld, int64_t row, int64_t count, int64_t column, int64_t width,
                          int64_t seed, uint32_t threshold, float* out) {
  for (int64_t i = 0; i < count; i += 2, right += 2 * ld, out += kPanel) {
    const RowKeys low(seed, row + i), high(seed, row + i + 1);
    prefetch_row(right + kAhead * ld, width);
    prefetch_row(right + (kAhead + 1) * ld, width);
    for (int64_t c = 0; c < width; c += kWidth) {
      const __mmask16 there = first_lanes(width - c);
      __mmask16 a = there, b = i + 1 < count ? there : 0;
      if (threshold > 0) {
        a &= kept(low, column + c, threshold);
        b &= kept(high, column + c, threshold);
      }
      const __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(a, right + c));
      const __m512i y = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(b, right + ld + c));
      _mm512_store_si512(out + c, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
    }
  }
}

}  // namespace

int64_t lora_scratch(int64_t rows, int64_t columns, int64_t rank) {
  const int64_t factor = most(columns * round_up(rank, kWidth), rank * round_up(columns, kWidth));
  return 2 * most(factor, round_up(rows, 2) * rank);
}

// factor: [columns, rank], or turned [rank, columns]
void lora_down(const void* x, int64_t ldx, const void* factor, int64_t turned, void* out, void* scratch, int64_t rows,
               int64_t columns, int64_t rank, double scale, int64_t seed, int64_t threshold) {
  static thread_local Scratch memory;
  const Panels panels{columns, rank};
  const int64_t width = round_up(rank, kWidth);
  float* lanes = static_cast<float*>(scratch);
#pragma omp parallel if (rows * columns > kParallelElements)
  {
    bf16* masked = nullptr;
    float* sums = nullptr;
    memory.lay_out([&](Scratch& s) {
      masked = s.take<bf16>(threshold > 0 ? kRows * columns : 0);
      sums = s.take<float>(kRows * width);
    });
    lay_out(static_cast<const bf16*>(factor), turned != 0, panels, lanes);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < rows; at += kRows) {
      const int64_t m = least(kRows, rows - at);
      const bf16* from = static_cast<const bf16*>(x) + at * ldx;
      int64_t stride = ldx;
      if (threshold > 0) {
        for (int64_t r = 0; r < m; ++r) {
          prefetch_row(from + (r + kAhead) * ldx, columns);
          copy_kept(RowKeys(seed, at + r), static_cast<uint32_t>(threshold), from + r * ldx, masked + r * columns,
                    columns);
        }
        from = masked, stride = columns;
      }
      clear(sums, m * width);
      for (int64_t k = 0; k < columns / 2; k += kPairs) {  // so many of a panel stay in the nearest cache
        const int64_t pairs = least(kPairs, columns / 2 - k);
        for (int64_t p = 0; p < panels.count(); ++p) {
          const int64_t ld = panels.ld(p);
          for (int64_t r = 0; r < m; r += kTileRows) {
            if (threshold == 0 && p == 0) fetch(from + (r + kRows) * ldx + 2 * k, ldx, 2 * pairs);
            gemm<bf16, Write::add>(least(kTileRows, m - r), ld / kWidth, pairs, from + r * stride + 2 * k, stride,
                                   lanes + panels.at(p) + k * ld, ld, sums + r * width + p * kPanel, width);
          }
        }
      }
      for (int64_t r = 0; r < m; ++r) {
        store_row(static_cast<bf16*>(out) + (at + r) * rank, sums + r * width, rank, static_cast<float>(scale));
      }
    }
  }
}

// factor: [rank, columns], or turned [columns, rank]
void lora_up(const void* u, const void* factor, int64_t turned, void* out, void* scratch, int64_t rows, int64_t columns,
             int64_t rank, double scale, int64_t seed, int64_t threshold) {
  const Panels panels{rank, columns};
  const int64_t block = columns > kWide ? kTileRows : kRows;
  const __m512 factor_of_all = _mm512_set1_ps(static_cast<float>(scale));
  float* lanes = static_cast<float*>(scratch);
#pragma omp parallel if (rows * columns > kParallelElements)
  {
    alignas(64) float sums[kRows * kPanel];
    lay_out(static_cast<const bf16*>(factor), turned != 0, panels, lanes);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < rows; at += block) {
      const int64_t m = least(block, rows - at);
      for (int64_t p = 0; p < panels.count(); ++p) {
        const int64_t c0 = p * kPanel, width = panels.columns(p), ld = panels.ld(p);
        gemm<bf16, Write::store>(m, ld / kWidth, rank / 2, static_cast<const bf16*>(u) + at * rank, rank,
                                 lanes + panels.at(p), ld, sums, kPanel);
        for (int64_t r = 0; r < m; ++r) {
          const RowKeys keys(seed, at + r);
          bf16* to = static_cast<bf16*>(out) + (at + r) * columns + c0;
          prefetch_row<true>(to + block * columns, width);
          for (int64_t c = 0; c < width; c += kWidth) {
            const __mmask16 there = first_lanes(width - c);
            __m512 share = _mm512_load_ps(sums + r * kPanel + c) * factor_of_all;
            if (threshold > 0) {
              share = _mm512_maskz_mov_ps(kept(keys, c0 + c, static_cast<uint32_t>(threshold)), share);
            }
            const __m512i held = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, to + c));
            share += _mm512_castsi512_ps(_mm512_slli_epi32(held, 16));
            _mm256_mask_storeu_epi16(to + c, there, (__m256i)_mm512_cvtneps_pbh(share));
          }
        }
      }
    }
  }
}

// out: [rank, columns], or turned [columns, rank]
void lora_grad(const void* left, const void* right, int64_t ldr, void* out, int64_t turned, void* scratch, int64_t rows,
               int64_t columns, int64_t rank, double scale, int64_t seed, int64_t threshold) {
  static thread_local Scratch memory;
  const int64_t ranks = round_up(rank, kWidth);
  uint32_t* lanes = static_cast<uint32_t*>(scratch);
#pragma omp parallel if (rows * columns > kParallelElements)
  {
    float *sums = nullptr, *across = nullptr, *pairs = nullptr;
    memory.lay_out([&](Scratch& s) {
      sums = s.take<float>(rank * kPanel);
      across = s.take<float>(turned != 0 ? ranks * kPanel : 0);
      pairs = s.take<float>(kDepth / 2 * kPanel);
    });
#pragma omp for schedule(static)
    for (int64_t at = 0; at < rows; at += kDepth) {
      interleave(static_cast<const bf16*>(left) + at * rank, rank, least(kDepth, rows - at), rank,
                 lanes + at / 2 * rank, rank);
    }
    const int64_t panel = fair_panel(columns, omp_get_num_threads());
#pragma omp for schedule(static)
    for (int64_t c0 = 0; c0 < columns; c0 += panel) {
      const int64_t width = least(panel, columns - c0);
      clear(sums, rank * kPanel);
      for (int64_t at = 0; at < rows; at += kDepth) {
        const int64_t count = least(kDepth, rows - at);
        pair_kept(static_cast<const bf16*>(right) + at * ldr + c0, ldr, at, count, c0, width, seed,
                  static_cast<uint32_t>(threshold), pairs);
        gemm<bf16, Write::add, Lie::columns>(rank, ceil_div(width, kWidth), ceil_div(count, 2),
                                             reinterpret_cast<const bf16*>(lanes + at / 2 * rank), 2 * rank, pairs,
                                             kPanel, sums, kPanel);
      }
      bf16* to = static_cast<bf16*>(out);
      if (turned == 0) {
        for (int64_t r = 0; r < rank; ++r) {
          store_row(to + r * columns + c0, sums + r * kPanel, width, static_cast<float>(scale));
        }
      } else {
        transpose(sums, kPanel, rank, width, across, ranks);
        for (int64_t c = 0; c < width; ++c) {
          store_row(to + (c0 + c) * rank, across + c * ranks, rank, static_cast<float>(scale));
        }
      }
    }
  }
}
#else
int64_t lora_scratch(int64_t, int64_t, int64_t) { return 0; }
void lora_down(const void*, int64_t, const void*, int64_t, void*, void*, int64_t, int64_t, int64_t, double, int64_t,
               int64_t) {}
void lora_up(const void*, const void*, int64_t, void*, void*, int64_t, int64_t, int64_t, double, int64_t, int64_t) {}
void lora_grad(const void*, const void*, int64_t, void*, int64_t, void*, int64_t, int64_t, int64_t, double, int64_t,
               int64_t) {}
#endif

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(dropout_copy);
TLF_KERNEL(lora_scratch);
TLF_KERNEL(lora_down);
TLF_KERNEL(lora_up);
TLF_KERNEL(lora_grad);
