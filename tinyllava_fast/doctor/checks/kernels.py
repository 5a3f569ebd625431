"""Every op's kernels against its reference in float64, on the op's own samples: the first of each, then the others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, ok
from tinyllava_fast.ops._agreement import DTYPES, cases, disagreements, runnable
from tinyllava_fast.ops._op import Op, Sample

SECONDS = 8.0
"""After which no further case begins; those of the first sample of each op all run."""


@CHECKS.register("kernels")
def kernels() -> Iterator[Finding]:
    """C++ on the CPU, Triton on a GPU. One thread: on samples so small a team of threads costs more than it gives."""
    backends = ["cpp", *(["triton"] if torch.cuda.is_available() else [])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for backend in backends:
            yield from _compare(backend, SECONDS / len(backends))
    finally:
        torch.set_num_threads(threads)


def _compare(backend: str, seconds: float) -> Iterator[Finding]:
    began, ran, wrong = time.monotonic(), 0, 0
    ops: set[str] = set()
    chosen = [case for case in _ordered() if runnable(*case, backend) is None]
    firsts = len({op.name for op, _, _ in chosen}) * len(DTYPES)
    for number, (op, sample, dtype) in enumerate(chosen):
        if number >= firsts and time.monotonic() - began > seconds:
            break
        ran, ops = ran + 1, ops | {op.name}
        try:
            found = list(disagreements(op, sample, dtype, backend))
        except Exception as error:
            found = [f"{op.name} ({sample.label}, {dtype}): {type(error).__name__}: {error}"]
        wrong += bool(found)
        if found and wrong <= 3:
            yield fault(
                f"the {backend} kernel is wrong: {found[0]}",
                "install the package again; if it stays, TLF_BACKEND=reference runs without kernels: report this",
                op=op.name,
            )
    if wrong > 3:
        yield fault(f"{wrong} of {ran} comparisons of {backend} kernels are wrong", "as above")
    elif not wrong and ran:
        taken = time.monotonic() - began
        yield ok(
            f"{backend} kernels of {len(ops)} ops agree with their references in {ran} of {len(chosen)} cases",
            ops=sorted(ops), cases=ran, seconds=taken,
        )  # fmt: skip


def _ordered() -> list[tuple[Op, Sample, torch.dtype]]:
    """Return the cases of all ops: the first sample of each, the second of each, and so on."""
    by_op: dict[str, list[tuple[Op, Sample]]] = {}
    for op, sample in cases():
        by_op.setdefault(op.name, []).append((op, sample))
    turns = itertools.zip_longest(*by_op.values())
    return [(*case, dtype) for turn in turns for case in turn if case is not None for dtype in DTYPES]
