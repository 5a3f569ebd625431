// prefill_linear: some hundred rows times a weight in its stock layout. A GEMM library packs the weight in every call,
// which takes longer than so few rows; here x is packed, once, and the weight enters the AMX tiles as it lies. The
// other ISAs have nothing that beats torch.
#include <omp.h>

#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/simd.h"
#include "tlf/tiles.h"

#if defined(TLF_TILES)
namespace tlf {
namespace TLF_ISA {
namespace {

enum Activation : int64_t { kNone = 0, kGeluTanh = 1, kQuickGelu = 2, kSiluGate = 3 };  // as in ops/prefill_linear.py

// x sigmoid(p(x)) for each of them: tanh(u) is 2 sigmoid(2 u) - 1. The argument of exp2 stays where 1 / (1 + e) is
// finite.
TLF_INLINE Vec activate(Vec x, int64_t activation) {
  const Vec p = activation == kGeluTanh    ? x * (1.595769122f + 0.071354816f * x * x)
                : activation == kQuickGelu ? 1.702f * x
                                           : x;
  const Vec arg = -kLog2e * p, limit = splat(120.0f);
  const Vec e = 1.0f + exp2_short(arg < limit ? arg : limit);
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)e);
  return x * (r * (2.0f - e * r));
}

constexpr int64_t kBlock = 32;                     // rows and outputs of four accumulators
constexpr int64_t kTile = kTileRows * kTileDepth;  // elements of a packed tile, 1 KiB
constexpr int64_t kPackedBytes = 1 << 20;          // of packed x beside a block of the weight in the second-level cache

// x [16, 32] from column k on as a tile of B, zeros beyond rows and columns.
TLF_INLINE void pack_tile(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* tile) {
  alignas(64) bf16 whole[kTile];
  if (columns < kTileDepth || ldx % 2 != 0) {
    const int64_t width = least(columns, kTileDepth);
    std::memset(whole, 0, sizeof(whole));
    for (int64_t n = 0; n < rows; ++n) std::memcpy(whole + n * kTileDepth, x + n * ldx, width * sizeof(bf16));
    x = whole, ldx = kTileDepth;
  }
  transpose_block(reinterpret_cast<const uint32_t*>(x), ldx / 2, rows, kTileRows, reinterpret_cast<uint32_t*>(tile),
                  kTileRows);
}

// Rows first..first + 32 of the weight as bf16, [32, padded], zeros beyond the outputs and columns.
TLF_INLINE void copy_weights(const bf16* from, int64_t count, bf16* to) { std::memcpy(to, from, count * sizeof(bf16)); }
TLF_INLINE void copy_weights(const int8_t* from, int64_t count, bf16* to) {  // exact
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), (__m256i)_mm512_cvtneps_pbh(wide));
  }
  for (; k < count; ++k) narrow(static_cast<float>(from[k]), to + k);
}

// Two tiles of 16 rows each of the weight: neighbours, or those of a gate and of what it opens.
struct Halves {
  int64_t first[2], count[2];
};

template <typename W>
void make_block(const W* w, const Halves& halves, int64_t columns, int64_t padded, bf16* block) {
  for (int64_t o = 0; o < kBlock; ++o, block += padded) {
    const int half = o >= kTileRows;
    const int64_t at = o - half * kTileRows, made = at < halves.count[half] ? columns : 0;
    copy_weights(w + (halves.first[half] + at) * columns, made, block);
    std::memset(block + made, 0, (padded - made) * sizeof(bf16));
  }
}

TLF_INLINE __m512i in_pairs(Vec even, Vec odd) {  // lanes of two bfloat16
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
TLF_INLINE Vec evens(__m512i pairs) { return (Vec)_mm512_slli_epi32(pairs, 16); }
TLF_INLINE Vec odds(__m512i pairs) { return (Vec)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)); }
TLF_INLINE Vec rounded(Vec x) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}

// What becomes of the 32 x 32 sums of a block: scaled, shifted, activated, rounded and turned, added to, to y.
struct Epilogue {
  alignas(64) float scale[kBlock], bias[kBlock];  // of the block's outputs
  const bf16* residual;                           // laid out as y, or null
  bf16* y;
  int64_t rows, ldy, first, width, activation;

  void set(const Halves& halves, const float* scales, const bf16* biases) {
    for (int64_t o = 0; o < kBlock; ++o) {
      const int half = o >= kTileRows;
      const int64_t at = o - half * kTileRows;
      const bool known = at < halves.count[half];
      scale[o] = known && scales != nullptr ? scales[halves.first[half] + at] : 1.0f;
      bias[o] = known && biases != nullptr ? widen(biases[halves.first[half] + at]) : 0.0f;
    }
  }

  TLF_INLINE Vec value(const float* sums, int64_t o) const { return load(sums + o * kBlock) * scale[o] + bias[o]; }

