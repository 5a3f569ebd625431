// Tiles of AMX: eight registers of 16 rows x 64 bytes. tdpbf16ps adds to a 16 x 16 float tile the product of a 16 x 32
// bfloat16 tile (row-major) and one of 16 rows that hold two neighbouring rows of the right factor each, interleaved.
//
// Only the amx pass includes this. The compiler knows nothing of tiles: every load names memory as clobbered, so that
// what was stored before it is there.
#pragma once

#include <cstdint>

#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {

constexpr int kTileRows = 16;   // and floats or lanes of two bfloat16 in a row
constexpr int kTilePairs = 32;  // bfloat16 in a row

// All eight tiles at full size, for the life of the object: one for each task, as its thread may change in between.
struct TileScope {
  TileScope() {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTileRows;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() { __asm__ volatile("tilerelease" ::: "memory"); }
};

// AddressSanitizer sees no tile: let it see the byte that it would have found.
TLF_INLINE void check_tile(const void* at, int64_t stride) {
#if defined(__SANITIZE_ADDRESS__)
  for (int row = 0; row < kTileRows; ++row) {
    char* from = const_cast<char*>(static_cast<const char*>(at)) + row * stride;
    const void* bad = __asan_region_is_poisoned(from, 64);
    if (bad != nullptr) *static_cast<const volatile char*>(bad);
  }
#else
  (void)at, (void)stride;
#endif
}

template <int To>
TLF_INLINE void tile_load(const void* from, int64_t stride) {  // stride in bytes
  check_tile(from, stride);
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(To) : "memory");
}
template <int From>
TLF_INLINE void tile_store(void* to, int64_t stride) {
  check_tile(to, stride);
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(From) : "memory");
}
template <int C, int A, int B>
TLF_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
TLF_INLINE void tile_multiply_bytes() {  // signed bytes into int32, four neighbouring rows of the right factor a lane
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int To>
TLF_INLINE void tile_clear() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(To));
}

// C[16 m, 16 n] = A[16 m, 32 k] B (m, n = 1 or 2), or C += AB; strides in bytes, to the next tile of a along a row of A
// 64, of b down 16 of its rows.
template <int M, int N, bool Add>
TLF_INLINE void tile_block(int64_t steps, const void* a, int64_t lda, const void* b, int64_t ldb, float* c,
                           int64_t ldc) {
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  char* out = reinterpret_cast<char*>(c);
  if constexpr (Add) {
    tile_load<0>(out, ldc);
    if constexpr (N == 2) tile_load<1>(out + 64, ldc);
    if constexpr (M == 2) tile_load<2>(out + 16 * ldc, ldc);
    if constexpr (M == 2 && N == 2) tile_load<3>(out + 16 * ldc + 64, ldc);
  } else {
    tile_clear<0>();
    if constexpr (N == 2) tile_clear<1>();
    if constexpr (M == 2) tile_clear<2>();
    if constexpr (M == 2 && N == 2) tile_clear<3>();
  }
  for (int64_t k = 0; k < steps; ++k, left += 64, right += 16 * ldb) {
    tile_load<6>(right, ldb);
    tile_load<4>(left, lda);
    tile_multiply<0, 4, 6>();
    if constexpr (N == 2) {
      tile_load<7>(right + 64, ldb);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (M == 2) {
      tile_load<5>(left + 16 * lda, lda);
      tile_multiply<2, 5, 6>();
      if constexpr (N == 2) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(out, ldc);
  if constexpr (N == 2) tile_store<1>(out + 64, ldc);
  if constexpr (M == 2) tile_store<2>(out + 16 * ldc, ldc);
  if constexpr (M == 2 && N == 2) tile_store<3>(out + 16 * ldc + 64, ldc);
}

}  // namespace TLF_ISA
}  // namespace tlf
