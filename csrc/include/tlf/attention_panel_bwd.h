// Backward of packed attention for a block of keys and one panel of query rows: buffers, products, derivative of
// softmax.
#pragma once

#include <cmath>

#include "tlf/attention_plan.h"
#include "tlf/simd.h"
#if defined(TLF_ISA_IS_amx)
#include "tlf/attention_amx_bwd.h"
#endif

namespace tlf {
namespace TLF_ISA {

#if defined(TLF_ISA_IS_amx)
template <typename E>
constexpr bool kTiles = Pack<E>::kp == 2;
template <typename E>
constexpr int64_t kKeys = kTiles<E> ? kRunKeys : 96;  // of a block
#else
template <typename E>
constexpr bool kTiles = false;
template <typename E>
constexpr int64_t kKeys = 96;
#endif

template <typename E>
struct BackwardWork {
  static constexpr int kp = Pack<E>::kp;
  static constexpr int64_t unit = kTiles<E> ? 32 : 6;  // keys are padded to a multiple of it
  static constexpr int64_t room = kKeys<E> + (kTiles<E> ? unit : 0);
  int64_t kd, padded, ld, dq_rows, panels;
  E *rows, *keys, *values, *k_t, *p, *ds;
  float *lanes, *scores, *dprobs, *ds_lanes, *dk, *dv;  // of a block of keys
  float *q_t, *do_t, *q_lanes, *do_lanes, *dq_t;        // of each panel
  float *lse, *delta;                                   // of each row; lse in base 2

