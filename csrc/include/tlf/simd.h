// Vectors, packing and the one matrix multiply of packed attention, for the ISA of this pass.
//
// Every product is C[M, N] (+)= A[M, K] B[K, N] with A row-major and B in "lanes": one lane is 4 bytes and holds KP
// consecutive elements along K of one column (KP = 2 for bf16, 1 for float), so that one vector instruction multiplies
// a broadcast lane of A with 16 columns of B: vdpbf16ps, or a fused multiply-add.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tlf/kernel.h"

#if defined(TLF_ISA_IS_avx512bf16) || defined(TLF_ISA_IS_amx)
#define TLF_AVX512BF16 1
#endif
#if defined(TLF_ISA_IS_avx512) || defined(TLF_AVX512BF16)
#define TLF_AVX512 1
#endif
#if defined(TLF_AVX512) || defined(TLF_ISA_IS_avx2)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operands inside the intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#endif

#define TLF_NOINLINE __attribute__((noinline))  // where inlining into a task measurably spoilt its inner loops
#define TLF_INLINE inline __attribute__((always_inline))

namespace tlf {
namespace TLF_ISA {

#if defined(TLF_AVX512)
constexpr int kWidth = 16, kTileVecs = 4;  // 32 registers: 6 x 4 accumulators
#elif defined(TLF_ISA_IS_avx2)
constexpr int kWidth = 8, kTileVecs = 2;  // 16 registers: 6 x 2 accumulators
#else
constexpr int kWidth = 4, kTileVecs = 2;
#endif
constexpr int kPanelVecs = 4;
constexpr int kPanel = kPanelVecs * kWidth;  // query rows that are processed side by side, one per lane

typedef float Vec __attribute__((vector_size(kWidth * 4), may_alias));
typedef float VecU __attribute__((vector_size(kWidth * 4), may_alias, aligned(4)));
typedef uint32_t BitVec __attribute__((vector_size(kWidth * 4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kWidth * 4), may_alias));

constexpr float kLog2e = 1.44269504f;

struct bf16 {
  uint16_t bits;
};

template <typename E>
struct Pack;
template <>
struct Pack<float> {
  static constexpr int kp = 1;
};
template <>
struct Pack<bf16> {
  static constexpr int kp = 2;
};

TLF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TLF_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
TLF_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return least(most(x, low), high); }
TLF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TLF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// size of equal pieces of at most limit: 196 is 2 x 102 rather than 192 + 4
TLF_INLINE int64_t even_piece(int64_t total, int64_t limit, int64_t unit) {
  return least(limit, round_up(ceil_div(total, ceil_div(total, limit)), unit));
}

TLF_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
TLF_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecU*>(p) = x; }
TLF_INLINE Vec splat(float x) { return x - Vec{}; }
// a > b ? a : b, so b where either is nan
#if defined(TLF_AVX512)
TLF_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#else
TLF_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif
TLF_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// 2^x to 8e-8 relative. Below -126 it stays at 2^-126: nothing, next to the largest term, which is 1.
TLF_INLINE Vec exp2v(Vec x) {
  x = larger(splat(-126.0f), x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves it in the low bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  // minimax polynomial of 2^f on [-0.5, 0.5]
  Vec y = splat(1.327647129e-3f);
  y = y * f + 9.675541893e-3f;
  y = y * f + 5.550713092e-2f;
  y = y * f + 2.402212024e-1f;
  y = y * f + 6.931469440e-1f;
  y = y * f + 1.000000119f;
  return (Vec)((BitVec)y + ((BitVec)shifted << 23));  // unsigned: beyond 2^127 it may wrap
}

#if defined(TLF_AVX512)
// 2^x to 3e-6 relative, flushed to 0 below -149: half the instructions of exp2v, for results that become bfloat16
TLF_INLINE Vec exp2_short(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  Vec y = splat(1.353383115e-2f);
  y = y * f + 5.201121076e-2f;
  y = y * f + 2.414436325e-1f;
  y = y * f + 6.930034359e-1f;
  y = y * f + 1.000002629f;
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
}
#endif
template <typename E>
TLF_INLINE Vec exp2_for(Vec x) {  // 2^x, to be stored as E
#if defined(TLF_AVX512)
  if constexpr (Pack<E>::kp == 2) return exp2_short(x);
#endif
  return exp2v(x);
}

TLF_INLINE Vec tanhv(Vec x) {
  const Vec e = exp2v(2.885390082f * (x < 15.0f ? x : splat(15.0f)));
  return 1.0f - 2.0f / (e + 1.0f);
}

TLF_INLINE float widen(float x) { return x; }
TLF_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
TLF_INLINE void narrow(float x, float* out) { *out = x; }
TLF_INLINE void narrow(float x, bf16* out) {  // round to nearest even; nan stays nan
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// stops the compiler from turning a short loop into a call of memcpy or memset
TLF_INLINE void keep_loop() { __asm__ volatile("" ::: "memory"); }

// memset takes no null pointer, not even for no bytes: an empty tensor has one
template <typename T>
TLF_INLINE void clear(T* out, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(T));
}

// dst[0, size) = src, dst[size, padded) = 0
template <typename E, typename T>
TLF_INLINE void copy_row(E* __restrict dst, const T* __restrict src, int64_t size, int64_t padded) {
  if constexpr (sizeof(E) == sizeof(T)) {
    // rows are short: calling memcpy for each took a tenth of the forward
    constexpr int64_t step = 32 / sizeof(E);
    int64_t i = 0;
    for (; i + step <= size; i += step) {
      __builtin_memcpy(dst + i, src + i, 32);
      keep_loop();
    }
    for (; i < size; ++i) {
      dst[i] = src[i];
      keep_loop();
    }
  } else {
    for (int64_t i = 0; i < size; ++i) dst[i] = widen(src[i]);
  }
  for (int64_t i = size; i < padded; ++i) {
    dst[i] = E{};
    keep_loop();
  }
}

constexpr int64_t kAhead = 16;  // rows; strides between them defeat the hardware's prefetcher
template <bool Write = false, typename T>
TLF_INLINE void prefetch_row(const T* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, Write);
}

