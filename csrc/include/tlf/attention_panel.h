// Forward of packed attention for one panel of query rows and a chunk of keys: buffers, products and online softmax.
#pragma once

#include <cmath>

#include "tlf/attention_plan.h"
#include "tlf/simd.h"
#if defined(TLF_ISA_IS_amx)
#include "tlf/attention_amx.h"
#endif

namespace tlf {
namespace TLF_ISA {

// Buffers of one thread. D: head size; Kd: lanes of a row; all panels of a task have their own q, o, m, l.
template <typename E>
struct ForwardWork {
  static constexpr int kp = Pack<E>::kp;
#if defined(TLF_ISA_IS_amx)
  static constexpr bool kTiles = kp == 2;
  static constexpr int64_t most_keys = kTiles ? 1024 : 384, scored = kTiles ? kNear : most_keys;
#else
  static constexpr bool kTiles = false;
  static constexpr int64_t most_keys = 384, scored = most_keys;
#endif
  Ahead* ahead;
  E *rows, *keys, *v_t;
  float *lanes, *q_t, *scores, *probs, *o, *top, *sum, *alpha, *o_rows;
  int64_t kd, padded, chunk, ldv;

  void carve(Scratch& s, int64_t size, int64_t panels) {
    padded = round_up(size, kWidth * kp), kd = kTiles ? padded / kp : ceil_div(size, kp);
    chunk = size <= 64 ? most_keys : most_keys / 2;  // keys at a time: all that is made of them stays in L2
    ldv = kTiles ? chunk + 32 : chunk;               // an odd number of cache lines, as tiles read 16 rows at once
    rows = s.take<E>(kPanel * padded);               // of q, converted and padded
    keys = s.take<E>(chunk * padded);
    v_t = s.take<E>(kTiles ? padded * ldv : 0);
    lanes = s.take<float>(ceil_div(chunk, kp) * padded);  // V: [keys / KP, padded]
    q_t = s.take<float>(panels * kd * kPanel);
    scores = s.take<float>(least(chunk, scored) * kPanel);
    probs = s.take<float>(least(chunk, scored) * kPanel);
    o = s.take<float>(panels * padded * kPanel);  // of each panel, [padded, kPanel] in tiles, else [kPanel, padded]
    top = s.take<float>(panels * kPanel);
    sum = s.take<float>(panels * kPanel);
    alpha = s.take<float>(kPanel);
    o_rows = s.take<float>(kTiles ? kPanel * padded : 0);
  }
};

// One vector of lanes: online softmax over its visible keys of the chunk; zeros where a lane sees nothing in [kmin,
// kmax). top: the largest score so far, that of the keys [all0, all1) included; before: without this chunk.
template <typename E>
inline void softmax(const ForwardWork<E>& w, const Limits& limits, int v, const View& view, int64_t j0, float factor,
                    float* top, const float* before, float* sum) {
  const Range r = view.ranges[v];
  const int64_t kmin = view.kmin, kmax = view.kmax;
  const float* s = w.scores + v * kWidth;
  const Vec hidden = splat(-INFINITY), old = load(before + v * kWidth);
  Vec now = load(top + v * kWidth);
  int64_t j = r.begin;
  const auto raise_masked = [&](int64_t end) {
    for (; j < end; ++j) {
      now = larger(now, select(sees(limits, v, static_cast<int32_t>(j0 + j)), load(s + j * kPanel), hidden));
    }
  };
  const auto raise = [&](int64_t end) {
    for (; j < end; ++j) now = larger(now, load(s + j * kPanel));
  };
  raise_masked(r.full0);
  raise(least(view.all0, r.full1));
  j = clamp(view.all1, j, most(j, r.full1));
  raise(r.full1);
  raise_masked(r.end);
  // a lane that has seen nothing keeps -inf: subtract 0 there, not -inf from -inf
  const Vec base = select(now == hidden, Vec{}, now) * factor;
  const Vec alpha = exp2_for<E>(old * factor - base);
  store(w.alpha + v * kWidth, alpha);
  store(top + v * kWidth, now);

  Vec total[2] = {Vec{}, Vec{}};
  const auto soft = [&](int64_t i) { return exp2_for<E>(load(s + i * kPanel) * factor - base); };
  const auto soft_masked = [&](int64_t i) {
    return i < r.begin || i >= r.end ? Vec{} : select(sees(limits, v, static_cast<int32_t>(j0 + i)), soft(i), Vec{});
  };
  float* p = w.probs + v * kWidth;
  if constexpr (Pack<E>::kp == 1) {
    for (j = kmin; j < r.full0; ++j) {
      const Vec x = soft_masked(j);
      total[0] += x;
      store(p + j * kPanel, x);
    }
    for (; j + 2 <= r.full1; j += 2) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const Vec x = soft(j + u);
        total[u] += x;
        store(p + (j + u) * kPanel, x);
      }
    }
    for (; j < kmax; ++j) {
      const Vec x = soft_masked(j);
      total[0] += x;
      store(p + j * kPanel, x);
    }
  } else {
#if defined(TLF_AVX512BF16)
    const auto pair = [&](int64_t i) {
      const Vec x = soft_masked(i), y = soft_masked(i + 1);
      total[0] += x, total[1] += y;
      store(p + (i / 2) * kPanel, join_lanes(narrow_rows(x, y)));
    };
    for (j = kmin; j < r.full0; j += 2) pair(j);
    for (; j + 4 <= r.full1; j += 4) {
#pragma GCC unroll 2
      for (int u = 0; u < 4; u += 2) {
        const Vec x = soft(j + u), y = soft(j + u + 1);
        total[0] += x, total[1] += y;
        store(p + ((j + u) / 2) * kPanel, join_lanes(narrow_rows(x, y)));
      }
    }
    for (; j < kmax; j += 2) pair(j);
#endif
  }
  store(sum + v * kWidth, load(sum + v * kWidth) * alpha + total[0] + total[1]);
}

