// Numbers below 1.2e-38 count as zero while the object lives, in the thread that made it: each operation that meets one
// costs x86 a hundred cycles or more.
#pragma once

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "tlf/kernel.h"

namespace tlf {
namespace TLF_ISA {

class DenormalsAreZero {
#ifdef __SSE2__
 public:
  DenormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results and operands
  ~DenormalsAreZero() { _mm_setcsr(before_); }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  unsigned before_;
#else
 public:
  DenormalsAreZero() {}
  ~DenormalsAreZero() {}
#endif
};

}  // namespace TLF_ISA
}  // namespace tlf