// a . b, summed in kWidth strands
template <typename T>
TLF_INLINE float dot_row(const T* a, const T* b, int64_t size) {
  float strands[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    for (int c = 0; c < kWidth; ++c) strands[c] += widen(a[i + c]) * widen(b[i + c]);
  }
  float total = 0.0f;
  for (; i < size; ++i) total += widen(a[i]) * widen(b[i]);
  for (int c = 0; c < kWidth; ++c) total += strands[c];
  return total;
}

template <typename T>
inline void store_row(T* __restrict dst, const float* __restrict src, int64_t size, float factor) {
  int64_t i = 0;
#if defined(TLF_AVX512BF16)
  if constexpr (sizeof(T) == 2) {
    for (; i + kWidth <= size; i += kWidth) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i),
                          (__m256i)_mm512_cvtneps_pbh((__m512)(load(src + i) * factor)));
    }
  }
#endif
  for (; i < size; ++i) narrow(src[i] * factor, dst + i);
}

#if defined(TLF_AVX512)
// 16 x 16 block; rows >= n read as 0, columns >= m are neither read nor written
inline void transpose_block(const uint32_t* src, int64_t lds, int64_t n, int64_t m, uint32_t* dst, int64_t ldd) {
  __m512i a[16], b[16];
  const __mmask16 mask = static_cast<__mmask16>(m >= 16 ? 0xffff : (1 << m) - 1);
  for (int i = 0; i < 16; ++i) a[i] = i < n ? _mm512_maskz_loadu_epi32(mask, src + i * lds) : _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88);
    a[8 + i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd);
    a[4 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd);
  }
  for (int i = 0; i < 16; ++i) {
    if (i < m) _mm512_storeu_si512(dst + i * ldd, a[i]);
  }
}
#else
inline void transpose_block(const uint32_t* src, int64_t lds, int64_t n, int64_t m, uint32_t* dst, int64_t ldd) {
  for (int64_t j = 0; j < least(m, kWidth); ++j) {
    for (int64_t i = 0; i < kWidth; ++i) dst[j * ldd + i] = i < n ? src[i * lds + j] : 0;
  }
}
#endif