// O = alpha O + PV, a few rows at a time: on the diagonal each sees a few keys more. fresh: O is not read.
template <typename E>
void weigh(const ForwardWork<E>& w, const Limits& limits, const View& view, int64_t j0, const float* v, int64_t ldv,
           int64_t size, float* o, bool fresh) {
  constexpr int64_t step = 12, kp = ForwardWork<E>::kp;  // whole tiles, whatever their height
  const E* probs = reinterpret_cast<const E*>(w.probs);
  for (int64_t r = view.v0 * kWidth; r < view.v1 * kWidth; r += step) {
    const int64_t rows = least(step, view.v1 * kWidth - r);
    int64_t begin = view.kmax, end = view.kmin;
    for (int64_t i = r; i < r + rows; ++i) {
      if (limits.low[i] >= limits.high[i]) continue;
      begin = least(begin, limits.low[i] - j0), end = most(end, limits.high[i] - j0);
    }
    begin = most(begin, view.kmin) & ~int64_t{1}, end = least(end, view.kmax);
    if (begin >= end) continue;
    w.ahead->some(24);
    const int64_t lanes = ceil_div(end - begin, kp), nv = ceil_div(size, kWidth);
    const E* a = probs + begin * kPanel + r * kp;
    const float* b = v + begin / kp * ldv;
    if (fresh) {
      gemm<E, Write::store, Lie::columns>(rows, nv, lanes, a, kPanel * kp, b, ldv, o + r * w.padded, w.padded);
    } else {
      gemm<E, Write::scale_rows, Lie::columns>(rows, nv, lanes, a, kPanel * kp, b, ldv, o + r * w.padded, w.padded,
                                               w.alpha + r);
    }
  }
}

// v: [n / KP, ldv] lanes; in tiles it is w.v_t instead. fresh: nothing has been added to O yet, nor is it zero.
template <typename E>
void attend(const ForwardWork<E>& w, const Limits& limits, const E* keys, int64_t ldk, const float* values, int64_t ldv,
            int64_t j0, int64_t n, int64_t size, int64_t panel, float scale, float softcap, bool fresh) {
  const View view(limits, j0, n);
  if (view.v0 >= view.v1) return;
  const float* q_t = w.q_t + panel * w.kd * kPanel;
  float *top = w.top + panel * kPanel, *sum = w.sum + panel * kPanel, *o = w.o + panel * w.padded * kPanel;
  float before[kPanel];
  std::memcpy(before, top, sizeof(before));
  const bool plain = softcap == 0;  // else scores change before their maximum is taken
  view.each_tile([&](int64_t a, int64_t b, int from, int to) {
    const E* left = keys + a * ldk;
    const float* right = q_t + from * kWidth;
    float* scores = w.scores + a * kPanel + from * kWidth;
    if (plain && a == view.all0 && b == view.all1) {
      constexpr int64_t step = 24;  // whole tiles
      for (int64_t j = 0; j < b - a; j += step) {
        w.ahead->some(24);
        gemm<E, Write::store_max>(least(step, b - a - j), to - from, w.kd, left + j * ldk, ldk, right, kPanel,
                                  scores + j * kPanel, kPanel, top + from * kWidth);
      }
    } else {
      gemm<E, Write::store>(b - a, to - from, w.kd, left, ldk, right, kPanel, scores, kPanel);
    }
  });
  float factor = scale * kLog2e;
  if (softcap > 0) {
    factor = kLog2e;
    for (int64_t j = view.kmin; j < view.kmax; ++j) {
      for (int v = view.v0; v < view.v1; ++v) {
        float* s = w.scores + j * kPanel + v * kWidth;
        store(s, softcap * tanhv(load(s) * (scale / softcap)));
        if (j >= view.all0 && j < view.all1) store(top + v * kWidth, larger(load(top + v * kWidth), load(s)));
      }
    }
  }
  for (int v = view.v0; v < view.v1; ++v) {
    softmax(w, limits, v, view, j0, factor, top, before, sum);
  }
  if constexpr (!ForwardWork<E>::kTiles) return weigh(w, limits, view, j0, values, ldv, size, o, fresh);
  view.each_half([&](int from, int to, int64_t end) {
    gemm<E, Write::scale_add>(size, to - from, ceil_div(end - view.kmin, ForwardWork<E>::kp), w.v_t + view.kmin, w.ldv,
                              w.probs + (view.kmin / ForwardWork<E>::kp) * kPanel + from * kWidth, kPanel,
                              o + from * kWidth, kPanel, w.alpha + from * kWidth);
  });
}

#if defined(TLF_ISA_IS_amx)
// the same in tiles; not a template, so that it is preferred
inline void attend(const ForwardWork<bf16>& w, const Limits& limits, const bf16*, int64_t, const float*, int64_t,
                   int64_t j0, int64_t n, int64_t size, int64_t panel, float scale, float softcap, bool) {
  const int64_t at = panel * kPanel;
  const Meeting m{w.keys,     w.v_t,      w.q_t + at * w.kd, w.scores, w.probs, w.o + at * w.padded,
                  w.top + at, w.sum + at, w.padded,          w.ldv,    size,    j0,
                  n,          scale,      softcap,           w.ahead};
  attend_panel(m, limits);
}
#endif

}  // namespace TLF_ISA
}  // namespace tlf
