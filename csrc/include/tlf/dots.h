// The product of a few bfloat16 rows with a weight in its stock layout, where vectors multiply bfloat16 as fast as
// float32 and there are no tiles: four outputs by four rows at a time, so that a vector loaded is used four times.
//
// Only the avx512bf16 pass has it; there TLF_DOTS is defined.
#pragma once

#include <cstdint>
#include <cstring>

#include "tlf/simd.h"

#if defined(TLF_ISA_IS_avx512bf16)
#define TLF_DOTS 1

namespace tlf {
namespace TLF_ISA {

constexpr int64_t kSide = 4;          // outputs and rows of a square, whose 16 sums end in one vector
constexpr int64_t kMostDotRows = 16;  // of x beside one reading of a weight
constexpr int64_t kDotDepth = 32;     // columns of a vector
constexpr int64_t kDotStep = 128;     // columns between two calls of a weight's step()
constexpr int64_t kDeep = 2048;       // columns of four outputs that leave room for a square's x in the nearest cache

// kSide outputs from first on, count of which there are, by width columns from the column at on.
struct Piece {
  int64_t first, count, at, width;
  bf16* buffer;  // [kSide, kDeep], for rows that do not lie in memory as whole vectors of bfloat16
};

// lane i = the sum of all lanes of sums[i]
TLF_INLINE __m512 add_lanes(const __m512* sums) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512* s = sums + 4 * i;
    const __m512 a = _mm512_unpacklo_ps(s[0], s[1]) + _mm512_unpackhi_ps(s[0], s[1]);
    const __m512 b = _mm512_unpacklo_ps(s[2], s[3]) + _mm512_unpackhi_ps(s[2], s[3]);
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    four[i] = _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
  }
  const auto halve = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return halve(halve(four[0], four[1]), halve(four[2], four[3]));
}

// lane 4 n + o = x[n] . w[o]; columns: whole vectors. step(k) is called before columns k.. of w are read.
template <int N, typename Step>
TLF_INLINE __m512 square(const bf16* w, int64_t ldw, const bf16* x, int64_t ldx, int64_t columns, const Step& step) {
  __m512 sums[kSide * kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide * kSide; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t from = 0; from < columns; from += kDotStep) {
    step(from);
    const int64_t stop = least(columns, from + kDotStep);
    for (int64_t k = from; k < stop; k += kDotDepth) {
      __m512bh weights[kSide];
#pragma GCC unroll 4
      for (int o = 0; o < kSide; ++o) weights[o] = (__m512bh)_mm512_loadu_si512(w + o * ldw + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m512bh with = (__m512bh)_mm512_loadu_si512(x + n * ldx + k);
#pragma GCC unroll 4
        for (int o = 0; o < kSide; ++o) sums[4 * n + o] = _mm512_dpbf16_ps(sums[4 * n + o], weights[o], with);
      }
    }
  }
  return add_lanes(sums);
}

template <typename Step>
TLF_INLINE __m512 square_of(int64_t rows, const bf16* w, int64_t ldw, const bf16* x, int64_t ldx, int64_t columns,
                            const Step& step) {
  if (rows >= 4) return square<4>(w, ldw, x, ldx, columns, step);
  if (rows == 3) return square<3>(w, ldw, x, ldx, columns, step);
  if (rows == 2) return square<2>(w, ldw, x, ldx, columns, step);
  return square<1>(w, ldw, x, ldx, columns, step);
}

// sums: lane 4 n + o, of up to four rows and count outputs, to y [rows, outputs]
TLF_INLINE void store_square(__m512 sums, const float* scale, const bf16* bias, bf16* y, int64_t rows, int64_t count,
                             int64_t outputs) {
  const __mmask8 mask = static_cast<__mmask8>((1 << count) - 1);
  if (scale != nullptr) sums *= _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(mask, scale));
  if (bias != nullptr) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, bias));
    sums += _mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
  }
  alignas(32) bf16 rounded[kSide * kSide];
  _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), (__m256i)_mm512_cvtneps_pbh(sums));
  for (int64_t n = 0; n < least(rows, kSide); ++n, y += outputs) {
    if (count == kSide) {
      std::memcpy(y, rounded + n * kSide, kSide * sizeof(bf16));
    } else {
      std::memcpy(y, rounded + n * kSide, count * sizeof(bf16));
    }
  }
}