// dst[m, round_up(n, kWidth)] = src[n, m] transposed, in units of 4 bytes; the columns past n become 0
inline void transpose(const void* src, int64_t lds, int64_t n, int64_t m, void* dst, int64_t ldd) {
  for (int64_t i = 0; i < n; i += kWidth) {
    for (int64_t j = 0; j < m; j += kWidth) {
      transpose_block(static_cast<const uint32_t*>(src) + i * lds + j, lds, n - i, m - j,
                      static_cast<uint32_t*>(dst) + j * ldd + i, ldd);
    }
  }
}

// out[i, c] = lane (rows[2i, c], rows[2i + 1, c]); a missing last row counts as 0
inline void interleave(const bf16* rows, int64_t ld, int64_t n, int64_t m, uint32_t* __restrict out, int64_t ldo) {
  for (int64_t i = 0; i < n; i += 2) {
    const uint16_t* a = &rows[i * ld].bits;
    const uint16_t* b = &rows[(i + 1) * ld].bits;
    uint32_t* to = out + (i / 2) * ldo;
    prefetch_row(rows + (i + kAhead) * ld, m);
    prefetch_row(rows + (i + kAhead + 1) * ld, m);
    if (i + 1 < n) {
      for (int64_t c = 0; c < m; ++c) to[c] = a[c] | static_cast<uint32_t>(b[c]) << 16;
    } else {
      for (int64_t c = 0; c < m; ++c) to[c] = a[c];
    }
  }
}

// out: [m, ldo] elements with out[c, i] = rows[i, c], zero from n to the next whole lane. temp: lanes [n / KP, m].
inline void transpose_elements(const float* rows, int64_t ld, int64_t n, int64_t m, float* out, int64_t ldo, float*) {
  transpose(rows, ld, n, m, out, ldo);
}
inline void transpose_elements(const bf16* rows, int64_t ld, int64_t n, int64_t m, bf16* out, int64_t ldo,
                               float* temp) {
  uint32_t* lanes = reinterpret_cast<uint32_t*>(temp);
  interleave(rows, ld, n, m, lanes, m);
  transpose(lanes, m, ceil_div(n, 2), m, out, ldo / 2);
}

TLF_INLINE Vec multiply_add(Vec acc, const float* a, Vec b) { return acc + *a * b; }
#if defined(TLF_AVX512BF16)
TLF_INLINE Vec multiply_add(Vec acc, const bf16* a, Vec b) {
  int32_t lane;
  std::memcpy(&lane, a, 4);
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(lane), (__m512bh)b);
}
// rows lo and hi of 16 columns, rounded: first row in the lower half
TLF_INLINE __m512i narrow_rows(Vec lo, Vec hi) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo); }
// the same as lanes (lo[c], hi[c])
TLF_INLINE Vec join_lanes(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, rows);
}
TLF_INLINE void store_rows(bf16* lo, bf16* hi, __m512i rows) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lo), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(hi), _mm512_extracti64x4_epi64(rows, 1));
}
#endif

// C = AB; the same, and extra = max(extra, C) a column; C += AB; C = extra C + AB with one extra a column, or a row
enum class Write { store, store_max, add, scale_add, scale_rows };
// how A lies: a row's lanes side by side, or a column's
enum class Lie { rows, columns };

