// Kernel table and ISA choice. Built with no ISA flags, so that it runs anywhere.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "tlf/bind.h"
#include "tlf/kernel.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tlf {
namespace {

struct Kernel {
  const char* name;
  RawFunction by_isa[kIsaCount];
};

struct Binding {
  const char* name;
  Binder binder;
};

// Function-local statics: registrars of other files run before this file's own globals would exist.
std::vector<Kernel>& kernels() {
  static std::vector<Kernel> table;
  return table;
}

std::vector<Binding>& bindings() {
  static std::vector<Binding> table;
  return table;
}

constexpr Isa kHighest = Isa::TLF_HIGHEST_ISA;  // the last that this build's compiler knew
const char* const kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__) && defined(__linux__)
// Tile registers are 8 KiB of state, which Linux saves only for a process that has asked for it.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // cpuid leaf 7, edx: amx-bf16, amx-tile, amx-int8
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kNeeded) != kNeeded) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return true;
  std::fprintf(stderr, "tinyllava_fast: Linux refuses AMX tiles to this process (%s); its kernels run as avx512bf16\n",
               std::strerror(errno));
  return false;
}
#elif defined(__x86_64__)
bool may_use_tiles() { return false; }
#endif

Isa probe([[maybe_unused]] Isa limit) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the OS whether it saves the wide registers; a bare cpuid does not.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    return limit == Isa::amx && may_use_tiles() ? Isa::amx : Isa::avx512bf16;
  }
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa least_of(Isa a, Isa b) { return static_cast<int>(a) < static_cast<int>(b) ? a : b; }

Isa choose() {
  const char* wanted = std::getenv("TLF_ISA");
  if (wanted == nullptr || *wanted == '\0') return least_of(probe(kHighest), kHighest);
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    if (i > static_cast<int>(kHighest)) {
      throw std::invalid_argument(std::string("TLF_ISA=") + wanted + ": this package was built without it, up to " +
                                  kIsaNames[static_cast<int>(kHighest)] + ", by a compiler that does not know it");
    }
    const Isa best = probe(static_cast<Isa>(i));  // asks for no permission that a lower one does without
    if (i > static_cast<int>(best)) {
      throw std::invalid_argument(std::string("TLF_ISA=") + wanted + ": this CPU supports up to " +
                                  kIsaNames[static_cast<int>(best)]);
    }
    return static_cast<Isa>(i);
  }
  throw std::invalid_argument(std::string("TLF_ISA=") + wanted + ": known are baseline, avx2, avx512, avx512bf16, amx");
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

void register_kernel(const char* name, Isa isa, RawFunction fn) {
  for (Kernel& kernel : kernels()) {
    if (std::strcmp(kernel.name, name) == 0) {
      kernel.by_isa[static_cast<int>(isa)] = fn;
      return;
    }
  }
  Kernel kernel{name, {}};
  kernel.by_isa[static_cast<int>(isa)] = fn;
  kernels().push_back(kernel);
}

RawFunction best_kernel(const char* name) {
  for (const Kernel& kernel : kernels()) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    for (int i = static_cast<int>(active_isa()); i >= 0; --i) {
      if (kernel.by_isa[i] != nullptr) return kernel.by_isa[i];
    }
  }
  throw std::logic_error(std::string("no kernel registered as ") + name);
}

void register_binding(const char* name, Binder binder) { bindings().push_back({name, binder}); }

void bind_all(pybind11::module_& module) {
  for (const Binding& binding : bindings()) binding.binder(module, binding.name);
}

}  // namespace tlf
