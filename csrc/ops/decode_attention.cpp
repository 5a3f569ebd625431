// decode_attention: one query a sequence against its rows of the K/V pool. Memory-bound: every key and value is read
// once, for all query heads that share it, and nothing is packed. Online softmax over blocks of keys.
#include <cmath>
#include <cstdint>

#include "tlf/kernel.h"
#include "tlf/numeric.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kBlock = 64;                        // keys between two rescalings
constexpr int64_t kHeads = 8;                         // query heads of a key head that are treated at once
constexpr int64_t kSize = 256;                        // largest head size
constexpr int64_t kParallelElements = 3 * (1 << 16);  // below this a thread team costs more than it saves

struct Shape {
  int64_t heads, kv_heads, size, k_row, k_head, v_row, v_head;
  float scale, softcap;
};

struct Span {
  int64_t first, count;
};

// Query heads [0, group) of one key head; q and out: [group, size] contiguous; k and v point at the key head.
template <typename T>
void attend(const T* q, const T* k, const T* v, T* out, const Shape& s, int64_t group, const Span* spans) {
  alignas(64) float queries[kHeads][kSize], sums[kHeads][kSize], row[kSize], scores[kHeads][kBlock];
  float top[kHeads], total[kHeads];
  const int64_t size = s.size;
  for (int64_t h = 0; h < group; ++h) {
    top[h] = -INFINITY, total[h] = 0.0f;
    for (int64_t d = 0; d < size; ++d) queries[h][d] = to_float(q[h * size + d]) * s.scale, sums[h][d] = 0.0f;
  }
  for (int part = 0; part < 2; ++part) {
    const int64_t last = spans[part].first + spans[part].count;
    for (int64_t from = spans[part].first; from < last; from += kBlock) {
      const int64_t count = last - from < kBlock ? last - from : kBlock;
      for (int64_t j = 0; j < count; ++j) {
        const T* key = k + (from + j) * s.k_row;
        for (int64_t d = 0; d < size; ++d) row[d] = to_float(key[d]);
        for (int64_t h = 0; h < group; ++h) {
          float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
          for (int64_t d = 0; d < size; ++d) dot += queries[h][d] * row[d];
          scores[h][j] = dot;
        }
      }
      for (int64_t h = 0; h < group; ++h) {
        float* score = scores[h];
        if (s.softcap > 0.0f) {
          for (int64_t j = 0; j < count; ++j) score[j] = s.softcap * tanh_fast(score[j] / s.softcap);
        }
        float peak = top[h];
        for (int64_t j = 0; j < count; ++j) peak = score[j] > peak ? score[j] : peak;
        if (peak > top[h]) {
          const float fade = top[h] == -INFINITY ? 0.0f : exp_fast(top[h] - peak);
          for (int64_t d = 0; d < size; ++d) sums[h][d] *= fade;
          total[h] *= fade, top[h] = peak;
        }
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; ++j) score[j] = exp_fast(score[j] - peak), sum += score[j];
        total[h] += sum;
      }
      for (int64_t j = 0; j < count; ++j) {
        const T* value = v + (from + j) * s.v_row;
        for (int64_t d = 0; d < size; ++d) row[d] = to_float(value[d]);
        for (int64_t h = 0; h < group; ++h) {
          const float weight = scores[h][j];
          for (int64_t d = 0; d < size; ++d) sums[h][d] += weight * row[d];
        }
      }
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    const float inverse = total[h] > 0.0f ? 1.0f / total[h] : 0.0f;  // a query that sees no key gets zeros
    for (int64_t d = 0; d < size; ++d) store(out + h * size + d, sums[h][d] * inverse);
  }
}

template <typename T>
void run(const T* q, const T* k, const T* v, T* out, const int32_t* start, const int32_t* used, const int32_t* prefix,
         const Shape& s, int64_t sequences, int64_t keys) {
  const int64_t group = s.heads / s.kv_heads, chunks = (group + kHeads - 1) / kHeads;
  const int64_t tasks = sequences * s.kv_heads * chunks;
#pragma omp parallel for schedule(dynamic, 1) if (keys * s.heads * s.size > kParallelElements)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t i = task / (s.kv_heads * chunks), rest = task % (s.kv_heads * chunks), n = rest / chunks;
    const int64_t first = rest % chunks * kHeads, head = n * group + first;
    const int64_t some = group - first < kHeads ? group - first : kHeads;
    const Span spans[2] = {{prefix ? prefix[2 * i] : 0, prefix ? prefix[2 * i + 1] : 0}, {start[i], used[i]}};
    const int64_t at = (i * s.heads + head) * s.size;
    attend(q + at, k + n * s.k_head, v + n * s.v_head, out + at, s, some, spans);
  }
}

}  // namespace

// q, out: [sequences, heads, size] contiguous; k, v: [rows, kv_heads, size] with unit stride in size; start, used:
// [sequences]; prefix: [sequences, 2] or null. Returns -1, or the first sequence with rows outside 0..rows: then
// nothing is computed.
int64_t decode_attention(const void* q, const void* k, const void* v, void* out, const int32_t* start,
                         const int32_t* used, const int32_t* prefix, int64_t sequences, int64_t rows, int64_t heads,
                         int64_t kv_heads, int64_t size, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,
                         int64_t dtype, float scale, float softcap) {
  int64_t keys = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t own = start[i], count = used[i];
    const int64_t shared = prefix ? prefix[2 * i] : 0, length = prefix ? prefix[2 * i + 1] : 0;
    if (own < 0 || count < 0 || own + count > rows || shared < 0 || length < 0 || shared + length > rows) return i;
    keys += count + length;
  }
  const Shape shape{heads, kv_heads, size, k_row, k_head, v_row, v_head, scale, softcap};
  if (dtype == kBFloat16) {
    run(static_cast<const BFloat16*>(q), static_cast<const BFloat16*>(k), static_cast<const BFloat16*>(v),
        static_cast<BFloat16*>(out), start, used, prefix, shape, sequences, keys);
  } else {
    run(static_cast<const float*>(q), static_cast<const float*>(k), static_cast<const float*>(v),
        static_cast<float*>(out), start, used, prefix, shape, sequences, keys);
  }
  return -1;
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(decode_attention);
