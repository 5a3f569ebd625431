// gemm: left right (+ bias) of bfloat16 matrices in AMX tiles; the other ISAs have nothing that beats torch.
//
// A thread takes a range of rows and a block of columns. It lays the right factor of its block out as tiles, as much of
// the depth as its second-level cache holds, and lets it stream past 32 rows of the left factor at a time, which stay
// in the first-level cache: as they lie, or as tiles where they lie transposed. Sums are float32; their order does not
// depend on the number of threads.
#include <cstdint>

#include "tlf/kernel.h"

#if defined(TLF_ISA_IS_amx)
#include <omp.h>

#include "tlf/amx.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kSide = 32;  // rows of a left panel, columns of a right one: two tiles
constexpr int64_t kDeep = kTilePairs;
constexpr int64_t kStep = kSide * kDeep;  // elements of a panel for a step of kDeep
constexpr int64_t kHalf = kStep / 2;
constexpr int64_t kSquare = kSide * kSide;
constexpr int64_t kAlign = 4096;  // bytes
// What a first-level cache holds: a left panel alone, or a piece of one beside a group of sums.
constexpr int64_t kWhole = 576;
constexpr int64_t kPiece = 512;
constexpr int64_t kGroup = 3;
// What a second-level cache holds: bytes of the right factor at its whole depth,
constexpr int64_t kNear = 5 << 18;
// or some of the depth beside the sums of some rows and columns.
constexpr int64_t kDepth = 512;
constexpr int64_t kRows = 384;
constexpr int64_t kColumns = 576;

struct Matrix {
  const bf16* data;
  int64_t ld;
  bool turned;  // lies as its transpose
};

// How a problem is cut, and where a thread's parts lie in its share of the scratch memory (bytes).
struct Plan {
  int64_t rows, columns, depth;
  int64_t width, blocks, chunk, chunks;  // columns and rows of a task, and how many there are
  int64_t near, piece;                   // of the depth: what is laid out at once, what is multiplied at once
  int64_t panel, sums, size;

  Plan(int64_t rows, int64_t columns, int64_t depth, bool turned, int64_t threads)
      : rows(rows), columns(columns), depth(depth) {
    near = round_up(depth, kDeep);
    int64_t widest = kNear / (near * 2) / kSide * kSide, tallest = rows;
    if (widest < least(columns, turned ? 512 : 128)) {
      near = even_piece(depth, kDepth, kDeep), widest = kColumns, tallest = kRows;
    }
    piece = near <= kWhole ? near : even_piece(near, kPiece, kDeep);
    share(ceil_div(columns, widest), ceil_div(rows, tallest), turned, threads);
    width = round_up(ceil_div(columns, blocks), kSide), blocks = ceil_div(columns, width);
    chunk = round_up(ceil_div(rows, chunks), kSide), chunks = ceil_div(rows, chunk);
    panel = round_up(near * width * 2, kAlign);
    sums = panel + round_up(near * kSide * 2, kAlign);
    size = sums + round_up((near < depth ? chunk : kSide) * width * 4, kAlign);
  }

  // The cut into tasks that all threads have equally many of, and for which the least is laid out: the left factor once
  // for each block of columns, the right one once for each range of rows.
  void share(int64_t few_blocks, int64_t few_chunks, bool turned, int64_t threads) {
    int64_t least_work = INT64_MAX;
    for (int64_t b = few_blocks; b < few_blocks + threads; ++b) {
      int64_t c = few_chunks;
      while (b * c % threads != 0) ++c;
      const int64_t work = (turned ? 4 : 1) * rows * b + 2 * columns * c;
      if (work < least_work) least_work = work, blocks = b, chunks = c;
    }
  }
};

TLF_INLINE __m512i load_some(const bf16* from, int64_t n) {
  return n >= kSide ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(n <= 0 ? 0 : (1u << n) - 1, from);
}

