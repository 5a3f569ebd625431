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
constexpr int64_t kNear = 128;  // keys
constexpr int kMostTiles = 6;   // of O^T at a time; two more for its factors

struct Meeting {
  const bf16* keys;        // [chunk, padded], rows past n to the next whole block finite
  const bf16* v_t;         // [padded, ldv], columns past n to the next whole block zero
  const float* q_t;        // [padded / 2, kPanel] lanes
  float *scores, *probs;   // [kNear, kBlock]; [kNear / 2, kWidth] lanes
  float *o_t, *top, *sum;  // [padded, kPanel]; [kPanel]
  int64_t padded, ldv, size, j0, n;
  float scale, softcap;
  Ahead* ahead;  // or null
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
  const Range& r = sight.range;
  const auto masked = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const IVec seen = sees(limits, v, static_cast<int32_t>(j0 + i));
      top = larger(top, select(seen, load(s + (i - j) * kBlock), splat(-INFINITY)));
    }
  };
  const int64_t full0 = clamp(r.full0, j, j + kBlock), full1 = clamp(r.full1, full0, j + kBlock);
  masked(most(j, r.begin), full0);
  for (int64_t i = full0; i < full1; ++i) top = larger(top, load(s + (i - j) * kBlock));
  masked(full1, least(j + kBlock, r.end));
  return top;
}

// What turns the scores of 16 rows into P^T, a piece of a block at a time.
struct Softmax {
  const Limits& limits;
  const Sight& sight;
  const float* scores;  // of these rows
  float* probs;
  int v;
  int64_t j0;
  float factor;
  Vec base, total[2];

  TLF_INLINE Vec one(int64_t j, bool masked) const {
    const Vec x = exp2_short(load(scores + j * kBlock) * factor - base);
    return masked ? select(sees(limits, v, static_cast<int32_t>(j0 + j)), x, Vec{}) : x;
  }
  // Pairs of keys First .. Last - 1 of the block at j.
  template <int First, int Last>
  TLF_INLINE void piece(int64_t j) {
#pragma GCC unroll 16
    for (int i = First; i < Last; ++i) put(j + 2 * i, one(j + 2 * i, false), one(j + 2 * i + 1, false));
  }
  TLF_INLINE void put(int64_t key, Vec x, Vec y) {
    total[0] += x, total[1] += y;
    store(probs + key / 2 * kWidth, join_lanes(narrow_rows(x, y)));
  }
  TLF_INLINE void block(int64_t j) {
    if (sight.all(j)) return piece<0, kBlock / 2>(j);
    edge(j);
  }
  TLF_NOINLINE void edge(int64_t j) {
    const Range& r = sight.range;
    for (int64_t key = j; key < j + kBlock; key += 2) {
      if (key >= r.full0 && key + 1 < r.full1) {
        put(key, one(key, false), one(key + 1, false));
      } else if (key + 1 >= r.begin && key < r.end) {
        put(key, one(key, true), one(key + 1, true));
      } else {
        put(key, Vec{}, Vec{});
      }
    }
  }
};

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

// O^T += V^T P^T for D tiles of O^T over the keys [begin, end). With a softmax, P^T of a block is made while the block
// before it is multiplied, some of it between any two products.
template <int D>
TLF_INLINE void weigh(const bf16* v_t, int64_t ldv, float* o_t, int64_t begin, int64_t end, const float* probs,
                      Softmax* softmax) {
  constexpr int64_t row = kPanel * sizeof(float);
  constexpr int pairs = kBlock / 2;
  if (softmax != nullptr) softmax->block(begin);
  each<D>([&](auto i) { tile_load<i.value>(o_t + i.value * kTileRows * kPanel, row); });
  for (int64_t j = begin; j < end; j += kBlock) {
    const int64_t then = j + kBlock;
    const bool beside = softmax != nullptr && then < end && softmax->sight.all(then);
    if (softmax != nullptr && then < end && !beside) softmax->block(then);
    tile_load<6>(probs + j / 2 * kWidth, 64);
    if (beside) {
      each<D>([&](auto i) {
        tile_load<7>(v_t + i.value * kTileRows * ldv + j, ldv * 2);
        tile_multiply<i.value, 7, 6>();
        softmax->template piece<pairs * i.value / D, pairs*(i.value + 1) / D>(then);
      });
    } else {
      each<D>([&](auto i) {
        tile_load<7>(v_t + i.value * kTileRows * ldv + j, ldv * 2);
        tile_multiply<i.value, 7, 6>();
      });
    }
  }
  each<D>([&](auto i) { tile_store<i.value>(o_t + i.value * kTileRows * kPanel, row); });
}

TLF_INLINE void weigh_some(int64_t tiles, const bf16* v_t, int64_t ldv, float* o_t, int64_t begin, int64_t end,
                           const float* probs, Softmax* softmax) {
  if (tiles == 1) weigh<1>(v_t, ldv, o_t, begin, end, probs, softmax);
  if (tiles == 2) weigh<2>(v_t, ldv, o_t, begin, end, probs, softmax);
  if (tiles == 3) weigh<3>(v_t, ldv, o_t, begin, end, probs, softmax);
  if (tiles == 4) weigh<4>(v_t, ldv, o_t, begin, end, probs, softmax);
  if (tiles == 5) weigh<5>(v_t, ldv, o_t, begin, end, probs, softmax);
  if (tiles == 6) weigh<6>(v_t, ldv, o_t, begin, end, probs, softmax);
}

