"""The C++ extension: that it loads and fits this package, and runs on the best instructions that the CPU has."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok
from tinyllava_fast.ops import _cpp

# As CMakeLists.txt gives them to the compiler: what a CPU needs for a set beside the sets below it.
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512bf16": {"avx512_bf16", "avx512_vnni"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64 Linux: asm/unistd_64.h, asm/prctl.h


@CHECKS.register("extension")
def extension() -> Iterator[Finding]:
    """Whether it loads, and on which instructions its kernels run."""
    module, reason = _cpp.load()
    if module is None:
        yield fault(reason, "`make setup` in a checkout, else pip install --force-reinstall --no-deps . in its source")
        return
    try:
        isa = module.isa()
    except ValueError:  # of TLF_ISA, which the check of variables tells
        return
    best = best_isa(cpu_flags())
    facts = {"isa": isa, "cpu_has": best, "abi": module.ABI}
    if _cpp.ISAS.index(isa) >= _cpp.ISAS.index(best):
        yield ok(f"the C++ kernels load and run on {isa}", **facts)
    elif os.environ.get("TLF_ISA"):
        yield note(f"the C++ kernels run on {isa}, as TLF_ISA asks; this CPU has {best}", **facts)
    elif best == "amx" and (refusal := tile_refusal()):
        yield fault(
            f"this CPU has AMX, and Linux refuses its tiles to this process ({refusal}): kernels run on {isa}",
            "Linux >= 5.16 grants them; in a container allow arch_prctl in its seccomp profile, in a virtual machine "
            "pass AMX through",
            **facts,
        )
    else:
        yield fault(
            f"the C++ kernels were built up to {isa}, this CPU has {best}",
            "build them with a newer compiler (GCC >= 12): pip install --force-reinstall --no-deps . in its source",
            **facts,
        )


def cpu_flags() -> set[str]:
    """Return the CPU's features as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def best_isa(flags: set[str]) -> str:
    """Return the one of ISAS that a CPU with those features could run."""
    best = _cpp.ISAS[0]
    for isa, needs in _NEEDS.items():
        if not needs <= flags:
            break
        best = isa
    return best


def tile_refusal() -> str:
    """Ask Linux for AMX tiles, as the kernels do at their load; returns why it refuses them, "" if it does not."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "no Linux on x86-64"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return ""
    return os.strerror(ctypes.get_errno() or errno.EPERM)
