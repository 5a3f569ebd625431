// weight_gradient: gradᵀ x of bfloat16 matrices in AMX tiles; the other ISAs have nothing that beats torch.
//
// Both factors are turned or interleaved while they are packed: x once for all threads, in blocks that stay in a
// second-level cache, gradᵀ a panel of 32 outputs at a time as it is met. Sums are float32 and pass through memory
// every kDepth rows; their order does not depend on the number of threads.
#include <cstdint>

#include "tlf/kernel.h"

#if defined(TLF_ISA_IS_amx)
#include <omp.h>

#include "tlf/amx.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kSide = 32;  // outputs of a panel of gradᵀ, inputs of one of x: two tiles
constexpr int64_t kRows = kTilePairs;
constexpr int64_t kStep = kSide * kRows;  // elements of a panel for a step of kRows rows
constexpr int64_t kHalf = kStep / 2;
constexpr int64_t kSquare = kSide * kSide;
constexpr int64_t kDepth = 576;
constexpr int64_t kNear = 9;         // steps at a time: so much of a panel stays in a first-level cache
constexpr int64_t kBlock = 3 << 17;  // elements of packed x
constexpr int64_t kAlign = 4096;     // bytes

struct Matrix {
  const bf16* data;
  int64_t ld, rows, columns;
};

// How a problem is cut, and where its parts lie in the scratch memory (bytes).
struct Plan {
  int64_t depth, block, panels, sums, size;

  Plan(int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
    depth = even_piece(rows, kDepth, kRows);
    block = even_piece(inputs, most(kBlock / depth / kSide * kSide, kSide), kSide);
    panels = round_up(depth * block * 2, kAlign);
    sums = panels + threads * panel();
    const int64_t lines = most(ceil_div(outputs, kSide), threads);
    size = sums + lines * (block / kSide) * kSquare * 4 + kAlign;
  }
  int64_t panel() const { return round_up(depth * kSide * 2, kAlign); }
};

TLF_INLINE __m512i load_some(const bf16* from, int64_t n) {
  return n >= kSide ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << n) - 1, from);
}

// 32 rows x 32 columns from (row, column) on as 16 pairs of rows, zero outside the matrix. low[p]: columns 0 .. 3,
// 8 .. 11, 16 .. 19, 24 .. 27 of rows 2 p and 2 p + 1, interleaved; high[p]: the others.
TLF_INLINE void read_pairs(const Matrix& m, int64_t row, int64_t column, __m512i* low, __m512i* high) {
  const int64_t n = m.rows - row, width = m.columns - column;
  const bf16* from = m.data + row * m.ld + column;
#pragma GCC unroll 4
  for (int p = 0; p < 16; ++p) {
    const __m512i a = 2 * p < n ? load_some(from + 2 * p * m.ld, width) : _mm512_setzero_si512();
    const __m512i b = 2 * p + 1 < n ? load_some(from + (2 * p + 1) * m.ld, width) : _mm512_setzero_si512();
    low[p] = _mm512_unpacklo_epi16(a, b);
    high[p] = _mm512_unpackhi_epi16(a, b);
  }
}

// Columns first .. first + 31 of gradᵀ's rows as left tiles, a line of a tile being one column of grad.
void pack_outputs(const Matrix& grad, int64_t row, int64_t first, int64_t steps, bf16* to) {
  alignas(64) __m512i low[16], high[16];
  alignas(64) uint32_t turned[16 * 16];
  for (int64_t i = 0; i < steps; ++i, row += kRows, to += kStep) {
    read_pairs(grad, row, first, low, high);
    for (int half = 0; half < 2; ++half) {
      transpose_block(reinterpret_cast<const uint32_t*>(half ? high : low), 16, 16, 16, turned, 16);
      for (int c = 0; c < 16; ++c) {
        const int column = c / 4 * 8 + half * 4 + c % 4;
        _mm512_store_si512(to + column * kRows, _mm512_load_si512(turned + c * 16));
      }
    }
  }
}

// Columns first .. first + 31 of x as right tiles.
void pack_inputs(const Matrix& x, int64_t row, int64_t first, int64_t steps, bf16* to) {
  const __m512i left = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i right = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  __m512i low[16], high[16];
  for (int64_t i = 0; i < steps; ++i, row += kRows, to += kStep) {
    read_pairs(x, row, first, low, high);
    for (int p = 0; p < 16; ++p) {
      _mm512_store_si512(to + p * 32, _mm512_permutex2var_epi64(low[p], left, high[p]));
      _mm512_store_si512(to + kHalf + p * 32, _mm512_permutex2var_epi64(low[p], right, high[p]));
    }
  }
}

// Lines of the next panel of grad, fetched a few at a time while this one is multiplied.
struct Ahead {
  const char* line;
  int64_t stride, left, each;
  TLF_INLINE void some() {
    for (int64_t i = least(each, left); i > 0; --i, --left, line += stride) __builtin_prefetch(line, 0, 2);
  }
};

// out [2, 2, 16, 16] = (Add: sums +) the product of two panels
template <bool Add>
TLF_INLINE void multiply(int64_t steps, const bf16* a, const bf16* b, const float* sums, float* out, Ahead& ahead) {
  if constexpr (Add) {
    tile_load<0>(sums, 64);
    tile_load<1>(sums + 256, 64);
    tile_load<2>(sums + 512, 64);
    tile_load<3>(sums + 768, 64);
  } else {
    tile_clear<0>();
    tile_clear<1>();
    tile_clear<2>();
    tile_clear<3>();
  }
  for (int64_t i = 0; i < steps; ++i, a += kStep, b += kStep) {
    tile_load<4>(a, 64);
    tile_load<6>(b, 64);
    tile_multiply<0, 4, 6>();
    tile_load<7>(b + kHalf, 64);
    tile_multiply<1, 4, 7>();
    tile_load<5>(a + kHalf, 64);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
    ahead.some();
  }
  tile_store<0>(out, 64);
  tile_store<1>(out + 256, 64);
  tile_store<2>(out + 512, 64);
  tile_store<3>(out + 768, 64);
}

