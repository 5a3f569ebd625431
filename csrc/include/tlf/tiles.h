// The product of a few rows with a weight in AMX tiles, the weight being the LEFT operand: a tile of A is 16 rows of 32
// bf16 as they lie in an [N, K] matrix, so that the weight is streamed once in its stock layout. x, which is small, is
// packed as B.
//
// Needs GCC's target attribute and a kernel that grants tiles to the process; tiles_allowed() asks both the CPU and it.
#pragma once

#include "tlf/attention_simd.h"

#if defined(TLF_ISA_IS_avx512bf16) && defined(__linux__)
#define TLF_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tlf {
namespace TLF_ISA {

constexpr int64_t kTileRows = 16, kTileDepth = 32;  // of a bf16 tile of A: 1 KiB
constexpr int64_t kTileBatch = 4;                   // tiles of A made together where they have to be made

#if defined(TLF_TILES)
#define TLF_TILE_CODE __attribute__((target("amx-tile,amx-bf16,amx-int8")))

inline bool ask_for_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16_tiles = (d >> 22) & 1u, tiles = (d >> 24) & 1u, int8_tiles = (d >> 25) & 1u;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return bf16_tiles && tiles && int8_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
inline bool tiles_allowed() {
  static const bool allowed = ask_for_tiles();
  return allowed;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16};
};

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

// y [rows, outputs] = x Wᵀ + bias. packed: pack_rows() of x. bias: [outputs] or null.
// w.rows_of(first, count, k, width, buffer, &stride): 16 rows of W (zeros beyond count) from column k on, zeros from
// width to the end of its tile; in place, or made in the buffer of 16 x 128. w.prefetch(first, k): what to fetch now.
template <typename T, typename Source>
TLF_TILE_CODE void product_in_tiles(const Source& w, const bf16* packed, const T* bias, T* y, int64_t rows,
                                    int64_t outputs, int64_t columns) {
#pragma omp parallel
  {
    const TileConfig config;
    _tile_loadconfig(&config);
    alignas(64) bf16 buffer[kTileRows * kTileBatch * kTileDepth];
    alignas(64) float total[kTileRows * kTileRows];
#pragma omp for schedule(static)
    for (int64_t first = 0; first < outputs; first += kTileRows) {
      const int64_t count = least(kTileRows, outputs - first);
      _tile_zero(0);
      for (int64_t k = 0; k < columns; k += kTileBatch * kTileDepth) {
        const int64_t width = least(kTileBatch * kTileDepth, columns - k);
        int64_t stride = 0;
        const bf16* a = w.rows_of(first, count, k, width, buffer, &stride);
        for (int64_t at = 0; at < width; at += kTileDepth) {
          w.prefetch(first, k + at);
          _tile_loadd(1, a + at, stride * sizeof(bf16));
          _tile_loadd(2, packed + (k + at) * kTileRows, 64);
          _tile_dpbf16ps(0, 1, 2);
        }
      }
      _tile_stored(0, total, 64);
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t o = 0; o < count; ++o) {
          const float shift = bias == nullptr ? 0.0f : widen(bias[first + o]);
          narrow(total[o * kTileRows + n] + shift, y + n * outputs + first + o);
        }
      }
    }
    _tile_release();
  }
}
#endif

}  // namespace TLF_ISA
}  // namespace tlf
