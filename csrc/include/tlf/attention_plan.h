// Which rows of q meet which rows of k: segments, groups that share a prefix, components that share keys, spans.
//
// Segments are sorted so that a component (segments connected by overlapping key ranges) is contiguous, and inside it
// each group (segments with the same prefix). The rows of a group or component are the queries of its segments end to
// end, each query taken by G query heads of one key head: row = query * G + head. So heads that share keys share loads.
#pragma once

#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {

struct Segment {
  int64_t q0, nq, k0, nk, p0, np;  // queries, own keys, prefix keys: start and count
  int64_t component;
};

// Queries [q0, q1) of a row space against keys [k0, k0 + nk). Query i of it (from q0 on) stands on key i + shift.
struct Span {
  int64_t q0, q1, k0, nk, shift;
  bool causal, windowed;
};

struct Interval {
  int64_t k0, k1, component;
};

inline int compare(int64_t a, int64_t b) { return a < b ? -1 : a > b; }
inline int by_component(const void* x, const void* y) {
  const Segment &a = *static_cast<const Segment*>(x), &b = *static_cast<const Segment*>(y);
  if (a.component != b.component) return compare(a.component, b.component);
  if (a.np != b.np) return compare(a.np, b.np);
  if (a.p0 != b.p0) return compare(a.p0, b.p0);
  return compare(a.q0, b.q0);
}
inline int by_start(const void* x, const void* y) {
  const Interval &a = *static_cast<const Interval*>(x), &b = *static_cast<const Interval*>(y);
  return a.k0 != b.k0 ? compare(a.k0, b.k0) : compare(a.k1, b.k1);
}
inline int by_component_start(const void* x, const void* y) {
  const Interval &a = *static_cast<const Interval*>(x), &b = *static_cast<const Interval*>(y);
  return a.component != b.component ? compare(a.component, b.component) : compare(a.k0, b.k0);
}

template <typename T>
struct Buffer {  // a malloc'ed array; the kernels use no STL (tlf/kernel.h)
  T* data;
  int64_t size = 0;
  explicit Buffer(int64_t capacity)
      : data(static_cast<T*>(std::malloc(static_cast<size_t>(capacity + 1) * sizeof(T)))) {
    if (data == nullptr) std::abort();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
  void push(const T& x) { data[size++] = x; }
};

struct Plan {
  Buffer<Segment> segments;    // those with queries, sorted
  Buffer<int64_t> groups;      // [n + 1] first segment of each group, and the end
  Buffer<int64_t> components;  // [n + 1] first segment of each component, and the end
  Buffer<Interval> intervals;  // disjoint key ranges, sorted by component; each belongs to one
  Buffer<int64_t> ranges_of;   // [n + 1] first interval of each component, and the end
  Buffer<Interval> gaps;       // the keys that no segment sees
  bool causal;
  int64_t window;

  Plan(const int32_t* cu_q, const int32_t* cu_k, const int32_t* prefix, const int32_t* used, int64_t n, bool is_causal,
       int64_t window_size, int64_t keys)
      : segments(n),
        groups(n + 1),
        components(n + 1),
        intervals(2 * n),
        ranges_of(n + 1),
        gaps(2 * n + 1),
        causal(is_causal),
        window(window_size) {
    for (int64_t s = 0; s < n; ++s) {
      Segment seg{cu_q[s], cu_q[s + 1] - cu_q[s], cu_k[s], used ? used[s] : cu_k[s + 1] - cu_k[s], 0, 0, 0};
      if (prefix != nullptr && prefix[2 * s + 1] > 0) seg.p0 = prefix[2 * s], seg.np = prefix[2 * s + 1];
      if (seg.nq > 0) segments.push(seg);
    }
    if (keys > 0) connect(keys);
    std::qsort(segments.data, static_cast<size_t>(segments.size), sizeof(Segment), by_component);
    for (int64_t s = 0; s < segments.size; ++s) {
      const Segment &a = segments[s], &b = segments[s > 0 ? s - 1 : 0];
      const bool new_component = s == 0 || a.component != b.component;
      if (new_component) components.push(s);
      if (new_component || a.np == 0 || a.np != b.np || a.p0 != b.p0) groups.push(s);
    }
    components.push(segments.size);
    groups.push(segments.size);
    int64_t at = 0;
    for (int64_t c = 0; c + 1 < components.size; ++c) {
      ranges_of.push(at);
      while (at < intervals.size && intervals[at].component == segments[components[c]].component) ++at;
    }
    ranges_of.push(at);
  }

