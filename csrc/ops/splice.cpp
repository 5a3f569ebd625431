// splice: text embeddings and image rows into one packed buffer, and the two gradients.
#include <cstdint>
#include <cstring>

#include "tlf/kernel.h"
#include "tlf/numeric.h"
#include "tlf/simd.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kParallelBytes = 1 << 17;  // below this a thread team costs more than it saves
constexpr int64_t kRows = 256;               // of the embedding: a task
constexpr int64_t kTile = 512;               // columns summed at a time, in a float buffer on the stack

// owner[t] = the feature row that covers position t, or -1 for text
void find_owners(const int64_t* slots, int32_t* owner, int64_t tokens, int64_t rows) {
  for (int64_t t = 0; t < tokens; ++t) owner[t] = -1;
  for (int64_t r = 0; r < rows; ++r) {
    if (slots[r] < tokens) owner[slots[r]] = static_cast<int32_t>(r);
  }
}

// out = (Add: out +) the sum of the rows of grad in a list, rounded once
template <bool Add, typename T>
void sum_rows(const T* grad, int64_t grad_stride, const int32_t* next, int32_t first, T* out, int64_t dim) {
  for (int64_t start = 0; start < dim; start += kTile) {
    const int64_t width = dim - start < kTile ? dim - start : kTile;
    float total[kTile] = {};
    if constexpr (Add) {
      for (int64_t j = 0; j < width; ++j) total[j] = to_float(out[start + j]);
    }
    for (int32_t t = first; t >= 0; t = next[t]) {
      const T* row = grad + t * grad_stride + start;
      for (int64_t j = 0; j < width; ++j) total[j] += to_float(row[j]);
    }
    for (int64_t j = 0; j < width; ++j) store(out + start + j, total[j]);
  }
}

// The text positions of each id in ascending order, in scratch memory of int32 [2 * tokens + vocab].
struct Positions {
  int32_t* owner;
  int32_t* next;  // the position of the same id after t, or -1
  int32_t* head;  // [vocab] the first one, or -1

  Positions(const int64_t* ids, const int64_t* slots, int32_t* scratch, int64_t tokens, int64_t rows, int64_t vocab)
      : owner(scratch), next(owner + tokens), head(next + tokens) {
    find_owners(slots, owner, tokens, rows);
    for (int64_t v = 0; v < vocab; ++v) head[v] = -1;
    for (int64_t t = tokens - 1; t >= 0; --t) {
      if (owner[t] >= 0) continue;
      next[t] = head[ids[t]];
      head[ids[t]] = static_cast<int32_t>(t);
    }
  }
};

// Zeros past the caches where rows allow it: 57 MB of them would only push out what is needed next.
TLF_INLINE void clear_row(char* row, int64_t bytes) {
#if defined(TLF_AVX512)
  if (reinterpret_cast<uintptr_t>(row) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(row + i), _mm512_setzero_si512());
    }
    return;
  }
#endif
  std::memset(row, 0, static_cast<size_t>(bytes));
}

// Each row is written by one thread, once, so the sum does not depend on the number of threads.
template <typename T>
void scatter_text(const T* grad, int64_t grad_stride, const Positions& text, T* d_weight, int64_t vocab, int64_t dim) {
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
  if (row_bytes == 0) return;
  // dynamic: the most frequent ids collect hundreds of rows, most none
#pragma omp parallel for schedule(dynamic, kRows) if (vocab * row_bytes > kParallelBytes)
  for (int64_t v = 0; v < vocab; ++v) {
    T* row = d_weight + v * dim;
    if (text.head[v] < 0) {
      clear_row(reinterpret_cast<char*>(row), row_bytes);
    } else {
      sum_rows<false>(grad, grad_stride, text.next, text.head[v], row, dim);
    }
  }
}

template <typename T>
void add_text(const T* grad, int64_t grad_stride, const int64_t* ids, const Positions& text, T* base, int64_t tokens,
              int64_t dim) {
#pragma omp parallel for schedule(dynamic, 8) if (tokens * dim * static_cast<int64_t>(sizeof(T)) > kParallelBytes)
  for (int64_t t = 0; t < tokens; ++t) {
    if (text.owner[t] >= 0 || text.head[ids[t]] != t) continue;
    sum_rows<true>(grad, grad_stride, text.next, static_cast<int32_t>(t), base + ids[t] * dim, dim);
  }
}

}  // namespace

// Strides and row_bytes in bytes; scratch: int32 [tokens]. Serves every dtype.
void splice_fwd(const int64_t* ids, const char* weight, int64_t weight_stride, const char* features,
                int64_t features_stride, const int64_t* slots, int32_t* scratch, char* out, int64_t tokens,
                int64_t rows, int64_t row_bytes) {
  find_owners(slots, scratch, tokens, rows);
  if (row_bytes == 0) return;
#pragma omp parallel for schedule(static) if (tokens * row_bytes > kParallelBytes)
  for (int64_t t = 0; t < tokens; ++t) {
    const char* source = scratch[t] >= 0 ? features + scratch[t] * features_stride : weight + ids[t] * weight_stride;
    std::memcpy(out + t * row_bytes, source, row_bytes);
  }
}

// d_weight: [vocab, dim]. grad_stride in elements. scratch: int32 [2 * tokens + vocab].
void splice_bwd_weight(const void* grad, int64_t grad_stride, const int64_t* ids, const int64_t* slots,
                       int32_t* scratch, void* d_weight, int64_t tokens, int64_t rows, int64_t vocab, int64_t dim,
                       int64_t dtype) {
  const Positions text(ids, slots, scratch, tokens, rows, vocab);
  if (dtype == kBFloat16) {
    scatter_text(static_cast<const BFloat16*>(grad), grad_stride, text, static_cast<BFloat16*>(d_weight), vocab, dim);
  } else {
    scatter_text(static_cast<const float*>(grad), grad_stride, text, static_cast<float*>(d_weight), vocab, dim);
  }
}

// base: [vocab, dim]; the rest as above.
void splice_bwd_add(const void* grad, int64_t grad_stride, const int64_t* ids, const int64_t* slots, int32_t* scratch,
                    void* base, int64_t tokens, int64_t rows, int64_t vocab, int64_t dim, int64_t dtype) {
  const Positions text(ids, slots, scratch, tokens, rows, vocab);
  if (dtype == kBFloat16) {
    add_text(static_cast<const BFloat16*>(grad), grad_stride, ids, text, static_cast<BFloat16*>(base), tokens, dim);
  } else {
    add_text(static_cast<const float*>(grad), grad_stride, ids, text, static_cast<float*>(base), tokens, dim);
  }
}

// Stride and row_bytes in bytes.
void splice_bwd_features(const char* grad, int64_t grad_stride, const int64_t* slots, char* d_features, int64_t tokens,
                         int64_t rows, int64_t row_bytes) {
  if (row_bytes == 0) return;
#pragma omp parallel for schedule(static) if (rows * row_bytes > kParallelBytes)
  for (int64_t r = 0; r < rows; ++r) {
    char* target = d_features + r * row_bytes;
    if (slots[r] < tokens) {
      std::memcpy(target, grad + slots[r] * grad_stride, row_bytes);
    } else {
      std::memset(target, 0, row_bytes);
    }
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(splice_fwd);
TLF_KERNEL(splice_bwd_weight);
TLF_KERNEL(splice_bwd_add);
TLF_KERNEL(splice_bwd_features);
