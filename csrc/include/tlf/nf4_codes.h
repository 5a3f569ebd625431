// The product of a few bfloat16 rows with a weight of NF4 codes, in the order in which the codes leave their registers.
//
// By a team of threads. One to four rows are multiplied in vectors of 16-bit integers: exact to 3e-5 of a block's
// largest weight and 1e-5 of its largest x, and up to four times as fast as bfloat16 (docs/LOG.md). More rows, for
// which decoding weighs less, are multiplied in bfloat16: by tiles, or by the vectors of dots.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "tlf/dots.h"
#include "tlf/simd.h"
#include "tlf/tiles.h"

namespace tlf {
namespace TLF_ISA {

constexpr int64_t kParallelWeights = 1 << 16;  // below this a thread team costs more than it saves

alignas(64) const float kCodes[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

#if defined(TLF_AVX512BF16)
constexpr int64_t kCoded = 128;        // weights whose codes fill a register
constexpr int64_t kScaled = 64;        // weights of a scale, as the kernels below want it
constexpr int64_t kAheadBytes = 4096;  // of the codes, asked for before they are needed

// 16-bit integers multiply four times as fast as bfloat16 in vectors. Eight products of these sizes fit 31 bits.
constexpr float kCodeSize = 8191.0f, kMostX = 32767.0f;

// Eight words of 16 bits from places v, v + 4, v + 8, ... of 32.
TLF_INLINE __m128i every_fourth(__m512i words, int v) {
  return _mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 16 * v));
}

// The order of the codes: nibble v, lowest first, of word j of kCoded weights is weight 4 j + (v ^ 1). So a row is laid
// out as four vectors of 32 each kCoded elements, zeros to the end of the last.
TLF_INLINE void store_in_order(const __m512i* words, void* out) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      _mm_storeu_si128(static_cast<__m128i*>(out) + 4 * v + part, every_fourth(words[part], v ^ 1));
    }
  }
}
TLF_INLINE void load_block(const bf16* x, int64_t count, __m512i* words) {  // of kCoded elements, zeros beyond count
  for (int part = 0; part < 4; ++part, count -= 32) {
    const __mmask32 mask = count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
    words[part] = _mm512_maskz_loadu_epi16(mask, x + 32 * part);
  }
}

// x as integers under the largest magnitude of each kScaled elements. step: kWidth floats each kCoded elements: what
// one is worth times one of a code, in the lanes of their products. An infinity or nan makes it nan.
inline void as_integers(const bf16* x, int64_t columns, int16_t* out, float* step) {
  for (int64_t at = 0; at < columns; at += kCoded, out += kCoded, step += kWidth) {
    __m512i words[4];
    load_block(x + at, columns - at, words);
    __m512 worth[2];
    for (int half = 0; half < 2; ++half) {
      const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
      __m512i* w = words + 2 * half;
      const __m512i sizes = _mm512_max_epu16(_mm512_andnot_si512(sign, w[0]), _mm512_andnot_si512(sign, w[1]));
      const __m512i low = _mm512_and_si512(sizes, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(sizes, 16);
      const uint32_t top = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
      const float largest = widen(bf16{static_cast<uint16_t>(top)});
      const bool finite = top < 0x7f80u;
      const __m512 inverse = _mm512_set1_ps(finite && largest > 1e-30f ? kMostX / largest : 0.0f);
      worth[half] = _mm512_set1_ps(finite ? largest / (kMostX * kCodeSize) : __builtin_nanf(""));
      for (int part = 0; part < 2; ++part) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w[part], 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w[part], _mm512_set1_epi32(-65536)));
        const __m512i evens = _mm512_cvtps_epi32(even * inverse), odds = _mm512_cvtps_epi32(odd * inverse);
        w[part] = _mm512_mask_blend_epi16(0xaaaaaaaau, evens, _mm512_slli_epi32(odds, 16));
      }
    }
    store_in_order(words, out);
    _mm512_storeu_ps(step, _mm512_mask_blend_ps(0xff00, worth[0], worth[1]));
  }
}

TLF_INLINE __m512i load_codes(const uint8_t* codes, int64_t count) {
  if (count >= kCoded) return _mm512_loadu_si512(codes);
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}
TLF_INLINE __m512 load_scales(const float* absmax, int64_t count) {
  return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(absmax[0]), _mm512_set1_ps(count >= kCoded ? absmax[1] : 0.0f));
}

