// The product of a few rows with a weight in AMX tiles, the weight being the LEFT operand: a tile of A is 16 rows of 32
// bf16 as they lie in an [N, K] matrix, so that the weight is streamed once in its stock layout. x, which is small, is
// packed as B.
//
// Only the amx pass has it; there TLF_TILES is defined.
#pragma once

#include "tlf/simd.h"

#if defined(TLF_ISA_IS_amx)
#define TLF_TILES 1
#include "tlf/amx.h"

namespace tlf {
namespace TLF_ISA {

constexpr int64_t kTileDepth = kTilePairs;  // columns of a bf16 tile of A, 1 KiB
constexpr int64_t kTileBatch = 4;           // tiles of A made together where they have to be made

// x [rows <= 16, columns] as tiles of B: packed[k / 2][row][k % 2], zeros beyond both ends. Pairs move as one lane.
inline void pack_rows(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* packed) {
  const int64_t lanes = round_up(columns, kTileDepth) / 2;
  uint32_t* to = reinterpret_cast<uint32_t*>(packed);
  std::memset(to, 0, lanes * kTileRows * 4);
  for (int64_t at = 0; at < columns / 2; at += kTileRows) {
    const int64_t stop = least(columns / 2, at + kTileRows);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t k = at; k < stop; ++k) std::memcpy(to + k * kTileRows + n, x + n * ldx + 2 * k, 4);
    }
  }
  if (columns % 2 == 0) return;
  for (int64_t n = 0; n < rows; ++n) to[columns / 2 * kTileRows + n] = x[n * ldx + columns - 1].bits;
}

TLF_INLINE int64_t packed_size(int64_t columns) { return round_up(columns, kTileDepth) * kTileRows; }

// Up to 32 rows by a team of threads, each of which packs some of the columns: those after the sixteenth row,
// where there are any, packed_size() further on.
inline void pack_rows_of_team(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* packed) {
  constexpr int64_t kPiece = 8 * kTileDepth;
#pragma omp for schedule(static)
  for (int64_t k = 0; k < columns; k += kPiece) {
    bf16* to = packed + k * kTileRows;
    for (int64_t n = 0; n < rows; n += kTileRows, to += packed_size(columns)) {
      pack_rows(x + n * ldx + k, ldx, least(kTileRows, rows - n), least(kPiece, columns - k), to);
    }
  }
}

// total: [16 outputs, 16 rows] to y [rows, outputs], rounded
template <typename T>
TLF_INLINE void store_product(const float* total, const T* bias, T* y, int64_t rows, int64_t count, int64_t outputs) {
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t o = 0; o < count; ++o) {
      const float shift = bias == nullptr ? 0.0f : widen(bias[o]);
      narrow(total[o * kTileRows + n] + shift, y + n * outputs + o);
    }
  }
}

// y [rows, outputs] = x Wᵀ + bias, by a team of threads. packed: pack_rows_of_team() of x. bias: [outputs] or null.
// w.rows_of(first, count, k, width, buffer, &stride): 16 rows of W (zeros beyond count) from column k on, zeros from
// width to the end of its tile; in place, or made in the buffer of 16 x 128. w.prefetch(first, k): what to fetch now.
// Wide: more rows than a tile has.
template <bool Wide, typename T, typename Source>
void product_in_tiles(const Source& w, const bf16* packed, const T* bias, T* y, int64_t rows, int64_t outputs,
                      int64_t columns) {
  const TileScope scope;
  alignas(64) bf16 buffer[kTileRows * kTileBatch * kTileDepth];
  alignas(64) float total[kTileRows * kTileRows];
  const bf16* more = packed + packed_size(columns);
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += kTileRows) {
    const int64_t count = least(kTileRows, outputs - first);
    tile_clear<0>();
    if constexpr (Wide) tile_clear<3>();
    for (int64_t k = 0; k < columns; k += kTileBatch * kTileDepth) {
      const int64_t width = least(kTileBatch * kTileDepth, columns - k);
      int64_t stride = 0;
      const bf16* a = w.rows_of(first, count, k, width, buffer, &stride);
      for (int64_t at = 0; at < width; at += kTileDepth) {
        w.prefetch(first, k + at);
        tile_load<1>(a + at, stride * sizeof(bf16));
        tile_load<2>(packed + (k + at) * kTileRows, 64);
        tile_multiply<0, 1, 2>();
        if constexpr (Wide) {
          tile_load<4>(more + (k + at) * kTileRows, 64);
          tile_multiply<3, 1, 4>();
        }
      }
    }
    const T* shift = bias == nullptr ? nullptr : bias + first;
    tile_store<0>(total, 64);
    store_product(total, shift, y + first, least(rows, kTileRows), count, outputs);
    if constexpr (Wide) {
      tile_store<3>(total, 64);
      store_product(total, shift, y + kTileRows * outputs + first, rows - kTileRows, count, outputs);
    }
  }
}

// packed: room for 32 rows.
template <typename T, typename Source>
void multiply_in_tiles(const Source& w, const bf16* x, int64_t ldx, bf16* packed, const T* bias, T* y, int64_t rows,
                       int64_t outputs, int64_t columns) {
  pack_rows_of_team(x, ldx, rows, columns, packed);
  if (rows > kTileRows) {
    product_in_tiles<true>(w, packed, bias, y, rows, outputs, columns);
  } else {
    product_in_tiles<false>(w, packed, bias, y, rows, outputs, columns);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
#endif
