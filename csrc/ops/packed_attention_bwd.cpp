// Backward of packed attention: one task is one component (segments that share keys, directly or through others) and
// key head, so that dk and dv of its keys are summed by one thread, in one order; dq of its rows likewise.
//
// As in the forward, keys run down and query rows across the lanes. For a block of keys and a panel of rows:
//   S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse), dS^T = P^T (dP^T - delta)
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
// P^T and dS^T are the left factors as they are; only dS^T is also needed in lanes.
#include <cmath>
#include <type_traits>

#include "tlf/attention_panel_bwd.h"
#include "tlf/attention_plan.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

template <typename T>
struct Backward {
  const T *dout, *q, *k, *v, *out;
  const float *lse, *dlse;
  T *dq, *dk, *dv;
  float* partial;  // with splits > 1: [dk, dv][splits, keys, kv_heads, size]
  int64_t keys, heads, kv_heads, size, splits;
  int64_t d_row, d_head, q_row, q_head, k_row, k_head, v_row, v_head;
  float scale, softcap;
  int64_t part_heads() const { return heads / kv_heads / splits; }
};

// A panel's rows [kPanel, padded], given by fill(rows), in both packings.
template <typename E, typename F>
TLF_NOINLINE void pack_rows(const BackwardWork<E>& w, float* transposed, float* lanes, const F& fill) {
  E* rows = BackwardWork<E>::kp == 1 ? reinterpret_cast<E*>(lanes) : w.rows;
  std::memset(static_cast<void*>(rows), 0, static_cast<size_t>(kPanel * w.padded) * sizeof(E));
  fill(rows);
  transpose(rows, w.padded / BackwardWork<E>::kp, kPanel, w.kd, transposed, kPanel);
  if constexpr (BackwardWork<E>::kp == 2) {
    interleave(rows, w.padded, kPanel, w.padded, reinterpret_cast<uint32_t*>(lanes), w.ld);
  }
}

template <typename T, typename E>
TLF_NOINLINE void load_rows(const Backward<T>& f, const Plan& plan, const BackwardWork<E>& w, int64_t first,
                            int64_t last, int64_t head0) {
  const int64_t n = f.part_heads(), per_panel = w.kd * kPanel, lanes_per_panel = kPanel / BackwardWork<E>::kp * w.ld;
  const int64_t ahead = ceil_div(kAhead, n);
  std::memset(w.lse, 0, static_cast<size_t>(w.panels * kPanel) * sizeof(float));
  std::memset(w.delta, 0, static_cast<size_t>(w.panels * kPanel) * sizeof(float));
  std::memset(w.dq_t, 0, static_cast<size_t>(w.panels * w.dq_rows * kPanel) * sizeof(float));
  for (int64_t p = 0; p < w.panels; ++p) {
    pack_rows(w, w.q_t + p * per_panel, w.q_lanes + p * lanes_per_panel, [&](E* rows) {
      each_row(plan, first, last, p, n, [&](int64_t lane, int64_t token, int64_t part) {
        const T* from = f.q + token * f.q_row + (head0 + part) * f.q_head;
        prefetch_row(from + ahead * f.q_row, f.size);
        copy_row(rows + lane * w.padded, from, f.size, f.size);
      });
    });
    pack_rows(w, w.do_t + p * per_panel, w.do_lanes + p * lanes_per_panel, [&](E* rows) {
      each_row(plan, first, last, p, n, [&](int64_t lane, int64_t token, int64_t part) {
        const T* from = f.dout + token * f.d_row + (head0 + part) * f.d_head;
        const int64_t row = token * f.heads + head0 + part;
        prefetch_row(from + ahead * f.d_row, f.size);
        prefetch_row(f.out + (row + ahead * f.heads) * f.size, f.size);
        copy_row(rows + lane * w.padded, from, f.size, f.size);
        const float dot = dot_row(from, f.out + row * f.size, f.size);
        w.delta[p * kPanel + lane] = f.dlse != nullptr ? dot - f.dlse[row] : dot;
        w.lse[p * kPanel + lane] = f.lse[row] * kLog2e;
      });
    });
  }
}