// total[n] = w . x[n] for a row of codes, whole blocks of kScaled
template <int N>
TLF_INLINE void dot_codes(const uint8_t* codes, const float* absmax, int64_t columns, __m512i table, const int16_t* x,
                          const float* step, float* total) {
  const int64_t padded = round_up(columns, kCoded);
  __m512 sum[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sum[n] = _mm512_setzero_ps();
  const auto add = [&](int64_t at, int64_t count) {
    const __m512i words = load_codes(codes + at / 2, count);
    const __m512 scale = load_scales(absmax + at / kScaled, count);
    __m512i w[4];  // the permutation looks at the low five bits only, and the table stands in it twice
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * v), table);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int16_t* with = x + n * padded + at;
      __m512i part = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) part = _mm512_dpwssd_epi32(part, w[v], _mm512_loadu_si512(with + 32 * v));
      const __m512 worth = _mm512_loadu_ps(step + (n * padded + at) / kCoded * kWidth);
      sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), scale * worth, sum[n]);
    }
  };
  int64_t at = 0;
  for (; at + kCoded <= columns; at += kCoded) {
    __builtin_prefetch(codes + at / 2 + kAheadBytes, 0, 2);
    add(at, kCoded);
  }
  if (at < columns) add(at, columns - at);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) total[n] = _mm512_reduce_add_ps(sum[n]);
}

template <int N>
inline void multiply_codes(const uint8_t* packed, const float* absmax, const bf16* bias, const int16_t* x,
                           const float* step, bf16* y, int64_t outputs, int64_t columns) {
  const __m512i codes = _mm512_cvtps_epi32(_mm512_load_ps(kCodes) * kCodeSize);
  const __m512i table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(codes));
#pragma omp for schedule(static)
  for (int64_t o = 0; o < outputs; ++o) {
    float total[N];
    dot_codes<N>(packed + o * columns / 2, absmax + o * columns / kScaled, columns, table, x, step, total);
    const float shift = bias == nullptr ? 0.0f : widen(bias[o]);
    for (int n = 0; n < N; ++n) narrow(total[n] + shift, y + n * outputs + o);
  }
}

inline void few_codes(const bf16* x, int64_t ldx, const uint8_t* packed, const float* absmax, const bf16* bias,
                      float* scratch, bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  const int64_t padded = round_up(columns, kCoded), steps = padded / kCoded * kWidth;
  int16_t* laid = reinterpret_cast<int16_t*>(scratch);
  float* step = scratch + rows * padded / 2;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) as_integers(x + n * ldx, columns, laid + n * padded, step + n * steps);
  while (rows > 0) {
    const int64_t n = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    if (n == 4) multiply_codes<4>(packed, absmax, bias, laid, step, y, outputs, columns);
    if (n == 2) multiply_codes<2>(packed, absmax, bias, laid, step, y, outputs, columns);
    if (n == 1) multiply_codes<1>(packed, absmax, bias, laid, step, y, outputs, columns);
    rows -= n, laid += n * padded, step += n * steps, y += n * outputs;
  }
}

// kCoded weights as bfloat16 in the order of their codes
TLF_INLINE void decode(const uint8_t* codes, const float* absmax, int64_t count, bf16* out) {
  const __m512i words = load_codes(codes, count);
  const __m512 values = _mm512_load_ps(kCodes), second = _mm512_set1_ps(count >= kCoded ? absmax[1] : 0.0f);
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values * second, values * _mm512_set1_ps(absmax[0]));
  const __m512i low = _mm512_set1_epi16(15);  // and the second half of the words looks in the second half of the table
  const __m512i half = _mm512_mask_set1_epi16(_mm512_setzero_si512(), 0xffff0000u, 16);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4 * v), low, half, 0xea);  // a & b | c
    _mm512_store_si512(out + 32 * v, _mm512_permutexvar_epi16(index, table));
  }
}

// x as bfloat16 in the order of the codes, zeros to a whole kCoded
inline void lay_rows(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* laid) {
  const int64_t padded = round_up(columns, kCoded);
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t at = 0; at < columns; at += kCoded) {
      __m512i words[4];
      load_block(x + n * ldx + at, columns - at, words);
      store_in_order(words, laid + n * padded + at);
    }
  }
}
#endif

#if defined(TLF_DOTS)
static_assert(kDotStep == kCoded && kDeep % kCoded == 0);