// target [outputs <= 32, inputs <= 32] = a square of sums, rounded
TLF_INLINE void write_square(const float* square, bf16* target, int64_t ld, int64_t outputs, int64_t inputs) {
  const __mmask32 mask = inputs >= kSide ? ~0u : (1u << inputs) - 1;
  for (int64_t i = 0; i < outputs; ++i) {
    const float* line = square + i / 16 * 512 + i % 16 * 16;
    _mm512_mask_storeu_epi16(target + i * ld, mask, narrow_rows(load(line), load(line + 256)));
  }
}

struct Task {
  Matrix grad, x;
  bf16* out;
  const bf16* packed;  // of x: [inputs / 32][steps][kStep]
  bf16* panel;         // of grad: [steps][kStep]
  float* sums;         // [inputs / 32][kSquare]
  int64_t row, steps;  // of the sum
  int64_t input, inputs;
  bool opens, ends;  // whether the first rows are among them, and the last
};

// One panel of 32 outputs times a block of x.
void multiply_panel(const Task& t, int64_t output) {
  alignas(64) float square[kSquare];
  const int64_t panels = ceil_div(t.inputs, kSide), near = even_piece(t.steps, kNear, 1);
  pack_outputs(t.grad, t.row, output, t.steps, t.panel);
  const bool next = output + kSide < t.grad.columns;
  const bf16* then = t.grad.data + t.row * t.grad.ld + output + kSide;
  Ahead ahead{reinterpret_cast<const char*>(then), t.grad.ld * 2,
              next ? least(t.steps * kRows, t.grad.rows - t.row) : 0, ceil_div(kSide, panels)};
  for (int64_t at = 0; at < t.steps; at += near) {
    const int64_t steps = least(near, t.steps - at);
    const bool clear = t.opens && at == 0, done = t.ends && at + steps == t.steps;
    for (int64_t p = 0; p < panels; ++p) {
      float* sums = t.sums + p * kSquare;
      const bf16* right = t.packed + (p * t.steps + at) * kStep;
      float* to = done ? square : sums;
      clear ? multiply<false>(steps, t.panel + at * kStep, right, sums, to, ahead)
            : multiply<true>(steps, t.panel + at * kStep, right, sums, to, ahead);
      if (!done) continue;
      const int64_t input = t.input + p * kSide;
      write_square(square, t.out + output * t.x.columns + input, t.x.columns, least(kSide, t.grad.columns - output),
                   least(kSide, t.x.columns - input));
    }
  }
}

}  // namespace

// Bytes of scratch that weight_gradient_tiles needs, or 0 where the ISA has no such kernel.
int64_t weight_gradient_scratch(int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
  return Plan(rows, outputs, inputs, threads).size;
}

// out [outputs, inputs] = gradᵀ x. grad [rows, outputs], x [rows, inputs]; ld: elements from row to row.
void weight_gradient_tiles(const void* grad, int64_t ldg, const void* x, int64_t ldx, void* out, void* scratch,
                           int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
  const Plan plan(rows, outputs, inputs, threads);
  char* memory = static_cast<char*>(scratch);
  memory += round_up(reinterpret_cast<int64_t>(memory), kAlign) - reinterpret_cast<int64_t>(memory);
  bf16* packed = reinterpret_cast<bf16*>(memory);
  float* sums = reinterpret_cast<float*>(memory + plan.sums);
  const Matrix g{static_cast<const bf16*>(grad), ldg, rows, outputs}, v{static_cast<const bf16*>(x), ldx, rows, inputs};
  const int64_t panels = ceil_div(outputs, kSide), line = plan.block / kSide * kSquare;
#pragma omp parallel num_threads(threads)
  {
    const TileScope scope;
    const int64_t thread = omp_get_thread_num();
    bf16* panel = reinterpret_cast<bf16*>(memory + plan.panels + thread * plan.panel());
    for (int64_t input = 0; input < inputs; input += plan.block) {
      const int64_t width = least(plan.block, inputs - input);
      for (int64_t row = 0; row < rows; row += plan.depth) {
        const int64_t steps = ceil_div(least(plan.depth, rows - row), kRows);
        const bool opens = row == 0, ends = row + plan.depth >= rows;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < ceil_div(width, kSide); ++p) {
          pack_inputs(v, row, input + p * kSide, steps, packed + p * steps * kStep);
        }
#pragma omp for schedule(static)
        for (int64_t q = 0; q < panels; ++q) {
          float* mine = sums + (opens && ends ? thread : q) * line;
          multiply_panel({g, v, static_cast<bf16*>(out), packed, panel, mine, row, steps, input, width, opens, ends},
                         q * kSide);
        }
      }
    }
  }
}

}  // namespace TLF_ISA
}  // namespace tlf
#else
namespace tlf {
namespace TLF_ISA {

int64_t weight_gradient_scratch(int64_t, int64_t, int64_t, int64_t) { return 0; }
void weight_gradient_tiles(const void*, int64_t, const void*, int64_t, void*, void*, int64_t, int64_t, int64_t,
                           int64_t) {}

}  // namespace TLF_ISA
}  // namespace tlf
#endif

TLF_KERNEL(weight_gradient_scratch);
TLF_KERNEL(weight_gradient_tiles);