#if defined(TLF_ISA_IS_amx)
// the same in tiles, for all panels [first, last) that the span has
template <typename T>
void meet(const Backward<T>& f, const BackwardWork<bf16>& w, const Span& span, int64_t window, int64_t a, int64_t n,
          int64_t j0, int64_t first, int64_t last) {
  const Gradient g{w.keys,   w.values, w.k_t,  w.q_t,  w.do_t, w.q_lanes,      w.do_lanes, w.lse,
                   w.delta,  w.dq_t,   w.dk,   w.dv,   w.p,    w.ds,           w.ds_lanes, w.scores,
                   w.padded, w.ld,     w.room, f.size, window, f.part_heads(), f.scale,    f.softcap};
  meet(g, span, a, n, j0, first, last);
}
#endif

template <typename T, typename E>
void run_block(const Backward<T>& f, const Plan& plan, const BackwardWork<E>& w, const Task& task,
               const Buffer<Span>& spans, int64_t b0, int64_t nb) {
  const int64_t n_heads = f.part_heads();
  for (int64_t j = 0; j < nb; ++j) {
    prefetch_row(f.k + (b0 + j + kAhead) * f.k_row + task.head * f.k_head, f.size);
    prefetch_row(f.v + (b0 + j + kAhead) * f.v_row + task.head * f.v_head, f.size);
    copy_row(w.keys + j * w.padded, f.k + (b0 + j) * f.k_row + task.head * f.k_head, f.size, w.padded);
    copy_row(w.values + j * w.padded, f.v + (b0 + j) * f.v_row + task.head * f.v_head, f.size, w.padded);
  }
  // zeros past the keys: they are multiplied in whole lanes or tiles
  const int64_t spare = (w.room - kKeys<E>)*w.padded;
  std::memset(static_cast<void*>(w.keys + nb * w.padded), 0, static_cast<size_t>(spare) * sizeof(E));
  std::memset(static_cast<void*>(w.values + nb * w.padded), 0, static_cast<size_t>(spare) * sizeof(E));
  const int64_t touched = least(w.room, nb + (kTiles<E> ? 32 : 1));
  for (int64_t d = 0; d < w.dq_rows; ++d) {
    std::memset(static_cast<void*>(w.k_t + d * w.room), 0, static_cast<size_t>(touched) * sizeof(E));
  }
  std::memset(static_cast<void*>(w.k_t + w.dq_rows * w.room), 0, 64 * sizeof(E));
  transpose_elements(w.keys, w.padded, nb, f.size, w.k_t, w.room, w.lanes);
  std::memset(w.dk, 0, static_cast<size_t>(touched * w.ld) * sizeof(float));
  std::memset(w.dv, 0, static_cast<size_t>(touched * w.ld) * sizeof(float));
  Limits limits;
  for (int64_t i = 0; i < spans.size; ++i) {
    const Span& span = spans[i];
    const int64_t a = most(b0, span.k0) - b0, n = least(b0 + nb, span.k0 + span.nk) - b0 - a;
    if (n <= 0) continue;
    const int64_t j0 = b0 + a - span.k0;
    int64_t q0 = span.q0, q1 = span.q1;
    if (span.causal) q0 += most(0, j0 - span.shift);
    if (span.windowed) q1 = least(q1, span.q0 + j0 + n - 1 + plan.window - span.shift);
    if (q0 >= q1) continue;
    const int64_t first = q0 * n_heads / kPanel, last = ceil_div(q1 * n_heads, kPanel);
#if defined(TLF_ISA_IS_amx)
    if constexpr (kTiles<E>) {
      if (n >= kTileRows) {  // for fewer keys a tile is not worth it
        meet(f, w, span, plan.window, a, n, j0, first, last);
        continue;
      }
    }
#endif
    for (int64_t p = first; p < last; ++p) {
      limits.set(span, p, n_heads, plan.window);
      meet(w, limits, a, n, j0, f.size, p, f.scale, f.softcap);
    }
  }
  for (int64_t j = 0; j < nb; ++j) {
    const int64_t row = ((b0 + j) * f.kv_heads + task.head) * f.size;
    if (f.splits == 1) {
      store_row(f.dk + row, w.dk + j * w.ld, f.size, f.scale);
      store_row(f.dv + row, w.dv + j * w.ld, f.size, 1.0f);
    } else {
      const int64_t each = f.keys * f.kv_heads * f.size;
      store_row(f.partial + task.part * each + row, w.dk + j * w.ld, f.size, f.scale);
      store_row(f.partial + (f.splits + task.part) * each + row, w.dv + j * w.ld, f.size, 1.0f);
    }
  }
}

