// decode_step: one new token of each sequence through all layers of a Llama-style decoder, in one parallel region.
//
// The model is a table of int64: pointers and sizes, in the order of the structures here, which
// infer/fast_model/cpp_step.py writes. Roundings lie where the layers of infer/fast_model/decoder_layer.py have them.
#include <cstdint>

#include "tlf/decode.h"
#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

constexpr int64_t kPiece = 256;  // columns of the gate that are one task

struct Linear {
  int64_t values, scales, bias, blocksize, outputs, columns;  // blocksize > 0: nf4; else scales: int8; else dense
};

struct Layer {
  int64_t input_norm, post_norm, q_norm, k_norm, k, v, window;  // q_norm, k_norm: pointers or 0
  Linear qkv, o, gate_up, down;
};

struct Model {
  int64_t layers, hidden, heads, kv_heads, size, inner, rows;  // rows: of the pool
  int64_t embedding, embedding_scale, vocab, norm, cosine, sine, positions;
};

struct Token {
  int64_t id, start, length, shared, prefix;
};

template <typename T>
TLF_INLINE T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// What the team works in; [rows, width] each.
template <typename T>
struct Buffers {
  T *x, *normed, *qkv, *q, *attended, *delta, *inner, *gated;
  Sight* sights;
  float* linear;
};

template <typename T>
void multiply(const Linear& w, const T* x, T* y, float* scratch, int64_t rows) {
  constexpr int64_t dtype = sizeof(T) == 2 ? kBFloat16 : kFloat32;
  const auto* scales = pointer<const float>(w.scales);
  const auto* bias = pointer<const void>(w.bias);
  if (w.blocksize > 0) {
    nf4_of_team(x, w.columns, pointer<const uint8_t>(w.values), scales, w.blocksize, bias, scratch, y, rows, w.outputs,
                w.columns, dtype);
  } else {
    linear_of_team(x, w.columns, pointer<const void>(w.values), scales, bias, scratch, y, rows, w.outputs, w.columns,
                   dtype);
  }
}

// x += delta where there is one, then its norm
template <typename T>
void add_and_norm(T* x, const T* delta, int64_t weight, float eps, T* normed, int64_t rows, int64_t columns) {
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    T* row = x + n * columns;
    if (delta != nullptr) {
      for (int64_t i = 0; i < columns; ++i) narrow(widen(row[i]) + widen(delta[n * columns + i]), row + i);
    }
    norm_row(row, pointer<const T>(weight), eps, normed + n * columns, columns);
  }
}

template <typename T>
void look_up(const Model& m, const Token* tokens, const Buffers<T>& b, int64_t rows) {
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const Token& t = tokens[n];
    b.sights[n] = {t.start, t.length + 1, t.shared, t.prefix};
    T* to = b.x + n * m.hidden;
    if (m.embedding_scale == 0) {
      std::memcpy(to, pointer<const T>(m.embedding) + t.id * m.hidden, m.hidden * sizeof(T));
      continue;
    }
    const int8_t* from = pointer<const int8_t>(m.embedding) + t.id * m.hidden;
    const float scale = pointer<const float>(m.embedding_scale)[t.id];
    for (int64_t i = 0; i < m.hidden; ++i) narrow(static_cast<float>(from[i]) * scale, to + i);
  }
}

// Rotated queries to b.q; rotated keys, and values, to the pool.
template <typename T>
void place_heads(const Model& m, const Layer& layer, const Token* tokens, const Buffers<T>& b, float eps,
                 int64_t rows) {
  const int64_t every = m.heads + 2 * m.kv_heads;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < rows * every; ++task) {
    const int64_t n = task / every, h = task % every;
    const Token& t = tokens[n];
    T* from = b.qkv + task * m.size;
    const int64_t row = (t.start + t.length) * m.kv_heads;
    const int64_t key = h - m.heads, value = key - m.kv_heads;
    if (value >= 0) {
      std::memcpy(pointer<T>(layer.v) + (row + value) * m.size, from, m.size * sizeof(T));
      continue;
    }
    const int64_t norm = key < 0 ? layer.q_norm : layer.k_norm;
    if (norm != 0) norm_row(from, pointer<const T>(norm), eps, from, m.size);
    T* to = key < 0 ? b.q + (n * m.heads + h) * m.size : pointer<T>(layer.k) + (row + key) * m.size;
    const int64_t angle = (t.length + t.prefix) * m.size;
    rotate_head(from, pointer<const T>(m.cosine) + angle, pointer<const T>(m.sine) + angle, to, m.size);
  }
}

