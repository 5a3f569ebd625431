// decode_linear: a few rows times a weight that is read once, as fast as memory gives it.
#include <cstdint>

#include "tlf/decode.h"
#include "tlf/dots.h"
#include "tlf/kernel.h"
#include "tlf/tiles.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelBytes = 1 << 16;  // below this a thread team costs more than it saves
constexpr int64_t kChunk = 2 * kWidth;       // columns handled together
constexpr int64_t kBytesAhead = 4096;        // bytes of the weight that are asked for before they are needed

typedef uint32_t UVec __attribute__((vector_size(kWidth * 4), may_alias));
typedef uint32_t UVecU __attribute__((vector_size(kWidth * 4), may_alias, aligned(1)));
typedef int8_t Bytes __attribute__((vector_size(kWidth), may_alias, aligned(1)));

struct Pair {
  Vec first, second;
};

// kChunk weights as float. bf16 comes as the even and the odd ones, which is how spread() lays x out for it.
TLF_INLINE Pair weights(const bf16* w) {
  const UVec bits = *reinterpret_cast<const UVecU*>(w);
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
}
TLF_INLINE Pair weights(const float* w) { return {load(w), load(w + kWidth)}; }
TLF_INLINE Vec to_floats(const int8_t* w) {
#if defined(TLF_AVX512)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(w), Vec);
#endif
}
TLF_INLINE Pair weights(const int8_t* w) { return {to_floats(w), to_floats(w + kWidth)}; }

#if defined(TLF_TILES) || defined(TLF_DOTS)
template <typename W>
constexpr int64_t kFewRows = 4;  // so many rows are as fast with neither tiles nor dots
template <>
constexpr int64_t kFewRows<int8_t> = 1;
#endif

template <typename W>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<bf16> = true;

// x as float in chunks of the order of weights(), zeros up to a whole chunk.
template <typename W, typename T>
void spread(const T* x, int64_t ldx, int64_t rows, int64_t columns, float* scratch) {
  const int64_t padded = round_up(columns, kChunk), whole = columns / kChunk * kChunk;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const T* from = x + n * ldx;
    float* to = scratch + n * padded;
    const auto lay = [&](const T* values, float* out) {
      if constexpr (kEvenOdd<W>) {
        const Pair pair = weights(values);
        store(out, pair.first);
        store(out + kWidth, pair.second);
      } else {
        for (int i = 0; i < kChunk; ++i) out[i] = widen(values[i]);
      }
    };
    for (int64_t k = 0; k < whole; k += kChunk) lay(from + k, to + k);
    if (whole == columns) continue;
    T rest[kChunk] = {};
    std::memcpy(rest, from + whole, (columns - whole) * sizeof(T));
    lay(rest, to + whole);
  }
}

// total[n] = w . x[n]
template <int N, typename W>
TLF_INLINE void dot(const W* w, const float* x, int64_t columns, float* total) {
  const int64_t padded = round_up(columns, kChunk), whole = columns / kChunk * kChunk;
  Vec first[N], second[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) first[n] = second[n] = Vec{};
  const auto add = [&](const W* from, const float* with) {
    const Pair pair = weights(from);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      first[n] += pair.first * load(with + n * padded);
      second[n] += pair.second * load(with + n * padded + kWidth);
    }
  };
  constexpr int64_t kLine = 64 / sizeof(W) < kChunk ? kChunk : 64 / sizeof(W);
  int64_t k = 0;
  for (; k + kLine <= whole; k += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kBytesAhead, 0, 2);
#pragma GCC unroll 8
    for (int64_t at = 0; at < kLine; at += kChunk) add(w + k + at, x + k + at);
  }
  for (; k < whole; k += kChunk) add(w + k, x + k);
  if (k < columns) {
    W rest[kChunk] = {};
    std::memcpy(rest, w + k, (columns - k) * sizeof(W));
    add(rest, x + k);
  }
  for (int n = 0; n < N; ++n) {
    const Vec sum = first[n] + second[n];
    total[n] = 0.0f;
    for (int i = 0; i < kWidth; ++i) total[n] += sum[i];
  }
}