// S^T of 32 keys x 32 rows whose Q^T, up to 64 deep, lies in tiles 4 .. 7.
template <int Steps>
TLF_INLINE void scores_of_held(const bf16* keys, int64_t ldk, float* s) {
  constexpr int64_t lds = kBlock * sizeof(float);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    tile_load<2>(keys, ldk);
    tile_clear<0>();
    tile_clear<1>();
    if constexpr (Steps == 2) tile_load<3>(keys + kTilePairs, ldk);
    tile_multiply<0, 2, 4>();
    tile_multiply<1, 2, 5>();
    if constexpr (Steps == 2) {
      tile_multiply<0, 3, 6>();
      tile_multiply<1, 3, 7>();
    }
    tile_store<0>(s, lds);
    tile_store<1>(s + kWidth, lds);
    keys += kTileRows * ldk / 2, s += kTileRows * kBlock;
  }
}

// Online softmax of 16 rows over the chunk and its weighted sum of V.
TLF_NOINLINE void attend_rows(const Meeting& m, const Limits& limits, int v, const Sight& sight, const float* scores,
                              Vec now) {
  const float factor = m.softcap > 0 ? kLog2e : m.scale * kLog2e;
  float* o_t = m.o_t + v * kWidth;
  const Vec old = load(m.top + v * kWidth), hidden = splat(-INFINITY);
  // Rescaling can wait while no score is 2^8 above what is subtracted: float has room, and lse stays exact.
  const __mmask16 grown = _mm512_cmp_ps_mask((__m512)((now - old) * factor), _mm512_set1_ps(8.0f), _CMP_GT_OQ);
  now = (Vec)_mm512_mask_mov_ps((__m512)old, grown, (__m512)now);
  // a lane that has seen nothing keeps -inf: subtract 0 there, not -inf from -inf
  const Vec base = select(now == hidden, Vec{}, now) * factor;
  if (grown != 0) {
    const Vec alpha = exp2_short(old * factor - base);
    store(m.top + v * kWidth, now);
    store(m.sum + v * kWidth, load(m.sum + v * kWidth) * alpha);
    for (int64_t d = 0; d < m.size; ++d) store(o_t + d * kPanel, load(o_t + d * kPanel) * alpha);
  }
  Softmax softmax{limits, sight, scores, m.probs, v, m.j0, factor, base, {Vec{}, Vec{}}};
  const int64_t begin = sight.range.begin / kBlock * kBlock, end = sight.range.end;
  const int64_t tiles = ceil_div(m.size, kTileRows), step = ceil_div(tiles, ceil_div(tiles, kMostTiles));
  for (int64_t t = 0; t < tiles; t += step) {
    weigh_some(least(tiles - t, step), m.v_t + t * kTileRows * m.ldv, m.ldv, o_t + t * kTileRows * kPanel, begin, end,
               m.probs, t == 0 ? &softmax : nullptr);
  }
  store(m.sum + v * kWidth, load(m.sum + v * kWidth) + softmax.total[0] + softmax.total[1]);
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
  if (steps <= 2) {
    const float* q_t = m.q_t + v0 * kWidth;
    tile_load<4>(q_t, ldq);
    tile_load<5>(q_t + kWidth, ldq);
    if (steps == 2) tile_load<6>(q_t + kTileRows * kPanel, ldq);
    if (steps == 2) tile_load<7>(q_t + kTileRows * kPanel + kWidth, ldq);
  }
  bool seen = false;
  for (int64_t j = 0; j < m.n; j += kBlock) {
    const bool left = !sights[0].none(j), right = !sights[1].none(j);
    if (!left && !right) continue;
    const bf16* keys = m.keys + j * m.padded;
    const float* q_t = m.q_t + v0 * kWidth;
    float* s = m.scores + j * kBlock;
    if (steps == 1) {
      scores_of_held<1>(keys, ldk, s);
    } else if (steps == 2) {
      scores_of_held<2>(keys, ldk, s);
    } else if (left && right) {
      tile_block<2, 2, false>(steps, keys, ldk, q_t, ldq, s, lds);
    } else if (left) {
      tile_block<2, 1, false>(steps, keys, ldk, q_t, ldq, s, lds);
    } else {
      tile_block<2, 1, false>(steps, keys, ldk, q_t + kWidth, ldq, s + kWidth, lds);
    }
    seen = true;
    if (m.ahead != nullptr) m.ahead->some();
  }
  if (!seen) return;
  // not beside the products: what a tile has just stored is slow to read
  for (int64_t j = 0; j < m.n; j += kBlock) {
    if (!sights[0].none(j) || !sights[1].none(j)) raise(j);
  }
  for (int v = 0; v < 2; ++v) {
    if (!sights[v].range.empty()) attend_rows(m, limits, v0 + v, sights[v], m.scores + v * kWidth, top[v]);
  }
}

// A panel and a chunk, kNear keys at a time: their scores, K and V then stay in L1.
inline void attend_panel(const Meeting& m, const Limits& limits) {
  for (int64_t j = 0; j < m.n; j += kNear) {
    Meeting near = m;
    near.keys += j * m.padded, near.v_t += j, near.j0 += j, near.n = least(kNear, m.n - j);
    for (int v = 0; v < kPanelVecs; v += 2) attend_half(near, limits, v);
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
