// Forward of packed attention: one task is some panels of query rows of one group and key head.
//
// Scores are made transposed, keys down and query rows across the lanes: S^T = K Q^T takes K as it lies in memory, the
// softmax runs down the columns without any horizontal reduction, and O += P V takes P in columns and V in rows. AMX
// tiles take neither: there O^T += V^T P^T, with V transposed.
// Masks are a range of visible keys per lane (attention_plan.h); tiles that no lane sees are skipped.
#include <cmath>
#include <type_traits>

#include "tlf/attention_panel.h"
#include "tlf/attention_plan.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kMaxPanels = 20;  // of one task; they share the packing of K and V

template <typename T>
struct Forward {
  const T *q, *k, *v;
  T* out;
  float* lse;
  int64_t heads, kv_heads, size, q_row, q_head, k_row, k_head, v_row, v_head;
  float scale, softcap;
  int64_t group() const { return heads / kv_heads; }
};

// zero: O will be added to, not written
template <typename T, typename E>
void load_queries(const Forward<T>& f, const Plan& plan, const ForwardWork<E>& w, int64_t first, int64_t last,
                  const Task& task, int64_t rows, int64_t panel0, int64_t panel1, bool zero) {
  const int64_t group = f.group(), width = w.kd * ForwardWork<E>::kp;
  const int64_t ahead = ceil_div(kAhead, group) * f.q_row;
  for (int64_t p = panel0; p < panel1; ++p) {
    const int64_t slot = p - panel0;
    const int64_t lanes = round_up(least(kPanel, rows - p * kPanel), kWidth);
    const int64_t filled = least(lanes, rows - p * kPanel);
    clear(w.rows + filled * width, (lanes - filled) * width);
    each_row(plan, first, last, p, group, [&](int64_t lane, int64_t token, int64_t part) {
      const T* from = f.q + token * f.q_row + (task.head * group + part) * f.q_head;
      prefetch_row(from + ahead, f.size);
      copy_row(w.rows + lane * width, from, f.size, width);
    });
    transpose(w.rows, w.kd, lanes, w.kd, w.q_t + slot * w.kd * kPanel, kPanel);
    float* o = w.o + slot * w.padded * kPanel;
    for (int64_t i = 0; zero && i < w.padded * kPanel; i += kWidth) {
      store(o + i, Vec{});
      keep_loop();  // as rep stos, it took a twelfth of the forward
    }
    for (int64_t i = 0; i < kPanel; ++i) w.top[slot * kPanel + i] = -INFINITY, w.sum[slot * kPanel + i] = 0.0f;
  }
}

// The rows of q and out that a panel will touch.
template <typename T>
void look_ahead(const Forward<T>& f, const Plan& plan, int64_t first, int64_t last, const Task& task, int64_t panel,
                Ahead* ahead) {
  ahead->count = ahead->at = 0;
  each_row(plan, first, last, panel, f.group(), [&](int64_t, int64_t token, int64_t part) {
    const int64_t head = task.head * f.group() + part;
    const T *from = f.q + token * f.q_row + head * f.q_head, *to = f.out + (token * f.heads + head) * f.size;
    for (int64_t i = 0; i < f.size; i += 64 / static_cast<int64_t>(sizeof(T))) ahead->add(from + i), ahead->add(to + i);
  });
}

template <typename T, typename E>
void store_outputs(const Forward<T>& f, const Plan& plan, const ForwardWork<E>& w, int64_t first, int64_t last,
                   const Task& task, int64_t rows, int64_t panel0, int64_t panel1) {
  const float natural = f.softcap > 0 ? 1.0f : f.scale;
  for (int64_t p = panel0; p < panel1; ++p) {
    const int64_t slot = p - panel0;
    float* o = w.o + slot * w.padded * kPanel;
    if constexpr (ForwardWork<E>::kTiles) {
      transpose(o, kPanel, w.padded, least(kPanel, rows - p * kPanel), w.o_rows, w.padded);
      o = w.o_rows;
    }
    each_row(plan, first, last, p, f.group(), [&](int64_t lane, int64_t token, int64_t part) {
      const float total = w.sum[slot * kPanel + lane];
      const int64_t row = token * f.heads + task.head * f.group() + part;
      if (total == 0) {  // O was not written
        clear(f.out + row * f.size, f.size);
      } else {
        store_row(f.out + row * f.size, o + lane * w.padded, f.size, 1.0f / total);
      }
      f.lse[row] = total > 0 ? w.top[slot * kPanel + lane] * natural + std::log(total) : -INFINITY;
    });
  }
}