  int64_t queries(int64_t first, int64_t last) const {
    int64_t total = 0;
    for (int64_t s = first; s < last; ++s) total += segments[s].nq;
    return total;
  }

  // Spans of the segments [first, last) (whole groups); at most two a segment.
  void spans(int64_t first, int64_t last, Buffer<Span>* out) const {
    out->size = 0;
    int64_t q = 0;
    for (int64_t s = first; s < last;) {
      int64_t end = s + 1, queries_of_group = segments[s].nq;
      const Segment& lead = segments[s];
      while (end < last && lead.np > 0 && segments[end].np == lead.np && segments[end].p0 == lead.p0) {
        queries_of_group += segments[end++].nq;
      }
      if (lead.np > 0) out->push({q, q + queries_of_group, lead.p0, lead.np, 0, false, false});
      for (; s < end; ++s) {
        const Segment& seg = segments[s];
        if (seg.nk > 0) out->push({q, q + seg.nq, seg.k0, seg.nk, seg.nk - seg.nq, causal, window > 0});
        q += seg.nq;
      }
    }
  }

 private:
  // Union of segments whose key ranges overlap, then the merged ranges.
  void connect(int64_t keys) {
    Buffer<int64_t> parent(segments.size);
    Buffer<Interval> ranges(2 * segments.size);
    for (int64_t s = 0; s < segments.size; ++s) {
      const Segment& seg = segments[s];
      parent[s] = s;
      if (seg.nk > 0) ranges.push({seg.k0, seg.k0 + seg.nk, s});
      if (seg.np > 0) ranges.push({seg.p0, seg.p0 + seg.np, s});
    }
    const auto root = [&](int64_t s) {
      while (parent[s] != s) s = parent[s] = parent[parent[s]];
      return s;
    };
    std::qsort(ranges.data, static_cast<size_t>(ranges.size), sizeof(Interval), by_start);
    for (int64_t i = 0; i < ranges.size; ++i) {
      const Interval& r = ranges[i];
      if (intervals.size > 0 && r.k0 < intervals[intervals.size - 1].k1) {
        Interval& last = intervals[intervals.size - 1];
        last.k1 = most(last.k1, r.k1);
        const int64_t a = root(last.component), b = root(r.component);
        parent[most(a, b)] = least(a, b);
      } else {
        intervals.push(r);
      }
    }
    int64_t seen = 0;
    for (int64_t i = 0; i < intervals.size; ++i) {
      if (intervals[i].k0 > seen) gaps.push({seen, intervals[i].k0, 0});
      seen = intervals[i].k1;
    }
    if (seen < keys) gaps.push({seen, keys, 0});
    for (int64_t s = 0; s < segments.size; ++s) segments[s].component = root(s);
    for (int64_t i = 0; i < intervals.size; ++i) intervals[i].component = root(intervals[i].component);
    std::qsort(intervals.data, static_cast<size_t>(intervals.size), sizeof(Interval), by_component_start);
  }
};

struct Task {
  int64_t unit, head, part, parts, cost;  // a group or component, its key head, which part of it
};

// dearest first, so that the last tasks to start are small
inline int by_cost(const void* x, const void* y) {
  const Task &a = *static_cast<const Task*>(x), &b = *static_cast<const Task*>(y);
  if (a.cost != b.cost) return compare(b.cost, a.cost);
  if (a.unit != b.unit) return compare(a.unit, b.unit);
  return a.head != b.head ? compare(a.head, b.head) : compare(a.part, b.part);
}

// The same, but units within a head: threads that write neighbouring heads of the same tokens at a time fight for the
// cache lines of lse. The backward pass only reads it. Tiny tasks stay beside those that touch the same pages.
inline int by_cost_and_head(const void* x, const void* y) {
  const Task &a = *static_cast<const Task*>(x), &b = *static_cast<const Task*>(y);
  const bool tiny = a.cost < kPanel;
  return a.cost == b.cost && a.head != b.head && !tiny ? compare(a.head, b.head) : by_cost(x, y);
}

// Splits the last count tasks in four, so that threads end together; a task may come out empty.
inline void quarter_last(Buffer<Task>* tasks, int64_t count) {
  const int64_t size = tasks->size;
  for (int64_t i = most(0, size - count); i < size; ++i) {
    const Task t = (*tasks)[i];
    (*tasks)[i] = {t.unit, t.head, 4 * t.part, 4 * t.parts, t.cost / 4};
    for (int64_t j = 1; j < 4; ++j) tasks->push({t.unit, t.head, 4 * t.part + j, 4 * t.parts, t.cost / 4});
  }
}

// Calls f(lane, token, head within the group) for each row of a panel of the segments [first, last), in order.
template <typename F>
inline void each_row(const Plan& plan, int64_t first, int64_t last, int64_t panel, int64_t group, const F& f) {
  int64_t skip = panel * kPanel, lane = 0;
  for (int64_t s = first; s < last && lane < kPanel; ++s) {
    const Segment& seg = plan.segments[s];
    if (skip >= seg.nq * group) {
      skip -= seg.nq * group;
      continue;
    }
    int64_t token = seg.q0 + skip / group, part = skip % group;
    skip = 0;
    for (; token < seg.q0 + seg.nq && lane < kPanel; ++lane) {
      f(lane, token, part);
      if (++part == group) part = 0, ++token;
    }
  }
}

// Lines that the next panel will touch, fetched a few at a time while this one is computed.
struct Ahead {
  const void* lines[2 * kPanel * 2];
  int64_t count = 0, at = 0;
  TLF_INLINE void add(const void* line) {
    if (count < 4 * kPanel) lines[count++] = line;
  }
  TLF_INLINE void some(int64_t n = 16) {
    for (const int64_t end = least(count, at + n); at < end; ++at) __builtin_prefetch(lines[at], 1, 2);
  }
};

// The keys that each lane of a panel sees in a span, and the bounds over each vector of lanes.
struct Limits {
  alignas(64) int32_t low[kPanel], high[kPanel];  // lane sees keys low <= j < high of the span
  int32_t low_min[kPanelVecs], low_max[kPanelVecs], high_min[kPanelVecs], high_max[kPanelVecs];

