"""A C++ compiler at run time, which is no must: for the pool of CPU tensors, and for torch.compile."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok
from tinyllava_fast.train import cpu_pool

_SOURCE = """
#include <omp.h>
#include <vector>
extern "C" int tlf_doctor(int count) {
  std::vector<int> seen(static_cast<std::size_t>(count), 1);
  int sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < count; ++i) sum += seen[static_cast<std::size_t>(i)];
  return sum;
}
"""
_REMEDY = "install one (Debian: apt-get install g++), or name it with CXX"


@CHECKS.register("compiler")
def compiler() -> Iterator[Finding]:
    """Compile, load and run a few lines with OpenMP, as torch.compile would."""
    if sys.platform != "linux":
        yield note("compilers are looked for on Linux only")
        return
    command = cpu_pool.compiler()
    if shutil.which(command[0]) is None:
        yield note(
            f"no C++ compiler ({command[0]}): training keeps torch's allocator, and engine.compile and --compile fail. "
            "Nothing else needs one",
            _REMEDY,
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "doctor.cpp", Path(folder) / "doctor.so"
        source.write_text(_SOURCE, encoding="utf-8")
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(target)]
        try:
            subprocess.run([*command, *flags], check=True, capture_output=True, text=True, errors="replace", timeout=60)
            right = ctypes.CDLL(str(target)).tlf_doctor(1000) == 1000
        except (OSError, subprocess.SubprocessError) as error:
            lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
            yield fault(f"the C++ compiler {command[0]} does not work: {lines[0] if lines else error}", _REMEDY)
            return
    if right:
        yield ok(f"the C++ compiler {Path(command[0]).name} compiles what runs here, with OpenMP")
    else:
        yield fault(f"what the C++ compiler {command[0]} compiles computes wrong sums", _REMEDY)