// 32 rows x 32 columns as 16 pairs of rows, zero from n and width on. low[p]: columns 0 .. 3, 8 .. 11, 16 .. 19,
// 24 .. 27 of rows 2 p and 2 p + 1, interleaved; high[p]: the others.
TLF_INLINE void read_pairs(const bf16* from, int64_t ld, int64_t n, int64_t width, __m512i* low, __m512i* high) {
#pragma GCC unroll 4
  for (int p = 0; p < 16; ++p) {
    const __m512i a = 2 * p < n ? load_some(from + 2 * p * ld, width) : _mm512_setzero_si512();
    const __m512i b = 2 * p + 1 < n ? load_some(from + (2 * p + 1) * ld, width) : _mm512_setzero_si512();
    low[p] = _mm512_unpacklo_epi16(a, b);
    high[p] = _mm512_unpackhi_epi16(a, b);
  }
}

// The left panel of rows first .. first + 31 from ``at`` on in the depth; n, deep: what there is of both.
void pack_left(const Matrix& m, int64_t first, int64_t at, int64_t n, int64_t deep, bf16* to) {
  if (!m.turned) {
    const bf16* from = m.data + first * m.ld + at;
    for (int64_t r = 0; r < kSide; ++r, from += m.ld, to += kDeep) {
      if (r >= n) {
        for (int64_t k = 0; k < deep; k += kDeep) _mm512_store_si512(to + k * kSide, _mm512_setzero_si512());
        continue;
      }
      int64_t k = 0;
      for (; k + kDeep <= deep; k += kDeep) _mm512_store_si512(to + k * kSide, _mm512_loadu_si512(from + k));
      if (k < deep) _mm512_store_si512(to + k * kSide, load_some(from + k, deep - k));
    }
    return;
  }
  alignas(64) __m512i low[16], high[16];
  alignas(64) uint32_t turned[16 * 16];
  const bf16* from = m.data + at * m.ld + first;
  for (int64_t k = 0; k < deep; k += kDeep, from += kDeep * m.ld, to += kStep) {
    read_pairs(from, m.ld, deep - k, n, low, high);
    for (int half = 0; half < 2; ++half) {
      transpose_block(reinterpret_cast<const uint32_t*>(half ? high : low), 16, 16, 16, turned, 16);
      for (int c = 0; c < 16; ++c) {
        const int column = c / 4 * 8 + half * 4 + c % 4;
        _mm512_store_si512(to + column * kDeep, _mm512_load_si512(turned + c * 16));
      }
    }
  }
}

// The right panel of columns first .. first + 31.
void pack_right(const Matrix& m, int64_t first, int64_t at, int64_t n, int64_t deep, bf16* to) {
  if (m.turned) {
    alignas(64) bf16 whole[kStep];
    for (int64_t k = 0; k < deep; k += kDeep, to += kStep) {
      const bf16* from = m.data + first * m.ld + at + k;
      int64_t ld = m.ld;
      if (n < kSide || deep - k < kDeep || ld % 2 != 0) {
        for (int64_t c = 0; c < kSide; ++c) {
          const __m512i line = c < n ? load_some(from + c * ld, deep - k) : _mm512_setzero_si512();
          _mm512_store_si512(whole + c * kDeep, line);
        }
        from = whole, ld = kDeep;
      }
      for (int half = 0; half < 2; ++half) {
        transpose_block(reinterpret_cast<const uint32_t*>(from + half * 16 * ld), ld / 2, 16, 16,
                        reinterpret_cast<uint32_t*>(to + half * kHalf), 16);
      }
    }
    return;
  }
  const __m512i left = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i right = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  __m512i low[16], high[16];
  const bf16* from = m.data + at * m.ld + first;
  for (int64_t k = 0; k < deep; k += kDeep, from += kDeep * m.ld, to += kStep) {
    read_pairs(from, m.ld, deep - k, n, low, high);
    for (int p = 0; p < 16; ++p) {
      _mm512_store_si512(to + p * 32, _mm512_permutex2var_epi64(low[p], left, high[p]));
      _mm512_store_si512(to + kHalf + p * 32, _mm512_permutex2var_epi64(low[p], right, high[p]));
    }
  }
}

// A left panel as tiles, or in the rows of the matrix. ld: bytes; half, step: elements to the other and the next tiles.
struct Panel {
  const bf16* at;
  int64_t ld, half, step;
};

