// The Python module tinyllava_fast._C: every kernel of csrc/ops under its own name, plus build facts.
#include <pybind11/pybind11.h>
#if defined(__clang__)
#include <omp.h>
#endif

#include "tlf/kernel.h"

namespace tlf {
void bind_all(pybind11::module_& module);
const char* isa_name(Isa isa);
}  // namespace tlf

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of tinyllava_fast; call them through tinyllava_fast.ops";
  module.def("isa", [] { return tlf::isa_name(tlf::active_isa()); }, "the instruction set in use");
  module.attr("ABI") = TLF_ABI;  // of ops/_cpp.py, as it was when this was built
#if defined(__clang__)
  // Code of clang runs on libomp, beside the libgomp of torch, and scratch is sized for torch's count of threads.
  module.def("set_threads", [](int count) { omp_set_num_threads(count); }, "threads of this thread's parallel regions");
#endif
  tlf::bind_all(module);
}