  void set(const Span& span, int64_t panel, int64_t group, int64_t window) {
    const int64_t row0 = panel * kPanel;
    const int64_t r0 = clamp(span.q0 * group - row0, 0, kPanel), r1 = clamp(span.q1 * group - row0, 0, kPanel);
    std::memset(low, 0, sizeof(low));
    std::memset(high, 0, sizeof(high));
    int64_t position = (row0 + r0) / group - span.q0 + span.shift, part = (row0 + r0) % group;
    for (int64_t r = r0; r < r1; ++r) {
      high[r] = static_cast<int32_t>(span.causal ? clamp(position + 1, 0, span.nk) : span.nk);
      low[r] = static_cast<int32_t>(span.windowed ? clamp(position - window + 1, 0, high[r]) : 0);
      if (++part == group) part = 0, ++position;
    }
    for (int v = 0; v < kPanelVecs; ++v) {
      low_min[v] = high_min[v] = INT32_MAX;
      low_max[v] = high_max[v] = 0;
      for (int i = v * kWidth; i < (v + 1) * kWidth; ++i) {
        // a lane that sees nothing must not widen the range of those that do
        const int32_t first = high[i] > low[i] ? low[i] : INT32_MAX;
        low_min[v] = first < low_min[v] ? first : low_min[v];
        low_max[v] = low[i] > low_max[v] ? low[i] : low_max[v];
        high_min[v] = high[i] < high_min[v] ? high[i] : high_min[v];
        high_max[v] = high[i] > high_max[v] ? high[i] : high_max[v];
      }
    }
  }
};

// The part of a vector's visible keys inside a chunk [j0, j0 + n): some lane sees [begin, end), all see [full0, full1).
struct Range {
  int64_t begin, full0, full1, end;
  bool empty() const { return begin >= end; }
};

TLF_INLINE Range visible(const Limits& limits, int v, int64_t j0, int64_t n) {
  Range r;
  r.begin = clamp(limits.low_min[v] - j0, 0, n);
  r.end = clamp(limits.high_max[v] - j0, 0, n);
  r.full0 = clamp(limits.low_max[v] - j0, r.begin, most(r.begin, r.end));
  r.full1 = clamp(limits.high_min[v] - j0, r.full0, most(r.full0, r.end));
  return r;
}

// all ones where the lane sees key j of the span
TLF_INLINE IVec sees(const Limits& limits, int v, int32_t j) {
  const IVec low = *reinterpret_cast<const IVec*>(limits.low + v * kWidth);
  const IVec high = *reinterpret_cast<const IVec*>(limits.high + v * kWidth);
  return (low <= j) & (j < high);
}

// What a panel sees of a chunk of n keys: vectors [v0, v1), keys [kmin, kmax); each vector sees some lanes' worth of
// the keys in [full0, full1), and every lane sees those in [all0, all1).
struct View {
  Range ranges[kPanelVecs];
  int v0, v1;
  int64_t kmin, kmax, full0, full1, all0, all1;