  void carve(Scratch& s, int64_t size, int64_t count) {
    padded = round_up(size, kTiles<E> ? kp * kWidth : kWidth), panels = count;
    kd = kTiles<E> ? padded / kp : ceil_div(size, kp), dq_rows = kTiles<E> ? padded : size;
    ld = kTiles<E> ? padded + kWidth : padded;  // an odd number of cache lines, as tiles read 16 rows at once
    rows = s.take<E>(kPanel * padded);
    keys = s.take<E>(room * padded);
    values = s.take<E>(room * padded);
    k_t = s.take<E>(dq_rows * room + 64);
    lanes = s.take<float>(room * padded);
    dk = s.take<float>(room * ld);
    dv = s.take<float>(room * ld);
    q_t = s.take<float>(panels * kd * kPanel);
    do_t = s.take<float>(panels * kd * kPanel);
    q_lanes = s.take<float>(panels * kPanel / kp * ld);
    do_lanes = s.take<float>(panels * kPanel / kp * ld);
    dq_t = s.take<float>(panels * dq_rows * kPanel);
    lse = s.take<float>(panels * kPanel);
    delta = s.take<float>(panels * kPanel);
#if defined(TLF_ISA_IS_amx)
    if constexpr (kTiles<E>) {
      scores = s.take<float>(2 * kSquare * kSquare);  // or of fewer keys than a tile and a panel
      dprobs = scores + kSquare * kSquare;
      p = s.take<E>(kRunKeys * kRunRow);
      ds = s.take<E>(kRunKeys * kRunRow);
      ds_lanes = s.take<float>(kRunKeys / 2 * kRunLanes);
      return;
    }
#endif
    scores = s.take<float>(kKeys<E> * kPanel);
    dprobs = s.take<float>(kKeys<E> * kPanel);
    p = kp == 1 ? reinterpret_cast<E*>(scores) : s.take<E>(kKeys<E> * kPanel);
    ds = kp == 1 ? reinterpret_cast<E*>(dprobs) : s.take<E>(kKeys<E> * kPanel);
    ds_lanes = kp == 1 ? dprobs : s.take<float>(kKeys<E> / kp * kPanel);
  }
};

// P^T and dS^T of one vector of lanes, zero where a lane sees nothing in [kmin, kmax). Capped: there is a softcap; a
// template, because the test inside the loop costs 5 % of the whole backward.
template <typename E, bool Capped>
void differentiate(const BackwardWork<E>& w, const Limits& limits, int v, int64_t j0, const View& view, int64_t panel,
                   float scale, float softcap) {
  const Range r = view.ranges[v];
  const Vec lse = load(w.lse + panel * kPanel + v * kWidth), delta = load(w.delta + panel * kPanel + v * kWidth);
  const float factor = scale * kLog2e;
  const auto both = [&](int64_t j, Vec* ds) {
    const Vec s = load(w.scores + j * kPanel + v * kWidth), dp = load(w.dprobs + j * kPanel + v * kWidth);
    if constexpr (Capped) {
      const Vec t = tanhv(s * (scale / softcap));
      const Vec p = exp2_for<E>(t * (softcap * kLog2e) - lse);
      *ds = p * (dp - delta) * (1.0f - t * t);
      return p;
    }
    const Vec p = exp2_for<E>(s * factor - lse);
    *ds = p * (dp - delta);
    return p;
  };
  const auto both_masked = [&](int64_t j, Vec* ds) {
    *ds = Vec{};
    if (j < r.begin || j >= r.end) return Vec{};
    const IVec mask = sees(limits, v, static_cast<int32_t>(j0 + j));
    Vec seen;
    const Vec p = both(j, &seen);
    *ds = select(mask, seen, Vec{});
    return select(mask, p, Vec{});
  };
  const auto write = [&](int64_t j, Vec p0, Vec p1, Vec ds0, Vec ds1) {
    const int64_t at = j * kPanel + v * kWidth;
    if constexpr (BackwardWork<E>::kp == 1) {
      store(w.p + at, p0), store(w.p + at + kPanel, p1);
      store(w.ds + at, ds0), store(w.ds + at + kPanel, ds1);
    } else {
#if defined(TLF_AVX512BF16)
      store_rows(w.p + at, w.p + at + kPanel, narrow_rows(p0, p1));
      const __m512i rows = narrow_rows(ds0, ds1);
      store_rows(w.ds + at, w.ds + at + kPanel, rows);
      store(w.ds_lanes + (j / 2) * kPanel + v * kWidth, join_lanes(rows));
#endif
    }
  };
  const auto edge = [&](int64_t j) {  // kKeys is even: an odd last key has room for its neighbour
    Vec ds0, ds1;
    const Vec p0 = both_masked(j, &ds0), p1 = both_masked(j + 1, &ds1);
    write(j, p0, p1, ds0, ds1);
  };
  int64_t j = view.kmin;
  for (; j < r.full0; j += 2) edge(j);
  for (; j + 2 <= r.full1; j += 2) {
    Vec ds0, ds1;
    const Vec p0 = both(j, &ds0), p1 = both(j + 1, &ds1);
    write(j, p0, p1, ds0, ds1);
  }
  for (; j < view.kmax; j += 2) edge(j);
}

// The keys [a, a + n) of the block, which are keys j0 .. of a span, and one panel of rows.
template <typename E>
void meet(const BackwardWork<E>& w, const Limits& limits, int64_t a, int64_t n, int64_t j0, int64_t size, int64_t panel,
          float scale, float softcap) {
  constexpr int kp = BackwardWork<E>::kp;
  const View view(limits, j0, n);
  if (view.v0 >= view.v1) return;
  const float *q_t = w.q_t + panel * w.kd * kPanel, *do_t = w.do_t + panel * w.kd * kPanel;
  const float* q_lanes = w.q_lanes + panel * (kPanel / kp) * w.ld;
  const float* do_lanes = w.do_lanes + panel * (kPanel / kp) * w.ld;
  view.each_tile([&](int64_t j, int64_t end, int from, int to) {
    const int64_t at = j * kPanel + from * kWidth, row = (a + j) * w.padded;
    gemm<E, Write::store>(end - j, to - from, w.kd, w.keys + row, w.padded, q_t + from * kWidth, kPanel, w.scores + at,
                          kPanel);
    gemm<E, Write::store>(end - j, to - from, w.kd, w.values + row, w.padded, do_t + from * kWidth, kPanel,
                          w.dprobs + at, kPanel);
  });
  for (int v = view.v0; v < view.v1; ++v) {
    if (softcap > 0) {
      differentiate<E, true>(w, limits, v, j0, view, panel, scale, softcap);
    } else {
      differentiate<E, false>(w, limits, v, j0, view, panel, scale, softcap);
    }
  }
  view.each_tile([&](int64_t j, int64_t end, int from, int to) {
    const int64_t lanes = (to - from) * kWidth / kp, at = j * kPanel + from * kWidth;
    const int64_t row = from * kWidth / kp * w.ld, key = (a + j) * w.ld;
    gemm<E, Write::add>(end - j, w.padded / kWidth, lanes, w.p + at, kPanel, do_lanes + row, w.ld, w.dv + key, w.ld);
    gemm<E, Write::add>(end - j, w.padded / kWidth, lanes, w.ds + at, kPanel, q_lanes + row, w.ld, w.dk + key, w.ld);
  });
  view.each_half([&](int from, int to, int64_t end) {
    gemm<E, Write::add>(size, to - from, ceil_div(end - view.kmin, kp), w.k_t + a + view.kmin, w.room,
                        w.ds_lanes + (view.kmin / kp) * kPanel + from * kWidth, kPanel,
                        w.dq_t + panel * w.dq_rows * kPanel + from * kWidth, kPanel);
  });
}

}  // namespace TLF_ISA
}  // namespace tlf