// A tile that leaves the first-level cache to others.
template <int To>
TLF_INLINE void tile_stream(const void* from) {
  check_tile(from, 64);
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(64)), "i"(To) : "memory");
}

// Everything is copied into registers: what the loop stored would hold up tiles that lie 4 KiB further.
TLF_INLINE void multiply_steps(int64_t steps, const Panel& panel, int64_t first, const bf16* b) {
  const bf16 *a = panel.at + first * panel.step, *other = a + panel.half;
  const int64_t ld = panel.ld, step = panel.step;
  b += first * kStep;
  for (int64_t i = 0; i < steps; ++i, a += step, other += step, b += kStep) {
    tile_stream<6>(b);
    tile_load<4>(a, ld);
    tile_multiply<0, 4, 6>();
    tile_stream<7>(b + kHalf);
    tile_multiply<1, 4, 7>();
    tile_load<5>(other, ld);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
}

// A square of sums on its way into the result.
struct Square {
  const float* sums;  // [2, 2, 16, 16]
  const bf16* bias;   // of its columns, or null
  bf16* to;
  int64_t ld, rows, columns;

  TLF_INLINE void write(int half) const {
    const __mmask32 mask = columns >= kSide ? ~0u : (1u << columns) - 1;
    Vec low = splat(0.0f), high = low;
    if (bias != nullptr) {
      const __m512i line = _mm512_maskz_loadu_epi16(mask, bias);
      low = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(line)), 16);
      high = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(line, 1)), 16);
    }
    const int64_t stop = least(16, rows - half * 16);
    const float* line = sums + half * 512;
    bf16* out = to + half * 16 * ld;
    for (int64_t i = 0; i < stop; ++i, line += 16, out += ld) {
      _mm512_mask_storeu_epi16(out, mask, narrow_rows(load(line) + low, load(line + 256) + high));
    }
  }
};

struct Task {
  const Plan& plan;
  Matrix left, right;
  const bf16* bias;
  bf16 *out, *packed,
      *panel;               // packed: [columns / 32][near / 32][kStep] of the right factor; panel: [near / 32][kStep]
  float* sums;              // [rows / 32][columns / 32][kSquare]
  int64_t column, columns;  // of the block

  // The rows as they lie, if tiles can be loaded from there.
  Panel panel_of(int64_t row, int64_t at, int64_t deep) const {
    const int64_t n = least(kSide, plan.rows - row);
    if (!left.turned && n == kSide && deep % kDeep == 0 && left.ld * 2 % 1024 != 0) {
      return {left.data + row * left.ld + at, left.ld * 2, 16 * left.ld, kDeep};
    }
    pack_left(left, row, at, n, deep, panel);
    return {panel, 64, kHalf, kStep};
  }

  // 32 rows times what is laid out of the block.
  void multiply(int64_t row, int64_t at, int64_t deep, float* total) const {
    alignas(64) float squares[2][kSquare];
    const int64_t all = ceil_div(deep, kDeep), panels = ceil_div(columns, kSide);
    const int64_t piece = plan.piece / kDeep, group = all > piece ? kGroup : panels;
    const Panel a = panel_of(row, at, deep);
    Square square{nullptr, nullptr, nullptr, plan.columns, least(kSide, plan.rows - row), 0};
    for (int64_t from = 0; from < panels; from += group) {
      const int64_t to = least(panels, from + group);
      for (int64_t first = 0; first < all; first += piece) {
        const int64_t steps = least(piece, all - first), third = steps / 3;
        const bool opens = at + first == 0, ends = at + deep == plan.depth && first + steps == all;
        for (int64_t p = from; p <= to; ++p) {
          const bf16* b = packed + p * all * kStep;
          const bool more = p < to, finish = ends && p > from;
          float* sofar = total + p * kSquare;
          if (more) {
            if (opens) {
              tile_clear<0>(), tile_clear<1>(), tile_clear<2>(), tile_clear<3>();
            } else {
              tile_load<0>(sofar, 64), tile_load<1>(sofar + 256, 64);
              tile_load<2>(sofar + 512, 64), tile_load<3>(sofar + 768, 64);
            }
            multiply_steps(third, a, first, b);
          }
          if (finish) square.write(0);
          if (more) multiply_steps(third, a, first + third, b);
          if (finish) square.write(1);
          if (!more) break;
          multiply_steps(steps - 2 * third, a, first + 2 * third, b);
          if (ends) sofar = squares[p % 2];
          tile_store<0>(sofar, 64), tile_store<1>(sofar + 256, 64);
          tile_store<2>(sofar + 512, 64), tile_store<3>(sofar + 768, 64);
          const int64_t place = column + p * kSide;
          square.sums = sofar, square.bias = bias == nullptr ? nullptr : bias + place;
          square.to = out + row * plan.columns + place, square.columns = least(kSide, column + columns - place);
        }
      }
    }
  }