template <typename T, typename E>
void pack_values(const Forward<T>& f, const ForwardWork<E>& w, const T* from, int64_t n) {
  if constexpr (ForwardWork<E>::kTiles) {
    transpose_elements(from, f.v_row, n, f.size, w.v_t, w.ldv, w.lanes);
  } else if constexpr (ForwardWork<E>::kp == 2) {
    interleave(from, f.v_row, n, f.size, reinterpret_cast<uint32_t*>(w.lanes), w.padded);
  } else {
    for (int64_t j = 0; j < n; ++j) {
      prefetch_row(from + (j + kAhead) * f.v_row, f.size);
      copy_row(w.lanes + j * w.padded, from + j * f.v_row, f.size, w.padded);
    }
  }
}

template <typename T, typename E>
void run_task(const Forward<T>& f, const Plan& plan, const Task& task, Buffer<Span>* spans) {
  static thread_local Scratch scratch;
#if defined(TLF_ISA_IS_amx)
  const TileScope tiles;
#endif
  ForwardWork<E> w;
  Ahead ahead;
  w.ahead = &ahead;
  const int64_t first = plan.groups[task.unit], last = plan.groups[task.unit + 1], group = f.group();
  const int64_t rows = plan.queries(first, last) * group, panels = ceil_div(rows, kPanel);
  const int64_t panel0 = panels * task.part / task.parts, panel1 = panels * (task.part + 1) / task.parts;
  scratch.lay_out([&](Scratch& s) { w.carve(s, f.size, panel1 - panel0); });
  plan.spans(first, last, spans);
  const auto last_key = [&](const Span& span, int64_t query1) {
    return span.causal ? clamp(query1 - span.q0 + span.shift, 0, span.nk) : span.nk;
  };
  // where all keys are one chunk, each panel comes and goes while it is in L1
  const bool once = spans->size == 1 && (*spans)[0].nk <= w.chunk &&
                    last_key((*spans)[0], least((*spans)[0].q1, ceil_div(panel1 * kPanel, group))) > 0;
  if (!once) load_queries(f, plan, w, first, last, task, rows, panel0, panel1, true);
  Limits limits;
  for (int64_t i = 0; i < spans->size; ++i) {
    const Span& span = (*spans)[i];
    const int64_t p0 = most(panel0, span.q0 * group / kPanel);
    const int64_t p1 = least(panel1, ceil_div(span.q1 * group, kPanel));
    if (p0 >= p1) continue;
    const int64_t query0 = most(span.q0, p0 * kPanel / group), query1 = least(span.q1, ceil_div(p1 * kPanel, group));
    const int64_t end = last_key(span, query1);
    const int64_t begin = span.windowed ? clamp(query0 - span.q0 + span.shift - plan.window + 1, 0, end) : 0;
    // the same for every task: sums do not depend on the threads
    const int64_t chunk = even_piece(span.nk, w.chunk, ForwardWork<E>::kTiles ? 32 : 6);
    for (int64_t j0 = begin - begin % chunk; j0 < end; j0 += chunk) {
      const int64_t n = least(chunk, end - j0);
      const bool few =
          least(chunk, span.nk - j0) < 16;  // not worth a tile; asked of the span, so the same for all tasks
      const T* from_k = f.k + (span.k0 + j0) * f.k_row + task.head * f.k_head;
      const T* from_v = f.v + (span.k0 + j0) * f.v_row + task.head * f.v_head;
      const E* keys = w.keys;
      int64_t ldk = w.kd * ForwardWork<E>::kp;
      if constexpr (sizeof(T) == sizeof(E)) {  // read in place, unless several panels profit from a dense copy
        if (!ForwardWork<E>::kTiles && p1 - p0 == 1 && f.size % ForwardWork<E>::kp == 0)
          keys = reinterpret_cast<const E*>(from_k), ldk = f.k_row;
      }
      if (keys == w.keys) {
        for (int64_t j = 0; j < n; ++j) {
          prefetch_row(from_k + (j + kAhead) * f.k_row, f.size);
          copy_row(w.keys + j * ldk, from_k + j * f.k_row, f.size, ldk);
        }
      }
      pack_values(f, w, from_v, n);
      for (int64_t p = p0; p < p1; ++p) {
        if (once) load_queries(f, plan, w, first, last, task, rows, p, p + 1, ForwardWork<E>::kTiles);
        if (once) look_ahead(f, plan, first, last, task, p + 1, w.ahead);
        const int64_t slot = once ? 0 : p - panel0;
        limits.set(span, p, group, plan.window);
        if (few) {
          attend<E>(w, limits, keys, ldk, w.lanes, w.padded, j0, n, f.size, slot, f.scale, f.softcap, once);
        } else {
          attend(w, limits, keys, ldk, w.lanes, w.padded, j0, n, f.size, slot, f.scale, f.softcap, once);
        }
        if (once) store_outputs(f, plan, w, first, last, task, rows, p, p + 1);
      }
    }
  }
  if (!once) store_outputs(f, plan, w, first, last, task, rows, panel0, panel1);
}