template <int N, typename W, typename T>
void multiply(const W* w, const float* scale, const T* bias, const float* x, T* y, int64_t outputs, int64_t columns) {
#pragma omp for schedule(static)
  for (int64_t o = 0; o < outputs; ++o) {
    float total[N];
    dot<N>(w + o * columns, x, columns, total);
    const float factor = scale == nullptr ? 1.0f : scale[o], shift = bias == nullptr ? 0.0f : widen(bias[o]);
    for (int n = 0; n < N; ++n) narrow(total[n] * factor + shift, y + n * outputs + o);
  }
}

#if defined(TLF_TILES)
TLF_INLINE void ask_ahead(const void* tile) {
  const char* at = static_cast<const char*>(tile) + 4 * kBytesAhead;
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) __builtin_prefetch(at + 64 * line, 0, 2);
}

struct PlainRows {
  const bf16* w;
  int64_t columns;
  TLF_INLINE void prefetch(int64_t first, int64_t k) const { ask_ahead(w + first * columns + k * kTileRows); }
  const bf16* rows_of(int64_t first, int64_t count, int64_t k, int64_t width, bf16* buffer, int64_t* stride) const {
    const bf16* from = w + first * columns + k;
    *stride = columns;
    if (count == kTileRows && width % kTileDepth == 0) return from;
    *stride = kTileBatch * kTileDepth;
    for (int64_t o = 0; o < kTileRows; ++o) {
      const int64_t n = o < count ? width : 0;
      std::memcpy(buffer + o * *stride, from + o * columns, n * sizeof(bf16));
      std::memset(buffer + o * *stride + n, 0, (*stride - n) * sizeof(bf16));
    }
    return buffer;
  }
};

TLF_INLINE void tiles_of(const bf16* x, int64_t ldx, const bf16* w, const float*, const bf16* bias, float* scratch,
                         bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  multiply_in_tiles(PlainRows{w, columns}, x, ldx, reinterpret_cast<bf16*>(scratch), bias, y, rows, outputs, columns);
}

constexpr int64_t kByteDepth = 64;  // columns of an int8 tile

TLF_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// x = step (256 high + low), two signed bytes an element: a fixed point of 16 bits under the row's largest value, so
// that int8 weights enter the tiles as they are. At high the high bytes of 16 rows, their low ones, then those of the
// next 16: tiles of B, [k / 4][row][k % 4]. What rows there are not holds anything, and ends in sums that nobody reads.
void split_rows(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, int8_t* high, float* step) {
  const int64_t bytes = round_up(columns, kByteDepth) * kTileRows;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* from = x + n * ldx;
    uint16_t top = 0;  // magnitudes of bf16 are ordered as integers, infinities and nan at the end
    for (int64_t k = 0; k < columns; ++k) {
      const uint16_t size = from[k].bits & 0x7fffu;
      top = top < size ? size : top;
    }
    constexpr float kMost = 32639.0f;  // 127 * 256 + 127
    const float largest = widen(bf16{top});
    const bool finite = top < 0x7f80u;
    const float inverse = finite && largest > 1e-30f ? kMost / largest : 0.0f;
    step[n] = finite ? largest / kMost : __builtin_nanf("");
    int8_t* to = high + n / kTileRows * 2 * bytes + 4 * (n % kTileRows);
    for (int64_t at = 0; at < columns; at += kByteDepth) {
      const int64_t width = least(kByteDepth, columns - at);
      int8_t tops[kByteDepth] = {}, lows[kByteDepth] = {};
      for (int64_t k = 0; k < width; ++k) {
        // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
        const int32_t bits = static_cast<int32_t>(float_bits(widen(from[at + k]) * inverse + 12582912.0f));
        tops[k] = static_cast<int8_t>((bits + 128) >> 8);
        lows[k] = static_cast<int8_t>(bits);
      }
      for (int64_t k = 0; k < kByteDepth; k += 4) {
        std::memcpy(to + (at + k) * kTileRows, tops + k, 4);
        std::memcpy(to + bytes + (at + k) * kTileRows, lows + k, 4);
      }
    }
  }
}

