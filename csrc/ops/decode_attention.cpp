// decode_attention: one query a sequence against its rows of the K/V pool. Memory-bound: every key and value is read
// once, for all query heads that share it, and nothing is packed. Online softmax over blocks of keys.
#include <cstdint>

#include "tlf/decode.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kBlock = 128;                 // keys between two rescalings
constexpr int64_t kHeads = 8;                   // query heads of a key head that are treated at once
constexpr int64_t kSize = 256;                  // largest head size
constexpr int64_t kParallelElements = 1 << 15;  // below this a thread team costs more than it saves
constexpr int kSumVecs = kTileVecs;             // vectors of a row of values that stay in registers, for
constexpr int kSumHeads = 4;                    // so many heads

typedef uint32_t UVec __attribute__((vector_size(kWidth * 4), may_alias));
typedef uint16_t Words __attribute__((vector_size(kWidth * 2), may_alias, aligned(1)));

struct Span {
  int64_t first, count;
};

TLF_INLINE Vec widened(const float* x) { return load(x); }
TLF_INLINE Vec widened(const bf16* x) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Words*>(x), UVec) << 16);
}

// Products of a vector of a query and of a key, added in kWidth strands. bf16 queries are held as they are where the
// machine multiplies pairs of them, else as float.
#if defined(TLF_AVX512BF16)
template <typename T>
constexpr bool kPairs = sizeof(T) == 2;
TLF_INLINE Vec add_products(Vec sum, const bf16* query, const bf16* key) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(query), (__m512bh)_mm512_loadu_si512(key));
}
#else
template <typename T>
constexpr bool kPairs = false;
#endif
template <typename T>
TLF_INLINE Vec add_products(Vec sum, const float* query, const T* key) {
  return sum + load(query) * widened(key);
}

template <bool AsItIs, typename T>
struct Held {
  using type = float;
};
template <typename T>
struct Held<true, T> {
  using type = T;
};

