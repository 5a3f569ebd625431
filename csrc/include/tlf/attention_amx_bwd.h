// The backward's meeting of a block of keys and the rows that see it in AMX tiles (bfloat16).
//
// Rows are taken kRun at a time. First S^T and dP^T in blocks of 32 keys x 32 rows, from which P^T and dS^T of the
// whole run are kept as bfloat16; then the three sums over them, each with as many steps as the run or the block
// allows:
//   dV += P^T dO, dK += dS^T Q (over rows), dQ^T += K^T dS^T (over keys).
// A block that no row sees is zero and, at the ends of a sum, left out.
#pragma once

#include "tlf/amx.h"
#include "tlf/attention_plan.h"

namespace tlf {
namespace TLF_ISA {

constexpr int64_t kRun = 512;                // rows
constexpr int64_t kRunKeys = 128;            // of a block
constexpr int64_t kSquare = 32;              // rows and keys of S^T at a time
constexpr int64_t kRunRow = kRun + kSquare;  // elements from key to key: an odd number of cache lines
constexpr int64_t kRunLanes = kRun + 16;     // the same, of pairs of keys

struct Gradient {
  const bf16 *keys, *values, *k_t;               // [.., padded] twice, [padded, ldk]; finite to the next whole square
  const float *q_t, *do_t, *q_lanes, *do_lanes;  // of each panel [padded / 2, kPanel]; pairs of rows [.., ld]
  const float *lse, *delta;                      // of each row
  float *dq_t, *dk, *dv;                         // of each panel [padded, kPanel]; [.., ld]
  bf16 *p, *ds;                                  // [kRunKeys, kRunRow]
  float *ds_lanes, *scores;                      // [kRunKeys / 2, kRunLanes]; [2, kSquare, kSquare]
  int64_t padded, ld, ldk, size, window, heads;
  float scale, softcap;
};

// Where P^T and dS^T of a square go.
struct Place {
  bf16 *p, *ds;
  float* lanes;
};

TLF_INLINE void store_pair(bf16* to, __m512i first, __m512i second) {
  _mm512_storeu_si512(to, first);
  _mm512_storeu_si512(to + kRunRow, second);
}

// P^T and dS^T of 32 keys x 32 rows from S^T and dP^T. Masked: some row does not see some key of them.
template <bool Capped, bool Masked>
TLF_NOINLINE void differentiate(const Gradient& g, const Limits& limits, const Range* ranges, int v0, int64_t j0,
                                int64_t j, int64_t row, const Place& to) {
  const float factor = g.scale * kLog2e;
  const Vec lse[2] = {load(g.lse + row), load(g.lse + row + kWidth)};
  const Vec delta[2] = {load(g.delta + row), load(g.delta + row + kWidth)};
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int64_t i = 0; i < kSquare; i += 2) {
    __m512i p_rows[2], ds_rows[2];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      Vec p[2], ds[2];
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const float* s = g.scores + (i + c) * kSquare + u * kWidth;
        const Vec x = load(s), dp = load(s + kSquare * kSquare);
        if constexpr (Capped) {
          const Vec t = tanhv(x * (g.scale / g.softcap));
          p[u] = exp2_short(t * (g.softcap * kLog2e) - lse[u]);
          ds[u] = p[u] * (dp - delta[u]) * (1.0f - t * t);
        } else {
          p[u] = exp2_short(x * factor - lse[u]);
          ds[u] = p[u] * (dp - delta[u]);
        }
        if constexpr (Masked) {
          const int64_t key = j + i + c;
          const IVec mask = sees(limits, v0 + u, static_cast<int32_t>(j0 + key));
          const bool inside = key >= ranges[u].begin && key < ranges[u].end;
          p[u] = inside ? select(mask, p[u], Vec{}) : Vec{};
          ds[u] = inside ? select(mask, ds[u], Vec{}) : Vec{};
        }
      }
      p_rows[c] = narrow_rows(p[0], p[1]);
      ds_rows[c] = narrow_rows(ds[0], ds[1]);
    }
    store_pair(to.p + i * kRunRow, p_rows[0], p_rows[1]);
    store_pair(to.ds + i * kRunRow, ds_rows[0], ds_rows[1]);
    const __m512i a = _mm512_unpacklo_epi16(ds_rows[0], ds_rows[1]);
    const __m512i b = _mm512_unpackhi_epi16(ds_rows[0], ds_rows[1]);
    float* lanes = to.lanes + i / 2 * kRunLanes;
    _mm512_storeu_si512(lanes, _mm512_permutex2var_epi64(a, low, b));
    _mm512_storeu_si512(lanes + kWidth, _mm512_permutex2var_epi64(a, high, b));
  }
}

inline void clear_square(const Place& to) {
  for (int64_t i = 0; i < kSquare; i += 2) {
    store_pair(to.p + i * kRunRow, _mm512_setzero_si512(), _mm512_setzero_si512());
    store_pair(to.ds + i * kRunRow, _mm512_setzero_si512(), _mm512_setzero_si512());
    store(to.lanes + i / 2 * kRunLanes, Vec{});
    store(to.lanes + i / 2 * kRunLanes + kWidth, Vec{});
  }
}

// The steps [first, last) that matter to a sum.
struct Steps {
  int64_t first = INT64_MAX, last = 0;
  void add(int64_t i) { first = least(first, i), last = most(last, i + 1); }
  int64_t count() const { return most(0, last - first); }
};