const int8_t* byte_rows(const int8_t* from, int64_t columns, int64_t count, int64_t width, int8_t* buffer,
                        int64_t* stride) {
  *stride = columns;
  if (count == kTileRows && width == kByteDepth) return from;
  *stride = kByteDepth;
  std::memset(buffer, 0, kTileRows * kByteDepth);
  for (int64_t o = 0; o < count; ++o) std::memcpy(buffer + o * kByteDepth, from + o * columns, width);
  return buffer;
}

template <bool Wide>
void byte_product(const int8_t* high, const float* step, const int8_t* w, const float* scale, const bf16* bias, bf16* y,
                  int64_t rows, int64_t outputs, int64_t columns) {
  const int64_t bytes = round_up(columns, kByteDepth) * kTileRows;
  const TileScope scope;
  alignas(64) int8_t buffer[kTileRows * kByteDepth];
  alignas(64) int32_t tops[kTileRows * kTileRows], lows[kTileRows * kTileRows];
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += kTileRows) {
    const int64_t count = least(kTileRows, outputs - first);
    tile_clear<0>();
    tile_clear<1>();
    if constexpr (Wide) tile_clear<2>();
    if constexpr (Wide) tile_clear<3>();
    for (int64_t k = 0; k < columns; k += kByteDepth) {
      ask_ahead(w + first * columns + k * kTileRows);
      int64_t stride = 0;
      const int8_t* a =
          byte_rows(w + first * columns + k, columns, count, least(kByteDepth, columns - k), buffer, &stride);
      const int8_t* b = high + k * kTileRows;
      tile_load<4>(a, stride);
      tile_load<5>(b, 64);
      tile_multiply_bytes<0, 4, 5>();
      tile_load<6>(b + bytes, 64);
      tile_multiply_bytes<1, 4, 6>();
      if constexpr (Wide) {
        tile_load<5>(b + 2 * bytes, 64);
        tile_multiply_bytes<2, 4, 5>();
        tile_load<6>(b + 3 * bytes, 64);
        tile_multiply_bytes<3, 4, 6>();
      }
    }
    const auto put = [&](int64_t from, int64_t some) {
      for (int64_t n = 0; n < some; ++n) {
        for (int64_t o = 0; o < count; ++o) {
          const float sum =
              256.0f * static_cast<float>(tops[o * kTileRows + n]) + static_cast<float>(lows[o * kTileRows + n]);
          const float shift = bias == nullptr ? 0.0f : widen(bias[first + o]);
          narrow(sum * (step[from + n] * scale[first + o]) + shift, y + (from + n) * outputs + first + o);
        }
      }
    };
    tile_store<0>(tops, 64);
    tile_store<1>(lows, 64);
    put(0, least(rows, kTileRows));
    if constexpr (Wide) {
      tile_store<2>(tops, 64);
      tile_store<3>(lows, 64);
      put(kTileRows, rows - kTileRows);
    }
  }
}