  void run(int64_t first, bool anew) const {
    const int64_t last = least(first + plan.chunk, plan.rows), panels = ceil_div(columns, kSide);
    for (int64_t at = 0; at < plan.depth; at += plan.near) {
      const int64_t deep = least(plan.near, plan.depth - at), steps = ceil_div(deep, kDeep);
      for (int64_t p = 0; anew && p < panels; ++p) {
        const int64_t place = column + p * kSide;
        pack_right(right, place, at, least(kSide, plan.columns - place), deep, packed + p * steps * kStep);
      }
      for (int64_t row = first; row < last; row += kSide) {
        const int64_t kept = plan.near < plan.depth ? (row - first) / kSide * panels * kSquare : 0;
        multiply(row, at, deep, sums + kept);
      }
    }
  }
};

}  // namespace

// Bytes of scratch that gemm_tiles needs, or 0 where the ISA has no such kernel.
int64_t gemm_scratch(int64_t rows, int64_t columns, int64_t depth, int64_t left_turned, int64_t threads) {
  return threads * Plan(rows, columns, depth, left_turned != 0, threads).size + kAlign;
}

// out [rows, columns] = left [rows, depth] right [depth, columns] + bias [columns] or null. ld: elements from row to
// row of what lies in memory, which is the transpose of a factor that is turned.
void gemm_tiles(const void* left, int64_t ldl, int64_t left_turned, const void* right, int64_t ldr,
                int64_t right_turned, const void* bias, void* out, void* scratch, int64_t rows, int64_t columns,
                int64_t depth, int64_t threads) {
  const Plan plan(rows, columns, depth, left_turned != 0, threads);
  char* memory = static_cast<char*>(scratch);
  memory += round_up(reinterpret_cast<int64_t>(memory), kAlign) - reinterpret_cast<int64_t>(memory);
  const Matrix a{static_cast<const bf16*>(left), ldl, left_turned != 0};
  const Matrix b{static_cast<const bf16*>(right), ldr, right_turned != 0};
#pragma omp parallel num_threads(threads)
  {
    const TileScope scope;
    char* mine = memory + omp_get_thread_num() * plan.size;
    int64_t held = -1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.blocks * plan.chunks; ++i) {
      const int64_t block = i / plan.chunks, column = block * plan.width;
      Task{plan,
           a,
           b,
           static_cast<const bf16*>(bias),
           static_cast<bf16*>(out),
           reinterpret_cast<bf16*>(mine),
           reinterpret_cast<bf16*>(mine + plan.panel),
           reinterpret_cast<float*>(mine + plan.sums),
           column,
           least(plan.width, columns - column)}
          .run(i % plan.chunks * plan.chunk, block != held || plan.near < depth);
      held = block;
    }
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
#else
namespace tlf {
namespace TLF_ISA {

int64_t gemm_scratch(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }
void gemm_tiles(const void*, int64_t, int64_t, const void*, int64_t, int64_t, const void*, void*, void*, int64_t,
                int64_t, int64_t, int64_t) {}

}  // namespace TLF_ISA
}  // namespace tlf
#endif

TLF_KERNEL(gemm_scratch);
TLF_KERNEL(gemm_tiles);