// {sum of the pairs of a, sum of the pairs of b}
TLF_INLINE Vec pair_sums(Vec a, Vec b) {
#if defined(__clang__)  // has no __builtin_shuffle; it turns lanes that are copied one by one into a shuffle itself
  Vec even = {}, odd = {};
#pragma GCC unroll 8
  for (int i = 0; i < kWidth / 2; ++i) {
    even[i] = a[2 * i], even[kWidth / 2 + i] = b[2 * i];
    odd[i] = a[2 * i + 1], odd[kWidth / 2 + i] = b[2 * i + 1];
  }
  return even + odd;
#else
  IVec even = {}, odd = {};
  for (int i = 0; i < kWidth; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}
// lane i: the sum of the lanes of x[i]
TLF_INLINE Vec sums_of(const float* x) {
  Vec level[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) level[i] = load(x + i * kWidth);
#pragma GCC unroll 4
  for (int n = kWidth / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) level[i] = pair_sums(level[2 * i], level[2 * i + 1]);
  }
  return level[0];
}
TLF_INLINE float sum_of(Vec x) {
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  return sum;
}
TLF_INLINE float largest_of(Vec x) {
  float top = x[0];
  for (int i = 1; i < kWidth; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// What the softmax of a group of query heads has seen so far, in powers of two.
struct State {
  alignas(64) float sums[kHeads][kSize], scores[kHeads][kBlock];
  float top[kHeads], fade[kHeads];
  Vec total[kHeads];
};

// scores[h][j] = q[h] . key j of a block, its end filled up to a whole vector with -infinity
template <typename T, typename Query, int64_t Size>
TLF_INLINE void score_block(const Query* queries, const T* keys, int64_t k_row, int64_t size, int64_t group,
                            int64_t count, State& state) {
  constexpr int64_t depth = sizeof(Query) == 2 ? 2 * kWidth : kWidth;
  const int64_t whole = size / depth * depth;
  alignas(64) float parts[kHeads][kWidth * kWidth];
  for (int64_t from = 0; from < count; from += kWidth) {
    const int64_t some = least(kWidth, count - from);
    for (int64_t j = 0; j < some; ++j) {
      const T* key = keys + (from + j) * k_row;
      prefetch_row(key + kAhead * k_row, size);
      for (int64_t h = 0; h < group; ++h) {
        const Query* query = queries + h * kSize;
        Vec sum = {};
        if constexpr (Size > 0) {
#pragma GCC unroll 8
          for (int64_t d = 0; d < Size; d += depth) sum = add_products(sum, query + d, key + d);
        } else {
          for (int64_t d = 0; d < whole; d += depth) sum = add_products(sum, query + d, key + d);
          for (int64_t d = whole; d < size; ++d) sum[0] += widen(query[d]) * widen(key[d]);
        }
        store(parts[h] + j * kWidth, sum);
      }
    }
    for (int64_t h = 0; h < group; ++h) {
      for (int64_t j = some; j < kWidth; ++j) store(parts[h] + j * kWidth, splat(-__builtin_inff()));
      store(state.scores[h] + from, sums_of(parts[h]));
    }
  }
}

// scores become weights 2^(score - top)
TLF_INLINE void soften_block(int64_t group, int64_t count, const AttentionShape& s, State& state) {
  for (int64_t h = 0; h < group; ++h) {
    float* scores = state.scores[h];
    Vec peaks = splat(-__builtin_inff());
    for (int64_t j = 0; j < count; j += kWidth) {
      Vec score = load(scores + j) * (s.scale * kLog2e);
      if (s.softcap > 0.0f) score = (s.softcap * kLog2e) * tanhv(load(scores + j) * (s.scale / s.softcap));
      if (s.softcap > 0.0f && count - j < kWidth) {
        for (int64_t i = count - j; i < kWidth; ++i) score[i] = -__builtin_inff();
      }
      store(scores + j, score);
      peaks = larger(peaks, score);
    }
    const float peak = largest_of(peaks);
    state.fade[h] = 1.0f;
    if (peak > state.top[h]) {
      state.fade[h] = exp2v(splat(state.top[h] - peak))[0];
      state.top[h] = peak;
      state.total[h] *= state.fade[h];
    }
    for (int64_t j = 0; j < count; j += kWidth) {
      const Vec weight = exp2v(load(scores + j) - state.top[h]);
      store(scores + j, weight);
      state.total[h] += weight;
    }
  }
}

// sums[h] = fade[h] sums[h] + weights[h] . values, for H heads and V vectors of them
template <int H, int V, typename T>
TLF_INLINE void add_values(const T* values, int64_t v_row, int64_t count, int64_t h, int64_t d, State& state) {
  Vec sums[H][V];
#pragma GCC unroll 4
  for (int i = 0; i < H; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) sums[i][c] = load(state.sums[h + i] + d + c * kWidth) * state.fade[h + i];
  }
  for (int64_t j = 0; j < count; ++j) {
    if (h == 0) prefetch_row(values + (j + kAhead) * v_row + d, V * kWidth);
    Vec value[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) value[c] = widened(values + j * v_row + d + c * kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < H; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) sums[i][c] += state.scores[h + i][j] * value[c];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < H; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) store(state.sums[h + i] + d + c * kWidth, sums[i][c]);
  }
}
template <int V, typename T>
TLF_INLINE void add_values(const T* values, int64_t v_row, int64_t count, int64_t group, int64_t d, State& state) {
  int64_t h = 0;
  for (; h + kSumHeads <= group; h += kSumHeads) add_values<kSumHeads, V>(values, v_row, count, h, d, state);
  if (group - h == 3) add_values<3, V>(values, v_row, count, h, d, state);
  if (group - h == 2) add_values<2, V>(values, v_row, count, h, d, state);
  if (group - h == 1) add_values<1, V>(values, v_row, count, h, d, state);
}

