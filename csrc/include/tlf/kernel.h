// The contract of a CPU kernel file.
//
// Every file in csrc/ops/ is compiled once per instruction set with TLF_ISA set to
// baseline, avx2, avx512, avx512bf16 or amx. It defines plain functions on raw pointers and sizes
// in namespace tlf::TLF_ISA and ends with TLF_KERNEL(name) for each of them. That line
// registers the pointer of this pass under (name, ISA) and, in the baseline pass, the Python
// binding: pointers arrive as integers (tensor.data_ptr()), the GIL is released, and the best
// ISA of this machine is called. A new op therefore edits no other file.
//
// Kernel code uses no STL: an inline template instantiated in the avx512 pass could be the one
// the linker keeps for the baseline pass, and crash on an older CPU.
#pragma once

#include <cstdint>

namespace tlf {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };
constexpr int kIsaCount = 5;

// dtype codes shared with tinyllava_fast/ops/_cpp.py
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

using RawFunction = void (*)();
void register_kernel(const char* name, Isa isa, RawFunction fn);
RawFunction best_kernel(const char* name);
Isa active_isa();

struct KernelRegistrar {
  KernelRegistrar(const char* name, Isa isa, RawFunction fn) { register_kernel(name, isa, fn); }
};

}  // namespace tlf

#define TLF_CONCAT_(a, b) a##b
#define TLF_CONCAT(a, b) TLF_CONCAT_(a, b)

#define TLF_REGISTER_(name)                                         \
  static const ::tlf::KernelRegistrar TLF_CONCAT(registrar_, name)( \
      #name, ::tlf::Isa::TLF_ISA, reinterpret_cast<::tlf::RawFunction>(&::tlf::TLF_ISA::name))

#ifdef TLF_ISA_IS_baseline
#include "tlf/bind.h"
#define TLF_KERNEL(name)                                                 \
  TLF_REGISTER_(name);                                                   \
  static const ::tlf::BindingRegistrar TLF_CONCAT(binding_, name)(#name, \
                                                                  &::tlf::bind_kernel<decltype(::tlf::TLF_ISA::name)>)
#else
#define TLF_KERNEL(name) TLF_REGISTER_(name)
#endif