void tiles_of(const bf16* x, int64_t ldx, const int8_t* w, const float* scale, const bf16* bias, float* scratch,
              bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  float* step = scratch;  // [kRowsTogether], before the tiles
  int8_t* high = reinterpret_cast<int8_t*>(scratch + kRowsTogether);
  split_rows(x, ldx, rows, columns, high, step);
  if (rows > kTileRows) {
    byte_product<true>(high, step, w, scale, bias, y, rows, outputs, columns);
  } else {
    byte_product<false>(high, step, w, scale, bias, y, rows, outputs, columns);
  }
}
#elif defined(TLF_DOTS)
template <typename W>
void dots_of(const bf16* x, int64_t ldx, const W* w, const float* scale, const bf16* bias, float* scratch, bf16* y,
             int64_t rows, int64_t outputs, int64_t columns) {
  bf16* laid = reinterpret_cast<bf16*>(scratch);
  const int64_t padded = round_up(columns, kDotDepth);
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) copy_row(laid + n * padded, x + n * ldx, columns, padded);
  multiply_in_dots(dots_from(w, columns), laid, padded, scale, bias, y, rows, outputs, columns);
}
#endif

template <typename W, typename T>
void few(const T* x, int64_t ldx, const W* w, const float* scale, const T* bias, float* scratch, T* y, int64_t rows,
         int64_t outputs, int64_t columns) {
#if defined(TLF_TILES)
  if constexpr (sizeof(T) == 2) {
    if (rows > kFewRows<W>) {
      tiles_of(x, ldx, w, scale, bias, scratch, y, rows, outputs, columns);
      return;
    }
  }
#elif defined(TLF_DOTS)
  if constexpr (sizeof(T) == 2) {
    if (rows > kFewRows<W>) {
      dots_of(x, ldx, w, scale, bias, scratch, y, rows, outputs, columns);
      return;
    }
  }
#endif
  spread<W>(x, ldx, rows, columns, scratch);
  const int64_t padded = round_up(columns, kChunk);
  // more rows side by side than registers hold would spill
  constexpr int64_t most_rows = kWidth == 16 ? 8 : 4;
  while (rows > 0) {
    const int64_t n = rows >= most_rows ? most_rows : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    if (n == 8) multiply<8>(w, scale, bias, scratch, y, outputs, columns);
    if (n == 4) multiply<4>(w, scale, bias, scratch, y, outputs, columns);
    if (n == 2) multiply<2>(w, scale, bias, scratch, y, outputs, columns);
    if (n == 1) multiply<1>(w, scale, bias, scratch, y, outputs, columns);
    rows -= n, scratch += n * padded, y += n * outputs;
  }
}

}  // namespace

void linear_of_team(const void* x, int64_t ldx, const void* w, const float* scale, const void* bias, float* scratch,
                    void* y, int64_t rows, int64_t outputs, int64_t columns, int64_t dtype) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    const T* shift = static_cast<const T*>(bias);
    constexpr int64_t together = sizeof(T) == 2 ? kRowsTogether : 16;
    for (int64_t n = 0; n < rows; n += together) {
      const T* from = static_cast<const T*>(x) + n * ldx;
      T* to = static_cast<T*>(y) + n * outputs;
      const int64_t count = least(together, rows - n);
      if (scale != nullptr) {
        few(from, ldx, static_cast<const int8_t*>(w), scale, shift, scratch, to, count, outputs, columns);
      } else {
        few(from, ldx, static_cast<const T*>(w), scale, shift, scratch, to, count, outputs, columns);
      }
    }
  };
  if (dtype == kBFloat16) {
    run(bf16{});
  } else {
    run(0.0f);
  }
}

// x: [rows, columns], ldx elements a row. w: [outputs, columns] of x's dtype, or int8 where scale
// [outputs] is not null. bias: [outputs] of x's dtype or null. scratch: float [16 * (columns + 128)], aligned to 64
// bytes.
void decode_linear(const void* x, int64_t ldx, const void* w, const float* scale, const void* bias, float* scratch,
                   void* y, int64_t rows, int64_t outputs, int64_t columns, int64_t dtype) {
  const int64_t bytes = outputs * columns * (scale != nullptr ? 1 : dtype == kBFloat16 ? 2 : 4);
#pragma omp parallel if (bytes > kParallelBytes)
  linear_of_team(x, ldx, w, scale, bias, scratch, y, rows, outputs, columns, dtype);
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(decode_linear);
