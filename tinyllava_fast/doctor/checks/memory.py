"""Memory: how fast it is read and copied, whether large pages are to be had, and how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinyllava_fast import hardware
from tinyllava_fast.bench import machine, report
from tinyllava_fast.doctor import cgroup
from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LEAST = 2 * 2**30
"""Bytes below which not even the smallest training runs well."""


@CHECKS.register("memory")
def memory() -> Iterator[Finding]:
    """Size, huge pages and bandwidth."""
    whole, free, limit = hardware.total_memory_bytes(), hardware.available_memory_bytes(), cgroup.memory_limit()
    facts = {"total_bytes": whole, "available_bytes": free, "limit_bytes": limit}
    said = f"{whole / 2**30:.1f} GiB of memory, {free / 2**30:.1f} free"
    if limit is not None and limit < whole:
        said += f"; this process may hold {limit / 2**30:.1f}"
        free = min(free, limit)
    if free < LEAST:
        yield fault(said, "end other programs, or raise the container's limit", **facts)
    else:
        yield ok(said, **facts)
    yield from _huge_pages()
    reads, copies = machine.read_bandwidth(), machine.copy_bandwidth()
    yield ok(
        f"memory is read at {report.quantity(reads, 'B/s')} and copied at {report.quantity(copies, 'B/s')}",
        read_bytes_per_s=reads, copy_bytes_per_s=copies,
    )  # fmt: skip


def _huge_pages() -> Iterator[Finding]:
    try:
        text = HUGE_PAGES.read_text(encoding="utf-8")
    except OSError:
        yield note("this kernel does not say whether it gives huge pages")
        return
    if "[never]" in text:
        yield fault(
            "huge pages are off: large tensors cost a page fault for every 4 KiB",
            "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (in a container: on its host)",
        )
    else:
        yield ok("huge pages are given to whoever asks for them")
