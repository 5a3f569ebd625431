// The product of a few rows with a weight in AMX tiles, the weight being the LEFT operand: a tile of A is 16 rows of 32
// bf16 as they lie in an [N, K] matrix, so that the weight is streamed once in its stock layout. x, which is small, is
// packed as B.
//
// Only the amx pass has it; there TLF_TILES is defined.
#pragma once

#include "tlf/attention_simd.h"

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

// The same by a team of threads: each packs some of the columns.
inline void pack_rows_of_team(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* packed) {
  constexpr int64_t kPiece = 8 * kTileDepth;
#pragma omp for schedule(static)
  for (int64_t k = 0; k < columns; k += kPiece) {
    pack_rows(x + k, ldx, rows, least(kPiece, columns - k), packed + k * kTileRows);
  }
}

// y [rows, outputs] = x Wᵀ + bias, by a team of threads. packed: pack_rows() of x. bias: [outputs] or null.
// w.rows_of(first, count, k, width, buffer, &stride): 16 rows of W (zeros beyond count) from column k on, zeros from
// width to the end of its tile; in place, or made in the buffer of 16 x 128. w.prefetch(first, k): what to fetch now.
template <typename T, typename Source>
void product_in_tiles(const Source& w, const bf16* packed, const T* bias, T* y, int64_t rows, int64_t outputs,
                      int64_t columns) {
  const TileScope scope;
  alignas(64) bf16 buffer[kTileRows * kTileBatch * kTileDepth];
  alignas(64) float total[kTileRows * kTileRows];
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += kTileRows) {
    const int64_t count = least(kTileRows, outputs - first);
    tile_clear<0>();
    for (int64_t k = 0; k < columns; k += kTileBatch * kTileDepth) {
      const int64_t width = least(kTileBatch * kTileDepth, columns - k);
      int64_t stride = 0;
      const bf16* a = w.rows_of(first, count, k, width, buffer, &stride);
      for (int64_t at = 0; at < width; at += kTileDepth) {
        w.prefetch(first, k + at);
        tile_load<1>(a + at, stride * sizeof(bf16));
        tile_load<2>(packed + (k + at) * kTileRows, 64);
        tile_multiply<0, 1, 2>();
      }
    }
    tile_store<0>(total, 64);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t o = 0; o < count; ++o) {
        const float shift = bias == nullptr ? 0.0f : widen(bias[first + o]);
        narrow(total[o * kTileRows + n] + shift, y + n * outputs + first + o);
      }
    }
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
#endif