struct CodedDots {
  static constexpr int64_t kUnit = kCoded;  // whose weights come in an order of their own
  const uint8_t* packed;
  const float* absmax;
  int64_t columns;
  TLF_INLINE const bf16* rows_of(const Piece& piece, int64_t*) const {
    if (piece.count < kSide) std::memset(static_cast<void*>(piece.buffer), 0, kSide * kDeep * sizeof(bf16));
    return piece.buffer;
  }
  TLF_INLINE void step(const Piece& piece, int64_t k, int64_t square, int64_t) const {
    if (square > 0) return;
    for (int64_t o = 0; o < piece.count; ++o) {
      const int64_t start = (piece.first + o) * columns + piece.at + k;
      __builtin_prefetch(packed + (start + kSide * columns) / 2, 0, 2);
      decode(packed + start / 2, absmax + start / kScaled, piece.width - k, piece.buffer + o * kDeep + k);
    }
  }
};

inline void few_in_dots(const bf16* x, int64_t ldx, const uint8_t* packed, const float* absmax, const bf16* bias,
                        float* scratch, bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  bf16* laid = reinterpret_cast<bf16*>(scratch);
  lay_rows(x, ldx, rows, columns, laid);
  multiply_in_dots(CodedDots{packed, absmax, columns}, laid, round_up(columns, kCoded), nullptr, bias, y, rows, outputs,
                   columns);
}
#endif

#if defined(TLF_TILES)
constexpr int64_t kTall = 2 * kTileRows;  // outputs side by side, so that a tile of x is read once for two of weights

inline void few_in_tiles(const bf16* x, int64_t ldx, const uint8_t* packed, const float* absmax, const bf16* bias,
                         float* scratch, bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  const int64_t padded = round_up(columns, kCoded);
  char* tiles = reinterpret_cast<char*>(scratch);
  bf16* laid = reinterpret_cast<bf16*>(scratch) + kTileRows * padded;
  lay_rows(x, ldx, rows, columns, laid);
#pragma omp single
  transpose(laid, padded / 2, rows, padded / 2, tiles, kTileRows);
  const TileScope scope;
  alignas(64) bf16 w[kTall * kCoded] = {};
  alignas(64) float sums[2 * kTall * kTileRows];
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += kTall) {
    const int64_t count = least(kTall, outputs - first);
    tile_clear<0>(), tile_clear<1>(), tile_clear<2>(), tile_clear<3>();
    for (int64_t at = 0; at < columns; at += kCoded) {
      for (int64_t o = 0; o < count; ++o) {
        const int64_t start = (first + o) * columns + at;
        __builtin_prefetch(packed + (start + kTall * columns) / 2, 0, 2);
        decode(packed + start / 2, absmax + start / kScaled, columns - at, w + o * kCoded);
      }
      const char* b = tiles + at * kTileRows * sizeof(bf16);
      constexpr int64_t stride = kCoded * sizeof(bf16), down = kTileRows * kCoded;
      // two sums each, as one product has to wait for the one before it
      tile_load<6>(b, 64), tile_load<4>(w, stride), tile_multiply<0, 4, 6>();
      tile_load<5>(w + down, stride), tile_multiply<1, 5, 6>();
      tile_load<7>(b + 1024, 64), tile_load<4>(w + 32, stride), tile_multiply<2, 4, 7>();
      tile_load<5>(w + down + 32, stride), tile_multiply<3, 5, 7>();
      tile_load<6>(b + 2048, 64), tile_load<4>(w + 64, stride), tile_multiply<0, 4, 6>();
      tile_load<5>(w + down + 64, stride), tile_multiply<1, 5, 6>();
      tile_load<7>(b + 3072, 64), tile_load<4>(w + 96, stride), tile_multiply<2, 4, 7>();
      tile_load<5>(w + down + 96, stride), tile_multiply<3, 5, 7>();
    }
    constexpr int64_t tile = kTileRows * kTileRows;
    tile_store<0>(sums, 64), tile_store<1>(sums + tile, 64);
    tile_store<2>(sums + 2 * tile, 64), tile_store<3>(sums + 3 * tile, 64);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t o = 0; o < count; ++o) {
        const float shift = bias == nullptr ? 0.0f : widen(bias[first + o]);
        const float* from = sums + o * kTileRows + n;
        narrow(from[0] + from[2 * tile] + shift, y + n * outputs + first + o);
      }
    }
  }
}
#endif

}  // namespace TLF_ISA
}  // namespace tlf
