"""The machine and this process on it: what it is, memory in use, and settings that make large CPU tensors cheap.

About the settings: a training step allocates and frees the same large activations again and again. glibc maps each
of them afresh and gives it back, so every step pays a page fault per 4 KiB. Keeping freed memory in the heap and
backing it with 2 MiB pages took a step of a 20 M parameter model from 37,000-48,000 faults to about 1,000, at the same
peak memory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = 2**31 - 1  # mallopt takes an int
_OLD_LIMIT = 32 * 2**20  # the largest mmap threshold that older glibc accepts


def prepare_memory() -> bool:
    """Keep freed memory and ask for huge pages; False where the C library is not glibc.

    Call it before torch allocates: torch reads THP_MEM_ALLOC_ENABLE once. A value that the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = mallopt(M_MMAP_THRESHOLD, _NEVER) or mallopt(M_MMAP_THRESHOLD, _OLD_LIMIT)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, _NEVER))


def gemm_flops_per_s(dtype: Any, *, size: int = 2048, rounds: int = 7) -> float:
    """FLOP/s of torch's own product of two square matrices on the CPU, the median of the rounds.

    dtype: a torch.dtype.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        torch.mm(left, right.t(), out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[2:])


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: TLF_CACHE, else tinyllava_fast in the user's cache folder."""
    if "TLF_CACHE" in os.environ:
        return Path(os.environ["TLF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllava_fast"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: platform knows something
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Memory that a process could take now without swapping; all of the machine's where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory_bytes()


def rss_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it began or since ``reset_peak_rss``."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let the peak count from the present size, where the kernel offers that; else it stays that of the whole life."""
    try:
        Path("/proc/self/clear_refs").write_bytes(b"5")
    except OSError:
        return