template <typename T, typename E>
void run_task(const Backward<T>& f, const Plan& plan, const Task& task, Buffer<Span>* spans) {
  static thread_local Scratch scratch;
#if defined(TLF_ISA_IS_amx)
  const TileScope tiles;
#endif
  const int64_t first = plan.components[task.unit], last = plan.components[task.unit + 1];
  const int64_t n_heads = f.part_heads(), head0 = (task.head * f.splits + task.part) * n_heads;
  BackwardWork<E> w;
  const int64_t panels = ceil_div(plan.queries(first, last) * n_heads, kPanel);
  scratch.lay_out([&](Scratch& s) { w.carve(s, f.size, panels); });
  load_rows(f, plan, w, first, last, head0);
  plan.spans(first, last, spans);
  for (int64_t i = plan.ranges_of[task.unit]; i < plan.ranges_of[task.unit + 1]; ++i) {
    const Interval& keys = plan.intervals[i];
    const int64_t block = even_piece(keys.k1 - keys.k0, kKeys<E>, BackwardWork<E>::unit);
    for (int64_t b0 = keys.k0; b0 < keys.k1; b0 += block) {
      run_block(f, plan, w, task, *spans, b0, least(block, keys.k1 - b0));
    }
  }
  static_assert(kKeys<E> >= kPanel, "dk, free by now, takes the rows of a panel");
  float* rows = w.dk;
  for (int64_t p = 0; p < w.panels; ++p) {
    const int64_t lanes = least(kPanel, plan.queries(first, last) * n_heads - p * kPanel);
    transpose(w.dq_t + p * w.dq_rows * kPanel, kPanel, f.size, lanes, rows, w.padded);
    each_row(plan, first, last, p, n_heads, [&](int64_t lane, int64_t token, int64_t part) {
      store_row(f.dq + (token * f.heads + head0 + part) * f.size, rows + lane * w.padded, f.size, f.scale);
    });
  }
}

template <typename T>
void sum_partials(const Backward<T>& f, const Plan& plan) {
  const int64_t width = f.kv_heads * f.size, each = f.keys * width;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < plan.intervals.size; ++i) {
    const int64_t begin = plan.intervals[i].k0 * width, end = plan.intervals[i].k1 * width;
    for (int64_t x = begin; x < end; ++x) {
      float dk = 0.0f, dv = 0.0f;
      for (int64_t part = 0; part < f.splits; ++part) {
        dk += f.partial[part * each + x];
        dv += f.partial[(f.splits + part) * each + x];
      }
      narrow(dk, f.dk + x);
      narrow(dv, f.dv + x);
    }
  }
}

