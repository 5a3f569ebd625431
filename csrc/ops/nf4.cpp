// nf4: pieces of a 4-bit weight dequantized, and the product of a few rows with the packed weight itself.
#include <cstdint>

#include "tlf/decode.h"
#include "tlf/kernel.h"
#include "tlf/nf4_codes.h"
#include "tlf/tiles.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kChunk = 2 * kWidth;  // weights of one vector of bytes

typedef uint32_t UVec __attribute__((vector_size(kWidth * 4), may_alias));

// the weights at even and at odd places among kChunk of them
struct Halves {
  Vec even, odd;
};

#if defined(TLF_AVX512)
TLF_INLINE Halves look_up(const uint8_t* bytes) {
  const __m512 codes = _mm512_load_ps(kCodes);
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  // the permutation looks at the low four bits only
  return {(Vec)_mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), codes), (Vec)_mm512_permutexvar_ps(index, codes)};
}
#elif defined(TLF_ISA_IS_avx2)
TLF_INLINE Vec pick(__m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kCodes), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kCodes + 8), index);
  return (Vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
TLF_INLINE Halves look_up(const uint8_t* bytes) {
  const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return {pick(_mm256_srli_epi32(index, 4)), pick(index)};
}
#else
TLF_INLINE Halves look_up(const uint8_t* bytes) {
  Halves w;
  for (int i = 0; i < kWidth; ++i) {
    w.even[i] = kCodes[bytes[i] >> 4];
    w.odd[i] = kCodes[bytes[i] & 15];
  }
  return w;
}
#endif

TLF_INLINE void store_chunk(float* out, Vec even, Vec odd) {
  for (int i = 0; i < kWidth; ++i) {
    out[2 * i] = even[i];
    out[2 * i + 1] = odd[i];
  }
}

// The kChunk-wise part of a block whose scale is the same: returns how many weights it made.
TLF_INLINE int64_t chunks(const uint8_t* bytes, float scale, int64_t count, float* out) {
  int64_t at = 0;
  for (; at + kChunk <= count; at += kChunk) {
    const Halves w = look_up(bytes + at / 2);
    store_chunk(out + at, w.even * scale, w.odd * scale);
  }
  return at;
}
// round to nearest even in integers: vcvtneps2bf16 would flush denormals, which bitsandbytes does not
TLF_INLINE UVec rounded(Vec x) {
  const UVec bits = (UVec)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

#if defined(TLF_AVX512)
// The 16 values of a block are rounded once, then 32 weights are one permutation of words: it looks at the low five
// bits of an index, so that the table stands in the register twice.
TLF_INLINE int64_t chunks(const uint8_t* bytes, float scale, int64_t count, bf16* out) {
  const UVec values = rounded((Vec)_mm512_load_ps(kCodes) * scale) >> 16;
  const __m512i table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16((__m512i)values));
  int64_t at = 0;
  for (; at + kChunk <= count; at += kChunk) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(out + at, _mm512_permutexvar_epi16(index, table));
  }
  return at;
}
#else
TLF_INLINE void store_chunk(bf16* out, Vec even, Vec odd) {
  const UVec pairs = (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
  store(reinterpret_cast<float*>(out), (Vec)pairs);
}
TLF_INLINE int64_t chunks(const uint8_t* bytes, float scale, int64_t count, bf16* out) {
  int64_t at = 0;
  for (; at + kChunk <= count; at += kChunk) {
    const Halves w = look_up(bytes + at / 2);
    store_chunk(out + at, w.even * scale, w.odd * scale);
  }
  return at;
}
#endif

// Weights start..start + count of the flattened matrix. Blocks have an even size, so only the ends are odd.
template <typename T>
void dequantize(const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t start, int64_t count, T* out) {
  int64_t at = start;
  const int64_t stop = start + count;
  if (at % 2 != 0 && at < stop) {
    narrow(kCodes[packed[at / 2] & 15] * absmax[at / blocksize], out++);
    ++at;
  }
  while (at < stop) {
    const int64_t block = at / blocksize;
    const int64_t end = least(stop, (block + 1) * blocksize);
    const float scale = absmax[block];
    const int64_t made = chunks(packed + at / 2, scale, end - at, out);
    at += made, out += made;
    for (; at + 2 <= end; at += 2, out += 2) {
      narrow(kCodes[packed[at / 2] >> 4] * scale, out);
      narrow(kCodes[packed[at / 2] & 15] * scale, out + 1);
    }
    if (at < end) {
      narrow(kCodes[packed[at / 2] >> 4] * scale, out++);
      ++at;
    }
  }
}

template <typename T>
void tile_of(const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t columns, int64_t row,
             int64_t column, T* out, int64_t ldo, int64_t height, int64_t width) {
#pragma omp parallel for schedule(static) if (height * width > kParallelWeights)
  for (int64_t i = 0; i < height; ++i) {
    dequantize(packed, absmax, blocksize, (row + i) * columns + column, width, out + i * ldo);
  }
}

// x: each row as its even elements, then its odd ones. total[n] = x[n] . weights of the row that begins at start.
template <int N>
TLF_INLINE void dot(const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t start, int64_t columns,
                    const float* x, float* total) {
  const int64_t half = columns / 2;
  Vec sum[N];
  float rest[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) sum[n] = Vec{}, rest[n] = 0.0f;
  int64_t block = start / blocksize;
  int64_t end = (block + 1) * blocksize - start;
  for (int64_t at = 0; at < columns; ++block, end += blocksize) {
    const int64_t stop = least(columns, end);
    const float scale = absmax[block];
    Vec part[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) part[n] = Vec{};
    for (; at + kChunk <= stop; at += kChunk) {
      const Halves w = look_up(packed + (start + at) / 2);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const float* from = x + n * columns + at / 2;
        part[n] += w.even * load(from);
        part[n] += w.odd * load(from + half);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[n] += part[n] * scale;
    for (; at < stop; at += 2) {
      const uint8_t byte = packed[(start + at) / 2];
      const float even = kCodes[byte >> 4] * scale, odd = kCodes[byte & 15] * scale;
      for (int n = 0; n < N; ++n) {
        const float* from = x + n * columns + at / 2;
        rest[n] += even * from[0] + odd * from[half];
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    total[n] = rest[n];
    for (int i = 0; i < kWidth; ++i) total[n] += sum[n][i];
  }
}

template <typename T, int N>
void multiply(const uint8_t* packed, const float* absmax, int64_t blocksize, const T* bias, const float* x, T* y,
              int64_t outputs, int64_t columns) {
#pragma omp for schedule(static)
  for (int64_t o = 0; o < outputs; ++o) {
    float total[N];
    dot<N>(packed, absmax, blocksize, o * columns, columns, x, total);
    const float shift = bias == nullptr ? 0.0f : widen(bias[o]);
    for (int n = 0; n < N; ++n) narrow(total[n] + shift, y + n * outputs + o);
  }
}

#if defined(TLF_TILES) || defined(TLF_DOTS)
constexpr int64_t kFewRows = 4;  // so many rows are faster in vectors of integers
#endif

#if defined(TLF_TILES)
struct CodedRows {
  const uint8_t* packed;
  const float* absmax;
  int64_t blocksize, columns;
  TLF_INLINE void prefetch(int64_t first, int64_t k) const {
    const uint8_t* at = packed + (first * columns + k * kTileRows) / 2 + 8192;
    for (int line = 0; line < 4; ++line) __builtin_prefetch(at + 64 * line, 0, 2);
  }
  const bf16* rows_of(int64_t first, int64_t count, int64_t k, int64_t width, bf16* buffer, int64_t* stride) const {
    *stride = kTileBatch * kTileDepth;
    for (int64_t o = 0; o < kTileRows; ++o, buffer += *stride) {
      const int64_t n = o < count ? width : 0;
      dequantize(packed, absmax, blocksize, (first + o) * columns + k, n, buffer);
      if (n < *stride) std::memset(buffer + n, 0, (*stride - n) * sizeof(bf16));
    }
    return buffer - kTileRows * *stride;
  }
};
#endif

template <typename T>
void few(const T* x, int64_t ldx, const uint8_t* packed, const float* absmax, int64_t blocksize, const T* bias,
         float* scratch, T* y, int64_t rows, int64_t outputs, int64_t columns) {
#if defined(TLF_AVX512BF16)
  if constexpr (sizeof(T) == 2) {
    const bool whole = blocksize == kScaled && columns % kScaled == 0;
#if defined(TLF_TILES)
    if (whole && rows > 2 && rows <= kTileRows) {
      few_in_tiles(x, ldx, packed, absmax, bias, scratch, y, rows, outputs, columns);
      return;
    }
    if (rows > kFewRows) {
      multiply_in_tiles(CodedRows{packed, absmax, blocksize, columns}, x, ldx, reinterpret_cast<bf16*>(scratch), bias,
                        y, rows, outputs, columns);
      return;
    }
#elif defined(TLF_DOTS)
    if (whole && rows > kFewRows) {
      few_in_dots(x, ldx, packed, absmax, bias, scratch, y, rows, outputs, columns);
      return;
    }
#endif
    if (whole) {
      few_codes(x, ldx, packed, absmax, bias, scratch, y, rows, outputs, columns);
      return;
    }
  }
#endif
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    float* to = scratch + n * columns;
    for (int64_t i = 0; i < columns / 2; ++i) {
      to[i] = widen(x[n * ldx + 2 * i]);
      to[columns / 2 + i] = widen(x[n * ldx + 2 * i + 1]);
    }
  }
  // more rows side by side than registers hold would spill
  constexpr int most_rows = kWidth == 16 ? 8 : 4;
  while (rows > 0) {
    const int64_t n = rows >= most_rows ? most_rows : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    if (n == 8) multiply<T, 8>(packed, absmax, blocksize, bias, scratch, y, outputs, columns);
    if (n == 4) multiply<T, 4>(packed, absmax, blocksize, bias, scratch, y, outputs, columns);
    if (n == 2) multiply<T, 2>(packed, absmax, blocksize, bias, scratch, y, outputs, columns);
    if (n == 1) multiply<T, 1>(packed, absmax, blocksize, bias, scratch, y, outputs, columns);
    rows -= n, scratch += n * columns, y += n * outputs;
  }
}

}  // namespace

// out: [height, width], ldo elements a row = W[row.., column..] of a weight with that many columns.
void nf4_tile(const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t columns, int64_t row,
              int64_t column, void* out, int64_t ldo, int64_t height, int64_t width, int64_t dtype) {
  if (dtype == kBFloat16) {
    tile_of(packed, absmax, blocksize, columns, row, column, static_cast<bf16*>(out), ldo, height, width);
  } else {
    tile_of(packed, absmax, blocksize, columns, row, column, static_cast<float*>(out), ldo, height, width);
  }
}

void nf4_of_team(const void* x, int64_t ldx, const uint8_t* packed, const float* absmax, int64_t blocksize,
                 const void* bias, float* scratch, void* y, int64_t rows, int64_t outputs, int64_t columns,
                 int64_t dtype) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    constexpr int64_t together = sizeof(T) == 2 ? kRowsTogether : 16;
    for (int64_t n = 0; n < rows; n += together) {
      few(static_cast<const T*>(x) + n * ldx, ldx, packed, absmax, blocksize, static_cast<const T*>(bias), scratch,
          static_cast<T*>(y) + n * outputs, least(together, rows - n), outputs, columns);
    }
  };
  if (dtype == kBFloat16) {
    run(bf16{});
  } else {
    run(0.0f);
  }
}

// x: [rows, columns], columns even. bias: [outputs] or null. y: [rows, outputs].
// scratch: float [16 * (columns + 128)], aligned to 64 bytes.
void nf4_linear_few(const void* x, int64_t ldx, const uint8_t* packed, const float* absmax, int64_t blocksize,
                    const void* bias, float* scratch, void* y, int64_t rows, int64_t outputs, int64_t columns,
                    int64_t dtype) {
#pragma omp parallel if (outputs * columns > kParallelWeights)
  nf4_of_team(x, ldx, packed, absmax, blocksize, bias, scratch, y, rows, outputs, columns, dtype);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(nf4_tile);
TLF_KERNEL(nf4_linear_few);
