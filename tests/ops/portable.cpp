// `make arm64`: the portable kernels, built for another processor, against plain loops.
//
// Linked with csrc/ops/*.cpp alone, so that neither Python nor torch of that processor is needed. Exit code 1 names
// each kernel that is wrong.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "tlf/kernel.h"

namespace tlf {
void register_kernel(const char*, Isa, RawFunction) {}
namespace baseline {
void row_argmax(const void*, int64_t, int64_t*, int64_t, int64_t, int64_t);
void rms_norm(const void*, const void*, double, void*, int64_t, int64_t, int64_t);
void silu_gate(const void*, void*, int64_t, int64_t, int64_t);
void decode_linear(const void*, int64_t, const void*, const float*, const void*, float*, void*, int64_t, int64_t,
                   int64_t, int64_t);
void packed_attention_fwd(const void*, const void*, const void*, void*, float*, const int32_t*, const int32_t*,
                          const int32_t*, const int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, int64_t, double, int64_t);
}  // namespace baseline
}  // namespace tlf

namespace {

int wrong = 0;

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Numbers of a kernel's dtype, and what they are worth
struct Numbers {
  std::vector<float> wide;
  std::vector<uint16_t> narrow_;
  bool half;

  Numbers(int64_t count, int64_t dtype, uint32_t seed = 0) : wide(count), half(dtype == tlf::kBFloat16) {
    for (float& value : wide) {
      seed = seed * 1664525u + 1013904223u;
      value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
      if (half) value = widen(narrow(value));
    }
    for (float value : wide) narrow_.push_back(narrow(value));
  }
  void* data() { return half ? static_cast<void*>(narrow_.data()) : wide.data(); }
  float at(int64_t i) const { return half ? widen(narrow_[i]) : wide[i]; }
};

void expect(const char* name, int64_t dtype, const Numbers& got, const std::vector<double>& exact) {
  double worst = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double gap = std::fabs(got.at(static_cast<int64_t>(i)) - exact[i]) / std::fmax(1.0, std::fabs(exact[i]));
    worst = gap <= worst ? worst : gap;  // a NaN counts
  }
  const bool right = worst <= (dtype == tlf::kBFloat16 ? 8e-3 : 1e-4);
  std::printf("%-22s %-8s error %.2g%s\n", name, dtype == tlf::kBFloat16 ? "bfloat16" : "float32", worst,
              right ? "" : "  WRONG");
  wrong += !right;
}

void check(int64_t dtype) {
  const int64_t rows = 5, columns = 197, outputs = 67;
  Numbers x(rows * columns, dtype, 1), weight(outputs * columns, dtype, 2), scale(columns, dtype, 3);

  std::vector<int64_t> places(rows);
  tlf::baseline::row_argmax(x.data(), columns, places.data(), rows, columns, dtype);
  Numbers found(rows, tlf::kFloat32);
  std::vector<double> exact(rows);
  for (int64_t n = 0; n < rows; ++n) {
    int64_t best = 0;
    for (int64_t k = 1; k < columns; ++k) best = x.at(n * columns + k) > x.at(n * columns + best) ? k : best;
    found.wide[n] = static_cast<float>(places[n]), exact[n] = static_cast<double>(best);
  }
  expect("row_argmax", dtype, found, exact);

  Numbers y(rows * columns, dtype);
  tlf::baseline::rms_norm(x.data(), scale.data(), 1e-5, y.data(), rows, columns, dtype);
  exact.assign(rows * columns, 0);
  for (int64_t n = 0; n < rows; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < columns; ++k) sum += double(x.at(n * columns + k)) * x.at(n * columns + k);
    for (int64_t k = 0; k < columns; ++k)
      exact[n * columns + k] = x.at(n * columns + k) / std::sqrt(sum / columns + 1e-5) * scale.at(k);
  }
  expect("rms_norm", dtype, y, exact);

  const int64_t width = 98;
  Numbers pair(rows * 2 * width, dtype, 4), gated(rows * width, dtype);
  tlf::baseline::silu_gate(pair.data(), gated.data(), rows, width, dtype);
  exact.assign(rows * width, 0);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t k = 0; k < width; ++k) {
      const double gate = pair.at(n * 2 * width + k);
      exact[n * width + k] = gate / (1 + std::exp(-gate)) * pair.at((2 * n + 1) * width + k);
    }
  expect("silu_gate", dtype, gated, exact);

  std::vector<float> scratch(1 << 20);
  Numbers out(rows * outputs, dtype);
  tlf::baseline::decode_linear(x.data(), columns, weight.data(), nullptr, nullptr, scratch.data(), out.data(), rows,
                               outputs, columns, dtype);
  exact.assign(rows * outputs, 0);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t k = 0; k < columns; ++k)
        exact[n * outputs + o] += double(x.at(n * columns + k)) * weight.at(o * columns + k);
  expect("decode_linear", dtype, out, exact);

  // two segments, causal, two query heads to a key head
  const int64_t tokens = 37, heads = 4, kv_heads = 2, size = 32;
  const int32_t borders[] = {0, 11, static_cast<int32_t>(tokens)};
  Numbers q(tokens * heads * size, dtype, 5), k(tokens * kv_heads * size, dtype, 6),
      v(tokens * kv_heads * size, dtype, 7);
  Numbers attended(tokens * heads * size, dtype);
  std::vector<float> lse(tokens * heads);
  const double factor = 1 / std::sqrt(double(size));
  tlf::baseline::packed_attention_fwd(q.data(), k.data(), v.data(), attended.data(), lse.data(), borders, borders,
                                      nullptr, nullptr, 2, tokens, heads, kv_heads, size, heads * size, size,
                                      kv_heads * size, size, kv_heads * size, size, dtype, 1, factor, 0, 0.0, 1);
  exact.assign(tokens * heads * size, 0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      double total = 0;
      const int64_t from = t < borders[1] ? 0 : borders[1], head = h / (heads / kv_heads);
      for (int64_t s = from; s <= t; ++s) {
        double score = 0;
        for (int64_t d = 0; d < size; ++d)
          score += double(q.at((t * heads + h) * size + d)) * k.at((s * kv_heads + head) * size + d);
        const double share = std::exp(factor * score);
        total += share;
        for (int64_t d = 0; d < size; ++d)
          exact[(t * heads + h) * size + d] += share * v.at((s * kv_heads + head) * size + d);
      }
      for (int64_t d = 0; d < size; ++d) exact[(t * heads + h) * size + d] /= total;
    }
  expect("packed_attention_fwd", dtype, attended, exact);
}

}  // namespace

int main() {
  check(tlf::kFloat32);
  check(tlf::kBFloat16);
  return wrong != 0;
}