// Query heads [0, group) of one key head; q and out: [group, size] contiguous; k and v point at the key head.
// Size: the head size where it is known to the compiler; 0: s.size.
template <typename T, int64_t Size>
void attend(const T* q, const T* k, const T* v, T* out, const AttentionShape& s, int64_t group, const Span* spans) {
  using Query = typename Held<kPairs<T>, T>::type;
  alignas(64) Query queries[kHeads * kSize];
  State state;
  const int64_t size = Size > 0 ? Size : s.size;
  for (int64_t h = 0; h < group; ++h) {
    state.top[h] = -__builtin_inff(), state.total[h] = Vec{};
    for (int64_t d = 0; d < size; ++d) {
      narrow(widen(q[h * size + d]), queries + h * kSize + d);
      state.sums[h][d] = 0.0f;
    }
  }
  for (int part = 0; part < 2; ++part) {
    const int64_t last = spans[part].first + spans[part].count;
    for (int64_t from = spans[part].first; from < last; from += kBlock) {
      const int64_t count = least(kBlock, last - from);
      const T* values = v + from * s.v_row;
      score_block<T, Query, Size>(queries, k + from * s.k_row, s.k_row, size, group, count, state);
      soften_block(group, count, s, state);
      int64_t d = 0;
      for (; d + kSumVecs * kWidth <= size; d += kSumVecs * kWidth) {
        add_values<kSumVecs>(values, s.v_row, count, group, d, state);
      }
      for (; d + kWidth <= size; d += kWidth) add_values<1>(values, s.v_row, count, group, d, state);
      for (; d < size; ++d) {
        for (int64_t h = 0; h < group; ++h) {
          float sum = state.sums[h][d] * state.fade[h];
          for (int64_t j = 0; j < count; ++j) sum += state.scores[h][j] * widen(values[j * s.v_row + d]);
          state.sums[h][d] = sum;
        }
      }
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    const float total = sum_of(state.total[h]);
    // a query that sees no key gets zeros
    const float inverse = state.top[h] == -__builtin_inff() && !(total != total) ? 0.0f : 1.0f / total;
    for (int64_t d = 0; d < size; ++d) narrow(state.sums[h][d] * inverse, out + h * size + d);
  }
}

template <typename T, typename SightOf>
void attend_all(const void* q, const void* k, const void* v, void* out, const SightOf& sight_of, int64_t sequences,
                int64_t window, const AttentionShape& s) {
  const int64_t group = s.heads / s.kv_heads, chunks = ceil_div(group, kHeads);
  const int64_t tasks = sequences * s.kv_heads * chunks;
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t i = task / (s.kv_heads * chunks), rest = task % (s.kv_heads * chunks), n = rest / chunks;
    const int64_t first = rest % chunks * kHeads, head = n * group + first;
    const Sight sight = sight_of(i);
    const int64_t hidden = window > 0 ? most(0, sight.used - window) : 0;
    const Span spans[2] = {{sight.shared, sight.prefix}, {sight.start + hidden, sight.used - hidden}};
    const int64_t at = (i * s.heads + head) * s.size;
    const auto kernel = s.size == 64 ? attend<T, 64> : s.size == 128 ? attend<T, 128> : attend<T, 0>;
    kernel(static_cast<const T*>(q) + at, static_cast<const T*>(k) + n * s.k_head,
           static_cast<const T*>(v) + n * s.v_head, static_cast<T*>(out) + at, s, least(kHeads, group - first), spans);
  }
}

}  // namespace

void attention_of_team(const void* q, const void* k, const void* v, void* out, const Sight* sights, int64_t sequences,
                       int64_t window, const AttentionShape& shape, int64_t dtype) {
  const auto sight_of = [&](int64_t i) { return sights[i]; };
  if (dtype == kBFloat16) {
    attend_all<bf16>(q, k, v, out, sight_of, sequences, window, shape);
  } else {
    attend_all<float>(q, k, v, out, sight_of, sequences, window, shape);
  }
}

// q, out: [sequences, heads, size] contiguous; k, v: [rows, kv_heads, size] with unit stride in size; start, used:
// [sequences]; prefix: [sequences, 2] or null. Returns -1, or the first sequence with rows outside 0..rows: then
// nothing is computed.
int64_t decode_attention(const void* q, const void* k, const void* v, void* out, const int32_t* start,
                         const int32_t* used, const int32_t* prefix, int64_t sequences, int64_t rows, int64_t heads,
                         int64_t kv_heads, int64_t size, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,
                         int64_t dtype, float scale, float softcap) {
  const auto sight_of = [&](int64_t i) {
    return Sight{start[i], used[i], prefix ? prefix[2 * i] : 0, prefix ? prefix[2 * i + 1] : 0};
  };
  int64_t keys = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const Sight s = sight_of(i);
    if (s.start < 0 || s.used < 0 || s.start + s.used > rows) return i;
    if (s.shared < 0 || s.prefix < 0 || s.shared + s.prefix > rows) return i;
    keys += s.used + s.prefix;
  }
  const AttentionShape shape{heads, kv_heads, size, k_row, k_head, v_row, v_head, scale, softcap};
#pragma omp parallel if (keys * heads * size > kParallelElements)
  if (dtype == kBFloat16) {
    attend_all<bf16>(q, k, v, out, sight_of, sequences, 0, shape);
  } else {
    attend_all<float>(q, k, v, out, sight_of, sequences, 0, shape);
  }
  return -1;
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(decode_attention);