  View(const Limits& limits, int64_t j0, int64_t n)
      : v0(kPanelVecs), v1(0), kmin(n), kmax(0), full0(0), full1(n), all0(0), all1(n) {
    for (int v = 0; v < kPanelVecs; ++v) {
      ranges[v] = visible(limits, v, j0, n);
      if (ranges[v].empty()) continue;
      v0 = static_cast<int>(least(v0, v)), v1 = v + 1;
      kmin = least(kmin, ranges[v].begin), kmax = most(kmax, ranges[v].end);
      full0 = most(full0, ranges[v].begin), full1 = least(full1, ranges[v].end);
      all0 = most(all0, ranges[v].full0), all1 = least(all1, ranges[v].full1);
    }
    kmin &= ~int64_t{1};  // whole lanes of two keys
    full0 = clamp(full0, kmin, kmax), full1 = clamp(full1, full0, kmax);
    all0 = clamp(all0, full0, full1), all1 = clamp(all1, all0, full1);
    for (int v = v0; v < v1; ++v) {
      if (ranges[v].empty()) ranges[v] = Range{kmin, kmin, kmin, kmin};
    }
  }

  // Calls f(a, b, from, to): keys [a, b) for the vectors [from, to) that see some of them.
  template <typename F>
  void each_tile(const F& f) const {
    constexpr int64_t step = 6;
    for (int64_t j = kmin; j < full0; j += step) edge(j, least(j + step, full0), f);
    edge(full0, all0, f);
    edge(all0, all1, f);
    edge(all1, full1, f);
    for (int64_t j = full1; j < kmax; j += step) edge(j, least(j + step, kmax), f);
  }

  // Calls f(from, to, end): vectors that need the keys up to end. On the diagonal, halves of a panel differ.
  template <typename F>
  void each_half(const F& f) const {
    const int half = (v0 + v1) / 2;
    int64_t left = kmin;
    for (int v = v0; v < half; ++v) left = most(left, ranges[v].end);
    if (half == v0 || left + 8 >= kmax) return f(v0, v1, kmax);
    f(v0, half, left);
    f(half, v1, kmax);
  }

 private:
  template <typename F>
  void edge(int64_t a, int64_t b, const F& f) const {
    int from = v0, to = v1;
    while (from < to && (ranges[from].begin >= b || ranges[from].end <= a)) ++from;
    while (to > from && (ranges[to - 1].begin >= b || ranges[to - 1].end <= a)) --to;
    if (from < to && a < b) f(a, b, from, to);
  }
};

}  // namespace TLF_ISA
}  // namespace tlf