template <typename T, typename E>
void forward(const Forward<T>& f, const Plan& plan, int64_t threads) {
  const int64_t groups = plan.groups.size - 1, group = f.group();
  int64_t panels = 0;
  for (int64_t g = 0; g < groups; ++g) {
    panels += ceil_div(plan.queries(plan.groups[g], plan.groups[g + 1]) * group, kPanel);
  }
  const int64_t largest = clamp(panels * f.kv_heads / (8 * threads), 1, kMaxPanels);
  Buffer<Task> tasks(panels * f.kv_heads + 8 * threads);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t queries = plan.queries(plan.groups[g], plan.groups[g + 1]);
    const int64_t count = ceil_div(queries * group, kPanel), parts = ceil_div(count, largest);
    const Segment& lead = plan.segments[plan.groups[g]];
    for (int64_t head = 0; head < f.kv_heads; ++head) {
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t own = plan.causal ? lead.nk * (2 * i + 1) / (2 * parts) : lead.nk;
        tasks.push({g, head, i, parts, count * (lead.np + own) / parts});
      }
    }
  }
  std::qsort(tasks.data, static_cast<size_t>(tasks.size), sizeof(Task), by_cost_and_head);
  if (threads > 1) quarter_last(&tasks, 2 * threads);
#pragma omp parallel
  {
    Buffer<Span> spans(2 * plan.segments.size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks.size; ++i) run_task<T, E>(f, plan, tasks[i], &spans);
  }
}

template <typename T>
void clear_rows(const Forward<T>& f, int64_t first, int64_t last) {
  if (first >= last) return;
  clear(f.out + first * f.heads * f.size, (last - first) * f.heads * f.size);
  for (int64_t i = first * f.heads; i < last * f.heads; ++i) f.lse[i] = -INFINITY;
}

}  // namespace

// q [tokens, heads, size], k and v [.., kv_heads, size] with strides in elements, last stride 1; out and lse
// contiguous. used and prefix may be null. Bounds are checked by the caller.
void packed_attention_fwd(const void* q, const void* k, const void* v, void* out, float* lse, const int32_t* cu_q,
                          const int32_t* cu_k, const int32_t* prefix, const int32_t* used, int64_t segments,
                          int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, int64_t q_row, int64_t q_head,
                          int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, int64_t dtype, int64_t causal,
                          double scale, int64_t window, double softcap, int64_t threads) {
  const Plan plan(cu_q, cu_k, prefix, used, segments, causal != 0, window, 0);
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Forward<T> f{static_cast<const T*>(q),
                       static_cast<const T*>(k),
                       static_cast<const T*>(v),
                       static_cast<T*>(out),
                       lse,
                       heads,
                       kv_heads,
                       size,
                       q_row,
                       q_head,
                       k_row,
                       k_head,
                       v_row,
                       v_head,
                       static_cast<float>(scale),
                       static_cast<float>(softcap)};
    clear_rows(f, 0, segments > 0 ? cu_q[0] : tokens);
    if (segments > 0) clear_rows(f, cu_q[segments], tokens);
#if defined(TLF_AVX512BF16)
    forward<T, T>(f, plan, threads);
#else
    forward<T, float>(f, plan, threads);
#endif
  };
  if (dtype == kFloat32) call(static_cast<float*>(nullptr));
  if (dtype == kBFloat16) call(static_cast<bf16*>(nullptr));
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(packed_attention_fwd);