// x [rows <= kMostDotRows, ldx], zeros from columns to whole units of the weight's kUnit columns. weight.rows_of(piece,
// &stride) is where its rows are, as whole units with zeros beyond. weight.step(piece, k, square, squares) comes before
// that square of the piece reads columns k..: other formats are decoded for the first one, beside its products; plain
// rows only asked for ahead.
template <typename Weight>
inline void multiply_in_dots(const Weight& weight, const bf16* x, int64_t ldx, const float* scale, const bf16* bias,
                             bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  alignas(64) bf16 buffer[kSide * kDeep];
  const int64_t squares = ceil_div(rows, kSide);
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += kSide) {
    const int64_t count = least(kSide, outputs - first);
    __m512 total[kMostDotRows / kSide] = {};
    for (int64_t at = 0; at < columns; at += kDeep) {
      const Piece piece{first, count, at, least(kDeep, columns - at), buffer};
      const int64_t whole = round_up(piece.width, Weight::kUnit);
      int64_t stride = kDeep;
      const bf16* w = weight.rows_of(piece, &stride);
      for (int64_t s = 0; s < squares; ++s) {
        const auto step = [&](int64_t k) { weight.step(piece, k, s, squares); };
        total[s] += square_of(rows - kSide * s, w, stride, x + kSide * s * ldx + at, ldx, whole, step);
      }
    }
    for (int64_t s = 0; s < squares; ++s) {
      store_square(total[s], scale == nullptr ? nullptr : scale + first, bias == nullptr ? nullptr : bias + first,
                   y + kSide * s * outputs + first, rows - kSide * s, count, outputs);
    }
  }
}

// weights [outputs, columns] as they lie in memory
struct PlainDots {
  static constexpr int64_t kUnit = kDotDepth;
  const bf16* w;
  int64_t columns;
  TLF_INLINE const bf16* rows_of(const Piece& piece, int64_t* stride) const {
    const bf16* from = w + piece.first * columns + piece.at;
    if (piece.count == kSide && piece.width % kDotDepth == 0) {
      *stride = columns;
      return from;
    }
    const int64_t whole = round_up(piece.width, kDotDepth);
    for (int64_t o = 0; o < kSide; ++o) {
      const int64_t n = o < piece.count ? piece.width : 0;
      bf16* to = piece.buffer + o * kDeep;
      std::memcpy(to, from + o * columns, n * sizeof(bf16));
      std::memset(to + n, 0, (whole - n) * sizeof(bf16));
    }
    return piece.buffer;
  }
  TLF_INLINE void step(const Piece& piece, int64_t k, int64_t square, int64_t squares) const {
    const bf16* next = w + (piece.first + kSide) * columns + piece.at + k;  // each square asks for its share of it
    for (int64_t o = kSide * square / squares; o < kSide * (square + 1) / squares; ++o) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kDotStep; line += kDotDepth) __builtin_prefetch(next + o * columns + line, 0, 2);
    }
  }
};

struct ByteDots {
  static constexpr int64_t kUnit = kDotDepth;
  const int8_t* w;
  int64_t columns;
  TLF_INLINE const bf16* rows_of(const Piece& piece, int64_t*) const { return piece.buffer; }
  TLF_INLINE void step(const Piece& piece, int64_t k, int64_t square, int64_t) const {
    if (square > 0) return;
    const int64_t stop = least(piece.width, k + kDotStep);
    for (int64_t o = 0; o < kSide; ++o) {
      const int8_t* from = w + (piece.first + o) * columns + piece.at;
      __builtin_prefetch(from + k + kSide * columns, 0, 2);
      __builtin_prefetch(from + k + 64 + kSide * columns, 0, 2);
      for (int64_t at = k; at < stop; at += kDotDepth) {
        const int64_t n = o < piece.count ? least(kDotDepth, stop - at) : 0;
        const __mmask32 mask = n == kDotDepth ? ~0u : (1u << n) - 1;
        const __m256i bytes = _mm256_maskz_loadu_epi8(mask, from + at);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
        _mm512_store_si512(piece.buffer + o * kDeep + at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    }
  }
};

TLF_INLINE PlainDots dots_from(const bf16* w, int64_t columns) { return {w, columns}; }
TLF_INLINE ByteDots dots_from(const int8_t* w, int64_t columns) { return {w, columns}; }

}  // namespace TLF_ISA
}  // namespace tlf
#endif
