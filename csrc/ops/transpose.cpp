// transpose: a contiguous copy of a matrix's transpose, for products by a transposed left factor (ops/gemm.py).
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kTile = 64;                   // rows and columns that are turned at a time
constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves

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

// target[c, r] = tile[r, c] for c < columns, r < rows.
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

}  // namespace

// target [columns, rows], contiguous, = source [rows, columns] transposed, both bfloat16; lds: elements from row to
// row.
void transpose(const void* source, int64_t lds, void* target, int64_t rows, int64_t columns) {
  const int64_t row_tiles = (rows + kTile - 1) / kTile, column_tiles = (columns + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
  for (int64_t i = 0; i < row_tiles * column_tiles; ++i) {
    const int64_t r0 = i % row_tiles * kTile, c0 = i / row_tiles * kTile;
    const int64_t m = rows - r0 < kTile ? rows - r0 : kTile, n = columns - c0 < kTile ? columns - c0 : kTile;
    BFloat16 tile[kTile][kTile];
    for (int64_t r = 0; r < m; ++r) {
      const BFloat16* __restrict from = static_cast<const BFloat16*>(source) + (r0 + r) * lds + c0;
      for (int64_t c = 0; c < n; ++c) tile[r][c] = from[c];
    }
    write_turned(tile, static_cast<BFloat16*>(target) + c0 * rows + r0, rows, m, n);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(transpose);
