// pack_plan: best-fit packing inside a look-ahead window; the algorithm of ops/pack.py, sample for sample.
#include <cstdint>
#include <cstring>

#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {
namespace {

struct Samples {
  const int64_t* lengths;
  const int64_t* images;
  const int64_t* segments;

  // window order: longest first, the earliest of equals first
  bool before(int64_t a, int64_t b) const { return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b; }
};

// the first place in window[0..count) that is not before `sample`
int64_t place(const Samples& samples, const int64_t* window, int64_t count, int64_t sample) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (samples.before(window[middle], sample)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// the first place whose sample is not longer than `room`
int64_t first_not_longer(const Samples& samples, const int64_t* window, int64_t count, int64_t room) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (samples.lengths[window[middle]] > room) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace

// window: scratch [lookahead]. plan: [n], filled here. The caller has checked that every sample fits an empty pack.
void pack_plan(const int64_t* lengths, const int64_t* images, const int64_t* segments, int64_t* window, int64_t* plan,
               int64_t n, int64_t budget, int64_t max_images, int64_t max_segments, int64_t lookahead) {
  const Samples samples{lengths, images, segments};
  for (int64_t i = 0; i < n; ++i) plan[i] = -1;
  int64_t count = 0;
  int64_t arrived = 0;
  int64_t oldest = 0;
  for (int64_t pack = 0; oldest < n; ++pack) {
    int64_t tokens_left = budget;
    int64_t images_left = max_images;
    int64_t segments_left = max_segments;
    bool empty = true;
    while (oldest < n) {
      for (; arrived < n && count < lookahead; ++arrived) {
        const int64_t at = place(samples, window, count, arrived);
        std::memmove(window + at + 1, window + at, (count - at) * sizeof(int64_t));
        window[at] = arrived;
        ++count;
      }
      int64_t at;
      if (empty) {
        at = place(samples, window, count, oldest);
      } else {
        at = first_not_longer(samples, window, count, tokens_left);
        while (at < count && (images[window[at]] > images_left || segments[window[at]] > segments_left)) ++at;
        if (at == count) break;
      }
      const int64_t sample = window[at];
      std::memmove(window + at, window + at + 1, (count - at - 1) * sizeof(int64_t));
      --count;
      plan[sample] = pack;
      empty = false;
      tokens_left -= lengths[sample];
      images_left -= images[sample];
      segments_left -= segments[sample];
      while (oldest < n && plan[oldest] >= 0) ++oldest;
    }
  }
}

}  // namespace TLF_ISA
}  // namespace tlf

TLF_KERNEL(pack_plan);
