// Turns `void f(const float* x, int64_t n)` into a Python function of (int, int).
// Included by the baseline pass only.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "tlf/kernel.h"

namespace tlf {

using Binder = void (*)(pybind11::module_& module, const char* name);
void register_binding(const char* name, Binder binder);

struct BindingRegistrar {
  BindingRegistrar(const char* name, Binder binder) { register_binding(name, binder); }
};

template <typename T>
using PythonArgument = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <typename T>
T from_python(PythonArgument<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <typename F>
struct Bound;

template <typename R, typename... Args>
struct Bound<R(Args...)> {
  static void define(pybind11::module_& module, const char* name) {
    auto* fn = reinterpret_cast<R (*)(Args...)>(best_kernel(name));
    module.def(
        name, [fn](PythonArgument<Args>... args) { return fn(from_python<Args>(args)...); },
        pybind11::call_guard<pybind11::gil_scoped_release>());
  }
};

template <typename F>
void bind_kernel(pybind11::module_& module, const char* name) {
  Bound<F>::define(module, name);
}

}  // namespace tlf