// C += AB for m x n tiles
TLF_INLINE void tiles_add(int64_t m, int64_t n, int64_t steps, const bf16* a, int64_t lda, const float* b, int64_t ldb,
                          float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i += 2) {
    const bf16* left = a + i * kTileRows * lda;
    float* out = c + i * kTileRows * ldc;
    for (int64_t j = 0; j < n; j += 2) {
      const float* right = b + j * kTileRows;
      float* to = out + j * kTileRows;
      const bool two = i + 1 < m, wide = j + 1 < n;
      if (two && wide) tile_block<2, 2, true>(steps, left, lda * 2, right, ldb * 4, to, ldc * 4);
      if (two && !wide) tile_block<2, 1, true>(steps, left, lda * 2, right, ldb * 4, to, ldc * 4);
      if (!two && wide) tile_block<1, 2, true>(steps, left, lda * 2, right, ldb * 4, to, ldc * 4);
      if (!two && !wide) tile_block<1, 1, true>(steps, left, lda * 2, right, ldb * 4, to, ldc * 4);
    }
  }
}

// Squares of one half of a panel, its rows at `at` of the run.
template <bool Capped>
inline void differentiate_half(const Gradient& g, const Limits& limits, int v0, int64_t a, int64_t n, int64_t j0,
                               int64_t panel, int64_t at, Steps* of_half, Steps* of_keys) {
  const Range ranges[2] = {visible(limits, v0, j0, n), visible(limits, v0 + 1, j0, n)};
  const int64_t steps = g.padded / kTilePairs, row = panel * kPanel + v0 * kWidth;
  constexpr int64_t ldq = kPanel * sizeof(float), lds = kSquare * sizeof(float);
  const float *q_t = g.q_t + panel * g.padded / 2 * kPanel + v0 * kWidth, *do_t = g.do_t + (q_t - g.q_t);
  const auto none = [&](const Range& r, int64_t j) { return j >= r.end || j + kSquare <= r.begin; };
  const auto all = [&](const Range& r, int64_t j) { return j >= r.full0 && j + kSquare <= r.full1; };
  for (int64_t j = 0; j < n; j += kSquare) {
    const Place to{g.p + j * kRunRow + at, g.ds + j * kRunRow + at, g.ds_lanes + j / 2 * kRunLanes + at};
    if (none(ranges[0], j) && none(ranges[1], j)) {
      clear_square(to);
      continue;
    }
    of_half->add(j / kSquare), of_keys[j / kSquare].add(at / kSquare);
    tile_block<2, 2, false>(steps, g.keys + (a + j) * g.padded, g.padded * 2, q_t, ldq, g.scores, lds);
    tile_block<2, 2, false>(steps, g.values + (a + j) * g.padded, g.padded * 2, do_t, ldq, g.scores + kSquare * kSquare,
                            lds);
    if (all(ranges[0], j) && all(ranges[1], j)) {
      differentiate<Capped, false>(g, limits, ranges, v0, j0, j, row, to);
    } else {
      differentiate<Capped, true>(g, limits, ranges, v0, j0, j, row, to);
    }
  }
}

// The keys [a, a + n) of the block, which are keys j0 .. of the span, and its panels [first, last).
inline void meet(const Gradient& g, const Span& span, int64_t a, int64_t n, int64_t j0, int64_t first, int64_t last) {
  const int64_t tiles = ceil_div(g.size, kTileRows);
  Limits limits;
  for (int64_t p0 = first; p0 < last; p0 += kRun / kPanel) {
    Steps of_halves[kRun / kSquare], of_keys[kRunKeys / kSquare];
    const int64_t p1 = least(last, p0 + kRun / kPanel);
    for (int64_t p = p0; p < p1; ++p) {
      limits.set(span, p, g.heads, g.window);
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = (p - p0) * kPanel + half * kSquare;
        const int v0 = static_cast<int>(half) * 2;
        if (g.softcap > 0) {
          differentiate_half<true>(g, limits, v0, a, n, j0, p, at, of_halves + at / kSquare, of_keys);
        } else {
          differentiate_half<false>(g, limits, v0, a, n, j0, p, at, of_halves + at / kSquare, of_keys);
        }
      }
    }
    for (int64_t j = 0; j < n; j += kSquare) {
      const Steps& rows = of_keys[j / kSquare];
      if (rows.count() == 0) continue;
      const int64_t at = rows.first * kSquare, pair = (p0 * kPanel + at) / 2 * g.ld, key = (a + j) * g.ld;
      const int64_t m = n - j > kTileRows ? 2 : 1;
      tiles_add(m, tiles, rows.count(), g.p + j * kRunRow + at, kRunRow, g.do_lanes + pair, g.ld, g.dv + key, g.ld);
      tiles_add(m, tiles, rows.count(), g.ds + j * kRunRow + at, kRunRow, g.q_lanes + pair, g.ld, g.dk + key, g.ld);
    }
    for (int64_t h = 0; h < (p1 - p0) * 2; ++h) {
      const Steps& keys = of_halves[h];
      if (keys.count() == 0) continue;
      const int64_t j = keys.first * kSquare;
      tiles_add(tiles, 2, keys.count(), g.k_t + a + j, g.ldk, g.ds_lanes + j / 2 * kRunLanes + h * kSquare, kRunLanes,
                g.dq_t + (p0 + h / 2) * g.padded * kPanel + h % 2 * kSquare, kPanel);
    }
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
