"""What a container may use: Linux's control groups, version 2 and 1, of this process and those around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # version 1 says "none" by the largest number of pages


def cpu_quota() -> float | None:
    """Return how many CPUs this process may keep busy at once; None without a quota."""
    quotas = []
    for folder in _folders("cpu"):
        both = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(both) == 2 and both[0] not in ("max", "-1") and float(both[1]) > 0:
            quotas.append(float(both[0]) / float(both[1]))
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Return the bytes that this process and those of its group may hold; None without a limit."""
    limits = []
    for folder in _folders("memory"):
        word = (_words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes") or ["max"])[0]
        value = math.inf if word == "max" else float(word)
        if value < _NO_LIMIT:
            limits.append(int(value))
    return min(limits, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """Yield the groups of this process, the inmost first, as they are mounted here.

    Inside a container its own group may be mounted as the root, so that the path that the kernel tells is not there.
    """
    for line in _lines(OWN):
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = ROOT / controller if names else ROOT
        group = base / path.strip("/")
        while group != base and base in group.parents:
            yield group
            group = group.parent
        yield base


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
