"""Threads: as many as this process may keep busy, in one OpenMP runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from tinyllava_fast import hardware
from tinyllava_fast.doctor import cgroup
from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok
from tinyllava_fast.ops import _cpp


@CHECKS.register("threads")
def threads() -> Iterator[Finding]:
    """The number of threads against the cores and the container's quota."""
    count, cores, quota = torch.get_num_threads(), hardware.cores(), cgroup.cpu_quota()
    facts = {"threads": count, "cores": cores, "quota": quota}
    usable = max(1, int(min(cores, quota or cores)))
    allowed = f"{cores} cores" + (f", of which a quota allows {quota:g}" if quota and quota < cores else "")
    if count > usable:
        yield fault(
            f"{count} threads on {allowed}: threads that wait for one another stand still in turn",
            f"set OMP_NUM_THREADS={usable} (tlf-train: engine.threads={usable}), or raise the quota",
            **facts,
        )
    elif count == 1 < usable:
        yield fault(f"one thread on {allowed}", "unset OMP_NUM_THREADS, or set it to the number of cores", **facts)
    elif count < usable:
        yield note(f"{count} threads on {allowed}", "beside nothing else, OMP_NUM_THREADS may be higher", **facts)
    else:
        yield ok(f"{count} threads on {allowed}", **facts)
    _cpp.load()
    found = openmp_runtimes()
    if len(found) > 1:
        yield note(
            f"{len(found)} OpenMP runtimes in one process ({', '.join(found)}): each has threads of its own",
            "build the extension with GCC, which shares torch's; or import torch before other packages",
        )


def openmp_runtimes() -> list[str]:
    """Return the file names of the OpenMP libraries that this process has loaded; [] where /proc does not say."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    paths = set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[-.\w]*\.so[.\d]*", maps))
    return sorted(Path(path).name for path in paths)