template <typename T, typename E>
void backward(Backward<T> f, const Plan& plan, int64_t threads) {
  const int64_t units = plan.components.size - 1, group = f.heads / f.kv_heads;
  Buffer<Span> all(2 * plan.segments.size);
  Buffer<int64_t> costs(units);
  int64_t total = 0, largest = 0;
  for (int64_t c = 0; c < units; ++c) {
    plan.spans(plan.components[c], plan.components[c + 1], &all);
    int64_t cost = 1;
    for (int64_t i = 0; i < all.size; ++i) cost += (all[i].q1 - all[i].q0) * all[i].nk;
    costs[c] = cost;
    total += cost * f.kv_heads, largest = most(largest, cost);
  }
  // One task a query head instead of one a key head where few large tasks would leave threads idle.
  f.splits = 4 * largest * threads > total ? group : 1;
  Buffer<float> partial(f.splits > 1 ? 2 * f.splits * f.keys * f.kv_heads * f.size : 0);
  f.partial = partial.data;
  Buffer<Task> tasks(units * f.kv_heads * f.splits);
  for (int64_t c = 0; c < units; ++c) {
    for (int64_t head = 0; head < f.kv_heads; ++head) {
      for (int64_t part = 0; part < f.splits; ++part) tasks.push({c, head, part, f.splits, costs[c]});
    }
  }
  std::qsort(tasks.data, static_cast<size_t>(tasks.size), sizeof(Task), by_cost);
#pragma omp parallel
  {
    Buffer<Span> spans(2 * plan.segments.size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks.size; ++i) run_task<T, E>(f, plan, tasks[i], &spans);
  }
  if (f.splits > 1) sum_partials(f, plan);
  for (int64_t i = 0; i < plan.gaps.size; ++i) {
    const int64_t width = f.kv_heads * f.size, at = plan.gaps[i].k0 * width;
    clear(f.dk + at, plan.gaps[i].k1 * width - at);
    clear(f.dv + at, plan.gaps[i].k1 * width - at);
  }
}

}  // namespace

// Arguments as in packed_attention_fwd; dout with strides, out, lse, dlse (or null), dq, dk, dv contiguous.
void packed_attention_bwd(const void* dout, const float* dlse, const void* q, const void* k, const void* v,
                          const void* out, const float* lse, void* dq, void* dk, void* dv, const int32_t* cu_q,
                          const int32_t* cu_k, const int32_t* prefix, const int32_t* used, int64_t segments,
                          int64_t tokens, int64_t heads, int64_t keys, int64_t kv_heads, int64_t size, int64_t d_row,
                          int64_t d_head, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row,
                          int64_t v_head, int64_t dtype, int64_t causal, double scale, int64_t window, double softcap,
                          int64_t threads) {
  const Plan plan(cu_q, cu_k, prefix, used, segments, causal != 0, window, keys);
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Backward<T> f{static_cast<const T*>(dout),
                        static_cast<const T*>(q),
                        static_cast<const T*>(k),
                        static_cast<const T*>(v),
                        static_cast<const T*>(out),
                        lse,
                        dlse,
                        static_cast<T*>(dq),
                        static_cast<T*>(dk),
                        static_cast<T*>(dv),
                        nullptr,
                        keys,
                        heads,
                        kv_heads,
                        size,
                        1,
                        d_row,
                        d_head,
                        q_row,
                        q_head,
                        k_row,
                        k_head,
                        v_row,
                        v_head,
                        static_cast<float>(scale),
                        static_cast<float>(softcap)};
    const int64_t row = heads * size, head = segments > 0 ? cu_q[0] : tokens,
                  tail = segments > 0 ? cu_q[segments] : tokens;
    clear(f.dq, head * row);
    clear(f.dq + tail * row, (tokens - tail) * row);
#if defined(TLF_AVX512BF16)
    backward<T, T>(f, plan, threads);
#else
    backward<T, float>(f, plan, threads);
#endif
  };
  if (dtype == kFloat32) call(static_cast<float*>(nullptr));
  if (dtype == kBFloat16) call(static_cast<bf16*>(nullptr));
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(packed_attention_bwd);
