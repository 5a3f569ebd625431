// The forward's meeting of a panel of query rows and a chunk of keys in AMX tiles (bfloat16).
//
// As on the other paths keys run down and query rows across. Half a panel at a time: S^T = K Q^T in blocks of 32 keys x
// 32 rows; then, for 16 rows, 32 keys at a time, P^T becomes a right factor and O^T += V^T P^T stays in up to six
// tiles, so that the exponentials of one block run beside the products of another.
#pragma once

#include <type_traits>

#include "tlf/amx.h"
#include "tlf/attention_plan.h"

namespace tlf {
namespace TLF_ISA {

constexpr int64_t kBlock = 32;  // keys of a block, and rows of half a panel
constexpr int kMostTiles = 6;   // of O^T at a time; two more for its factors

struct Meeting {
  const bf16* keys;        // [chunk, padded], rows past n to the next whole block finite
  const bf16* v_t;         // [padded, ldv], columns past n to the next whole block zero
  const float* q_t;        // [padded / 2, kPanel] lanes
  float *scores, *probs;   // [chunk, kBlock]; [chunk / 2, kWidth] lanes
  float *o_t, *top, *sum;  // [padded, kPanel]; [kPanel]
  int64_t padded, ldv, size, j0, n;
  float scale, softcap;
};

// What 16 rows see of 32 keys: all, nothing, or look at each.
struct Sight {
  Range range;
  bool none(int64_t j) const { return j >= range.end || j + kBlock <= range.begin; }
  bool all(int64_t j) const { return j >= range.full0 && j + kBlock <= range.full1; }
};

TLF_INLINE Vec highest(const Limits& limits, const Sight& sight, int v, const float* s, int64_t j0, int64_t j,
                       Vec top) {
  if (sight.all(j)) {
    Vec other = load(s);
#pragma GCC unroll 16
    for (int i = 1; i < kBlock; i += 2) {
      top = larger(top, load(s + (i - 1) * kBlock));
      other = larger(other, load(s + i * kBlock));
    }
    return larger(top, other);
  }
  for (int64_t i = most(j, sight.range.begin); i < least(j + kBlock, sight.range.end); ++i) {
    const IVec seen = sees(limits, v, static_cast<int32_t>(j0 + i));
    top = larger(top, select(seen, load(s + (i - j) * kBlock), splat(-INFINITY)));
  }
  return top;
}

// P^T of a block, in pairs of keys; returns its sum
TLF_INLINE Vec probabilities(const Limits& limits, const Sight& sight, int v, const float* s, int64_t j0, int64_t j,
                             float factor, Vec base, float* p) {
  Vec total0 = Vec{}, total1 = Vec{};
  if (sight.all(j)) {
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; i += 2) {
      const Vec x = exp2_short(load(s + i * kBlock) * factor - base);
      const Vec y = exp2_short(load(s + (i + 1) * kBlock) * factor - base);
      total0 += x, total1 += y;
      store(p + (i / 2) * kWidth, join_lanes(narrow_rows(x, y)));
    }
    return total0 + total1;
  }
  const auto one = [&](int64_t i) {
    const Vec x = exp2_short(load(s + i * kBlock) * factor - base);
    return select(sees(limits, v, static_cast<int32_t>(j0 + j + i)), x, Vec{});
  };
  const int64_t begin = most(0, sight.range.begin - j) & ~int64_t{1}, end = least(kBlock, sight.range.end - j);
  for (int64_t i = 0; i < kBlock; i += 2) {
    Vec x = Vec{}, y = Vec{};
    if (i >= begin && i < end) x = one(i), y = one(i + 1);
    total0 += x, total1 += y;
    store(p + (i / 2) * kWidth, join_lanes(narrow_rows(x, y)));
  }
  return total0 + total1;
}

// f(i) for tiles 0 .. D - 1
template <int D, typename F>
TLF_INLINE void each(const F& f) {
  if constexpr (D > 0) f(std::integral_constant<int, 0>());
  if constexpr (D > 1) f(std::integral_constant<int, 1>());
  if constexpr (D > 2) f(std::integral_constant<int, 2>());
  if constexpr (D > 3) f(std::integral_constant<int, 3>());
  if constexpr (D > 4) f(std::integral_constant<int, 4>());
  if constexpr (D > 5) f(std::integral_constant<int, 5>());
}

// O^T += V^T P^T for D tiles of O^T; next(j) gives P^T of the keys j .. j + 31
template <int D, typename F>
TLF_INLINE void weigh(const bf16* v_t, int64_t ldv, float* o_t, int64_t begin, int64_t end, const F& next) {
  constexpr int64_t row = kPanel * sizeof(float);
  each<D>([&](auto i) { tile_load<i.value>(o_t + i.value * kTileRows * kPanel, row); });
  for (int64_t j = begin; j < end; j += kBlock) {
    tile_load<6>(next(j), 64);
    each<D>([&](auto i) {
      tile_load<7>(v_t + i.value * kTileRows * ldv + j, ldv * 2);
      tile_multiply<i.value, 7, 6>();
    });
  }
  each<D>([&](auto i) { tile_store<i.value>(o_t + i.value * kTileRows * kPanel, row); });
}

template <typename F>
TLF_INLINE void weigh_some(int64_t tiles, const bf16* v_t, int64_t ldv, float* o_t, int64_t begin, int64_t end,
                           const F& next) {
  if (tiles == 1) weigh<1>(v_t, ldv, o_t, begin, end, next);
  if (tiles == 2) weigh<2>(v_t, ldv, o_t, begin, end, next);
  if (tiles == 3) weigh<3>(v_t, ldv, o_t, begin, end, next);
  if (tiles == 4) weigh<4>(v_t, ldv, o_t, begin, end, next);
  if (tiles == 5) weigh<5>(v_t, ldv, o_t, begin, end, next);
  if (tiles == 6) weigh<6>(v_t, ldv, o_t, begin, end, next);
}

// Online softmax of 16 rows over the chunk and its weighted sum of V.
TLF_NOINLINE void attend_rows(const Meeting& m, const Limits& limits, int v, const Sight& sight, const float* scores,
                              Vec now) {
  const float factor = m.softcap > 0 ? kLog2e : m.scale * kLog2e;
  float* o_t = m.o_t + v * kWidth;
  const Vec old = load(m.top + v * kWidth), hidden = splat(-INFINITY);
  // a lane that has seen nothing keeps -inf: subtract 0 there, not -inf from -inf
  const Vec base = select(now == hidden, Vec{}, now) * factor;
  Vec alpha = exp2_short(old * factor - base);
  store(m.top + v * kWidth, now);
  if (_mm512_cmp_ps_mask((__m512)alpha, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0) {
    for (int64_t d = 0; d < m.size; ++d) store(o_t + d * kPanel, load(o_t + d * kPanel) * alpha);
  }
  Vec total = Vec{};
  const int64_t begin = sight.range.begin / kBlock * kBlock, end = sight.range.end;
  const int64_t tiles = ceil_div(m.size, kTileRows), groups = ceil_div(tiles, kMostTiles);
  const int64_t each_group = ceil_div(tiles, groups);
  weigh_some(least(tiles, each_group), m.v_t, m.ldv, o_t, begin, end, [&](int64_t j) {
    float* p = m.probs + j / 2 * kWidth;
    total += probabilities(limits, sight, v, scores + j * kBlock, m.j0, j, factor, base, p);
    return p;
  });
  for (int64_t t = each_group; t < tiles; t += each_group) {
    weigh_some(least(tiles - t, each_group), m.v_t + t * kTileRows * m.ldv, m.ldv, o_t + t * kTileRows * kPanel, begin,
               end, [&](int64_t j) { return m.probs + j / 2 * kWidth; });
  }
  store(m.sum + v * kWidth, load(m.sum + v * kWidth) * alpha + total);
}

// One half of a panel, vectors [v0, v0 + 2), and the whole chunk.
inline void attend_half(const Meeting& m, const Limits& limits, int v0) {
  const Sight sights[2] = {{visible(limits, v0, m.j0, m.n)}, {visible(limits, v0 + 1, m.j0, m.n)}};
  if (sights[0].range.empty() && sights[1].range.empty()) return;
  const int64_t steps = m.padded / kTilePairs, ldk = m.padded * 2;
  constexpr int64_t ldq = kPanel * sizeof(float), lds = kBlock * sizeof(float);
  Vec top[2] = {load(m.top + v0 * kWidth), load(m.top + (v0 + 1) * kWidth)};
  const auto raise = [&](int64_t j) {
    float* s = m.scores + j * kBlock;
    if (m.softcap > 0) {
      for (int i = 0; i < kBlock * 2; ++i) {
        store(s + i * kWidth, m.softcap * tanhv(load(s + i * kWidth) * (m.scale / m.softcap)));
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (!sights[v].none(j)) top[v] = highest(limits, sights[v], v0 + v, s + v * kWidth, m.j0, j, top[v]);
    }
  };
  int64_t last = -1;
  for (int64_t j = 0; j < m.n; j += kBlock) {
    const bool left = !sights[0].none(j), right = !sights[1].none(j);
    if (!left && !right) continue;
    const bf16* keys = m.keys + j * m.padded;
    const float* q_t = m.q_t + v0 * kWidth;
    float* s = m.scores + j * kBlock;
    if (left && right) {
      tile_block<2, 2, false>(steps, keys, ldk, q_t, ldq, s, lds);
    } else if (left) {
      tile_block<2, 1, false>(steps, keys, ldk, q_t, ldq, s, lds);
    } else {
      tile_block<2, 1, false>(steps, keys, ldk, q_t + kWidth, ldq, s + kWidth, lds);
    }
    if (last >= 0) raise(last);  // beside the products of this block
    last = j;
  }
  raise(last);
  for (int v = 0; v < 2; ++v) {
    if (!sights[v].range.empty()) attend_rows(m, limits, v0 + v, sights[v], m.scores + v * kWidth, top[v]);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