template <typename E, Write W, Lie L, int MR, int NV>
TLF_INLINE void tile(int64_t lanes, const E* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                     float* extra) {
  const int64_t a_row = L == Lie::rows ? lda : Pack<E>::kp, a_lane = L == Lie::rows ? Pack<E>::kp : lda;
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec{};
  }
  for (int64_t k = 0; k < lanes; ++k) {
    Vec col[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) col[v] = load(b + k * ldb + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = multiply_add(acc[r][v], a + r * a_row + k * a_lane, col[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* to = c + r * ldc + v * kWidth;
      if constexpr (W == Write::store || W == Write::store_max) store(to, acc[r][v]);
      if constexpr (W == Write::add) store(to, load(to) + acc[r][v]);
      if constexpr (W == Write::scale_add) store(to, load(to) * load(extra + v * kWidth) + acc[r][v]);
      if constexpr (W == Write::scale_rows) store(to, load(to) * extra[r] + acc[r][v]);
    }
  }
  if constexpr (W == Write::store_max) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec most = load(extra + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) most = larger(most, acc[r][v]);
      store(extra + v * kWidth, most);
    }
  }
}

template <typename E, Write W, Lie L, int NV, int MR>
inline void tile_rows(int64_t m, int64_t lanes, const E* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc, float* extra) {
  for (; m >= MR; m -= MR, a += MR * (L == Lie::rows ? lda : Pack<E>::kp), c += MR * ldc) {
    tile<E, W, L, MR, NV>(lanes, a, lda, b, ldb, c, ldc, extra);
    if (W == Write::scale_rows) extra += MR;
  }
  if constexpr (MR > 1) {
    constexpr int next = MR > 8 ? 8 : MR > 4 ? 4 : MR / 2;
    if (m > 0) tile_rows<E, W, L, NV, next>(m, lanes, a, lda, b, ldb, c, ldc, extra);
  }
}

// C[m, nv vectors] from A[m, lanes * KP], B[lanes, nv vectors]; ldb and ldc in floats, lda in elements
template <typename E, Write W, Lie L = Lie::rows>
inline void gemm(int64_t m, int64_t nv, int64_t lanes, const E* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, float* extra = nullptr) {
  while (nv > 0) {
    // 5 and 6 vectors: 3 + 2 and 3 + 3 rather than 4 + 1 and 4 + 2
    const int64_t n = kTileVecs == 4 && (nv == 5 || nv == 6) ? 3 : least(nv, kTileVecs);
    if constexpr (kTileVecs == 4) {
      if (n == 4) tile_rows<E, W, L, 4, 6>(m, lanes, a, lda, b, ldb, c, ldc, extra);
      if (n == 3) tile_rows<E, W, L, 3, 8>(m, lanes, a, lda, b, ldb, c, ldc, extra);
    }
    if (n == 2) tile_rows<E, W, L, 2, (kTileVecs == 4 ? 12 : 6)>(m, lanes, a, lda, b, ldb, c, ldc, extra);
    if (n == 1) tile_rows<E, W, L, 1, (kTileVecs == 4 ? 12 : 8)>(m, lanes, a, lda, b, ldb, c, ldc, extra);
    nv -= n, b += n * kWidth, c += n * kWidth;
    if (W == Write::store_max || W == Write::scale_add) extra += n * kWidth;
  }
}

// Grow-only memory of one thread, so that no loop allocates. carve(scratch) takes its buffers; it is called twice,
// first without memory to learn the size.
struct Scratch {
  char* base = nullptr;
  size_t capacity = 0, used = 0;
  ~Scratch() { std::free(base); }

  template <typename T>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    // buffers whose sizes are powers of two would all start in the same cache set: nine lines apart instead
    const size_t size = static_cast<size_t>(count) * sizeof(T), step = ((size + 63) & ~size_t{63}) + 9 * 64;
    if (base != nullptr) ASAN_POISON_MEMORY_REGION(base + used + size, step - size);
    used += step;
    return p;
  }

  template <typename Carve>
  void lay_out(const Carve& carve) {
    Scratch probe;
    carve(probe);
    if (probe.used > capacity) {
      std::free(base);
      capacity = (probe.used + probe.used / 4 + 4095) & ~size_t{4095};
      base = static_cast<char*>(std::aligned_alloc(4096, capacity));
      if (base == nullptr) std::abort();  // inside a parallel region: nothing could be thrown
    }
    used = 0;
    ASAN_UNPOISON_MEMORY_REGION(base, capacity);
    carve(*this);
  }
};

}  // namespace TLF_ISA
}  // namespace tlf