template <typename T>
void gate(const T* x, T* y, int64_t rows, int64_t width) {
  const int64_t pieces = ceil_div(width, kPiece);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < rows * pieces; ++task) {
    const int64_t n = task / pieces, at = task % pieces * kPiece;
    const T* from = x + 2 * n * width + at;
    gate_part(from, from + width, y + n * width + at, least(kPiece, width - at));
  }
}

template <typename T>
void run(const Model& m, const Layer* layers, const Token* tokens, T* out, int64_t rows, float eps, float scale) {
  static thread_local Scratch scratch;
  Buffers<T> b;
  const int64_t every = (m.heads + 2 * m.kv_heads) * m.size, width = m.heads * m.size;
  const int64_t deepest = most(most(m.hidden, width), m.inner);
  scratch.lay_out([&](Scratch& s) {
    b = {s.take<T>(rows * m.hidden),    s.take<T>(rows * m.hidden),
         s.take<T>(rows * every),       s.take<T>(rows * width),
         s.take<T>(rows * width),       s.take<T>(rows * m.hidden),
         s.take<T>(rows * 2 * m.inner), s.take<T>(rows * m.inner),
         s.take<Sight>(rows),           s.take<float>(16 * (deepest + 128))};
  });
  constexpr int64_t dtype = sizeof(T) == 2 ? kBFloat16 : kFloat32;
  const int64_t row = m.kv_heads * m.size;
  const AttentionShape shape{m.heads, m.kv_heads, m.size, row, m.size, row, m.size, scale, 0.0f};
#pragma omp parallel
  {
    look_up(m, tokens, b, rows);
    const T* delta = nullptr;
    for (int64_t l = 0; l < m.layers; ++l) {
      const Layer& layer = layers[l];
      add_and_norm(b.x, delta, layer.input_norm, eps, b.normed, rows, m.hidden);
      multiply(layer.qkv, b.normed, b.qkv, b.linear, rows);
      place_heads(m, layer, tokens, b, eps, rows);
      attention_of_team(b.q, pointer<const T>(layer.k), pointer<const T>(layer.v), b.attended, b.sights, rows,
                        layer.window, shape, dtype);
      multiply(layer.o, b.attended, b.delta, b.linear, rows);
      add_and_norm(b.x, b.delta, layer.post_norm, eps, b.normed, rows, m.hidden);
      multiply(layer.gate_up, b.normed, b.inner, b.linear, rows);
      gate(b.inner, b.gated, rows, m.inner);
      multiply(layer.down, b.gated, b.delta, b.linear, rows);
      delta = b.delta;
    }
    add_and_norm(b.x, delta, m.norm, eps, out, rows, m.hidden);
  }
}

bool fits(const Model& m, const Token& t) {
  return t.id >= 0 && t.id < m.vocab && t.start >= 0 && t.length >= 0 && t.start + t.length < m.rows && t.shared >= 0 &&
         t.prefix >= 0 && t.shared + t.prefix <= m.rows && t.length + t.prefix < m.positions;
}

}  // namespace

// model, layers, tokens [rows]: Model, Layer[], Token[] as int64. out: [rows, hidden]. Returns -1, or the first token
// outside the vocabulary, the pool or the table of angles: then nothing is computed.
int64_t decode_step(const int64_t* model, const int64_t* layers, const int64_t* tokens, void* out, int64_t rows,
                    double eps, double scale, int64_t dtype) {
  const Model& m = *reinterpret_cast<const Model*>(model);
  const auto* each = reinterpret_cast<const Token*>(tokens);
  const auto* table = reinterpret_cast<const Layer*>(layers);
  for (int64_t n = 0; n < rows; ++n) {
    if (!fits(m, each[n])) return n;
  }
  const auto small = static_cast<float>(eps), factor = static_cast<float>(scale);
  if (dtype == kBFloat16) {
    run(m, table, each, static_cast<bf16*>(out), rows, small, factor);
  } else {
    run(m, table, each, static_cast<float*>(out), rows, small, factor);
  }
  return -1;
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(decode_step);