  // sums [32 outputs, 32 rows] of the rows from ``row`` on; half: which 16 of them
  TLF_INLINE void finish(const float* sums, int64_t row, int half) const {
    row += half * kTileRows, sums += half * kTileRows;
    const int64_t height = least(kTileRows, rows - row);
    if (height <= 0) return;
    alignas(64) uint32_t pairs[kTileRows * kTileRows], turned[kTileRows * kTileRows];
    int64_t lanes = kTileRows;
    if (activation == kSiluGate) {
      lanes = kTileRows / 2;
      const auto opened = [&](int64_t o) {
        return rounded(activate(rounded(value(sums, o)), kSiluGate)) * rounded(value(sums, kTileRows + o));
      };
#pragma GCC unroll 2
      for (int64_t i = 0; i < lanes; ++i) {
        _mm512_store_si512(pairs + i * kTileRows, in_pairs(opened(2 * i), opened(2 * i + 1)));
      }
    } else if (activation != kNone) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < lanes; ++i) {
        const Vec even = activate(value(sums, 2 * i), activation), odd = activate(value(sums, 2 * i + 1), activation);
        _mm512_store_si512(pairs + i * kTileRows, in_pairs(even, odd));
      }
    } else {
#pragma GCC unroll 4
      for (int64_t i = 0; i < lanes; ++i) {
        _mm512_store_si512(pairs + i * kTileRows, in_pairs(value(sums, 2 * i), value(sums, 2 * i + 1)));
      }
    }
    bf16* to = y + row * ldy + first;
    if (width == kBlock && ldy % 2 == 0 && residual == nullptr) {
      transpose_block(pairs, kTileRows, kTileRows, height, reinterpret_cast<uint32_t*>(to), ldy / 2);
      return;
    }
    transpose_block(pairs, kTileRows, lanes, kTileRows, turned, kTileRows);
    const __mmask32 mask = static_cast<__mmask32>((uint64_t(1) << width) - 1);
    for (int64_t n = 0; n < height; ++n) {
      __m512i line = _mm512_load_si512(turned + n * kTileRows);
      if (residual != nullptr) {
        const __m512i other = _mm512_maskz_loadu_epi16(mask, residual + row * ldy + first + n * ldy);
        line = in_pairs(evens(line) + evens(other), odds(line) + odds(other));
      }
      _mm512_mask_storeu_epi16(to + n * ldy, mask, line);
    }
  }
};

// A tile that leaves the first-level cache to others.
template <int To>
TLF_INLINE void tile_stream(const void* from) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(To) : "memory");
}

// steps products of [32 outputs, 32] and [32, 32 rows] onto the accumulators 0..3. second: elements to
// the other 16 outputs. row_steps: tiles of 16 rows of x.
// ahead: so many lines a step of what is needed next are fetched meanwhile.
TLF_INLINE void multiply_steps(const bf16* w, int64_t ldw, int64_t second, const bf16* x, int64_t row_steps,
                               int64_t steps, const char** ahead, int64_t lines) {
  for (int64_t s = 0; s < steps; ++s, w += kTileDepth, x += kTile) {
    for (int64_t l = 0; l < lines; ++l, *ahead += 64) __builtin_prefetch(*ahead, 0, 2);
    tile_stream<6>(x);
    tile_load<4>(w, ldw * sizeof(bf16));
    tile_multiply<0, 4, 6>();
    tile_stream<7>(x + row_steps * kTile);
    tile_multiply<1, 4, 7>();
    tile_load<5>(w + second, ldw * sizeof(bf16));
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
}

TLF_INLINE void clear_sums() {
  tile_clear<0>();
  tile_clear<1>();
  tile_clear<2>();
  tile_clear<3>();
}
TLF_INLINE void store_sums(float* sums) {
  tile_store<0>(sums, kBlock * 4);
  tile_store<1>(sums + kTileRows, kBlock * 4);
  tile_store<2>(sums + kTileRows * kBlock, kBlock * 4);
  tile_store<3>(sums + kTileRows * kBlock + kTileRows, kBlock * 4);
}

template <typename W>
void in_tiles(const bf16* x, int64_t ldx, const W* w, const float* scale, const bf16* bias, int64_t activation,
              const bf16* residual, void* scratch, bf16* y, int64_t rows, int64_t outputs, int64_t columns) {
  const int64_t steps = ceil_div(columns, kTileDepth), padded = steps * kTileDepth;
  const int64_t row_tiles = round_up(rows, kBlock) / kTileRows, width = activation == kSiluGate ? kTileRows : kBlock,
                ldy = activation == kSiluGate ? outputs / 2 : outputs;
  const int64_t blocks = ceil_div(ldy, width);
  const int64_t room = most(kBlock, kPackedBytes / (padded * int64_t(sizeof(bf16))) / kBlock * kBlock);
  const int64_t piece = even_piece(rows, room, kBlock), pieces = ceil_div(rows, piece);
  bf16* packed = static_cast<bf16*>(scratch);
  const bool in_place = sizeof(W) == 2 && columns % kTileDepth == 0;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < row_tiles; ++t) {
      const int64_t height = clamp(rows - t * kTileRows, 0, kTileRows);
      for (int64_t s = 0; s < steps; ++s) {
        pack_tile(x + t * kTileRows * ldx + s * kTileDepth, ldx, height, columns - s * kTileDepth,
                  packed + (t * steps + s) * kTile);
      }
    }
    const TileScope scope;
    alignas(64) float sums[2][kBlock * kBlock];
    bf16* made = packed + (row_tiles * kTileRows + omp_get_thread_num() * kBlock) * padded;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pieces * blocks; ++task) {
      const int64_t first = task % blocks * width, start = task / blocks * piece;
      const int64_t row_blocks = ceil_div(least(rows, start + piece) - start, kBlock);
      const int64_t other = activation == kSiluGate ? ldy + first : first + kTileRows;
      const int64_t limit = activation == kSiluGate ? outputs : ldy;
      const Halves halves{{first, other}, {clamp(ldy - first, 0, kTileRows), clamp(limit - other, 0, kTileRows)}};
      const bf16* block = reinterpret_cast<const bf16*>(w + first * columns);
      int64_t ldw = columns, second = (other - first) * columns;
      if (!in_place || halves.count[0] < kTileRows || halves.count[1] < kTileRows) {
        make_block(w, halves, columns, padded, made);
        block = made, ldw = padded, second = kTileRows * padded;
      }
      const char* ahead = reinterpret_cast<const char*>(w + (first + width) * columns);
      const int64_t lines = ceil_div(width * sizeof(W) / 2, row_blocks);
      Epilogue epilogue;
      epilogue.set(halves, scale, bias);
      epilogue.residual = residual, epilogue.y = y, epilogue.rows = rows, epilogue.ldy = ldy;
      epilogue.first = first, epilogue.width = least(width, ldy - first), epilogue.activation = activation;
      const int64_t third = steps / 3;
      // the sums of rows are finished while the tiles work on the next ones
      for (int64_t r = 0; r <= row_blocks; ++r) {
        const int64_t row = start + r * kBlock;
        const bf16* from = packed + row * padded;
        const bool more = r < row_blocks;
        if (more) {
          clear_sums();
          multiply_steps(block, ldw, second, from, steps, third, &ahead, lines);
        }
        if (r > 0) epilogue.finish(sums[(r - 1) % 2], row - kBlock, 0);
        if (more) {
          multiply_steps(block + third * kTileDepth, ldw, second, from + third * kTile, steps, third, &ahead, lines);
        }
        if (r > 0) epilogue.finish(sums[(r - 1) % 2], row - kBlock, 1);
        if (more) {
          const int64_t done = 2 * third;
          multiply_steps(block + done * kTileDepth, ldw, second, from + done * kTile, steps, steps - done, &ahead,
                         lines);
          store_sums(sums[r % 2]);
        }
      }
    }
  }
}

}  // namespace

// All bfloat16. x: [rows, columns > 0], ldx elements a row. w: [outputs, columns], or int8 where scale [outputs] is not
// null. bias: [outputs] or null. residual: of y's shape or null. y: [rows, outputs], or half as many behind a gate.
// scratch, aligned to 64 bytes: [(rows up to a multiple of 32) + 32 * threads, columns up to a multiple of 32].
void prefill_linear(const void* x, int64_t ldx, const void* w, const float* scale, const void* bias, int64_t activation,
                    const void* residual, void* scratch, void* y, int64_t rows, int64_t outputs, int64_t columns) {
  const bf16 *from = static_cast<const bf16*>(x), *shift = static_cast<const bf16*>(bias);
  const bf16* other = static_cast<const bf16*>(residual);
  bf16* to = static_cast<bf16*>(y);
  if (scale != nullptr) {
    in_tiles(from, ldx, static_cast<const int8_t*>(w), scale, shift, activation, other, scratch, to, rows, outputs,
             columns);
  } else {
    in_tiles(from, ldx, static_cast<const bf16*>(w), scale, shift, activation, other, scratch, to, rows, outputs,
             columns);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
#else
namespace tlf {
namespace TLF_ISA {

void prefill_linear(const void*, int64_t, const void*, const float*, const void*, int64_t, const void*, void*, void*,
                    int64_t, int64_t, int64_t) {}

}  // namespace TLF_ISA
}  // namespace tlf
#endif

TLF_KERNEL(prefill_linear);
