"""`tlf-bench ops`: every op against plain torch, torch under Inductor and the libraries that install, interleaved.

Each row is one op, one shape and one pass; its candidates take turns, so all of them see the same machine. Beside the
medians stand the rates that follow from the least work of the pass, the fraction of what this machine allows for that
work (measured in the same process), the peak of memory and the bytes kept for the backward pass.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

import torch

from tinyllava_fast.bench import machine, memory, report
from tinyllava_fast.bench.case import BOTH, SUITE, Case, Run, Setting, Work
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import OpsSettings
from tinyllava_fast.bench.timing import interleave, speedup
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.log import log

FORMAT = "tlf-bench ops 2"
ROW_SECONDS, SIZE_SECONDS = 5.0, 1.5
"""About how long the rounds of a row may take together: of a main row, of one of many sizes."""
LEAST_ROUNDS, LEAST_SECONDS = 3, 16.0
"""Fewer, but one at least, where so many take longer than this."""
CALL_SECONDS, SLOW_SECONDS = 0.05, 2.0
"""A candidate is called so often in a round that it takes the former; a call that takes the latter is slow."""

Row = TypedDict(
    "Row",
    {
        "op": str,
        "shape": str,
        "pass": str,
        "flops": float,  # the least work of the pass
        "bytes": float,
        "rounds": int,
        # by candidate:
        "medians": dict[str, float],  # seconds
        "spread": dict[str, tuple[float, float]],  # quartiles in seconds
        "ratio": dict[str, dict[str, float]],  # by how many times ours is faster
        "flops_per_s": dict[str, float],
        "bytes_per_s": dict[str, float],
        "roofline": dict[str, float],  # the fraction of the roof; above 1 where data stay in the cache
        "peak_bytes": dict[str, int | None],
        "saved_bytes": dict[str, int],  # for the backward pass
        "axes": dict[str, float],  # the row's places in plots
    },
)


def benchmark(settings: OpsSettings, roof: dict[str, float] | None = None) -> Report:
    """Time the named ops. roof: as machine.roof has measured it already; None: measure it before and after.

    Returns {"format", "machine", "roof", "dtype", "rows", "absent", "headline"}: rows are Rows, absent is {op:
    {candidate: reason}}; headline see headline(). UserError for an unknown op or device.
    """
    check(settings)
    dtype, device, quick = machine.DTYPES[settings.dtype], settings.device, settings.quick
    roofs = [roof or machine.roof(dtype, device, quick=quick)]
    absent: dict[str, dict[str, str]] = {}
    claims: list[tuple[Case, Row]] = []
    for name in settings.ops or SUITE.names():
        setting = Setting(dtype, device, quick, settings.sweep, settings.compile)
        for case in SUITE.get(name)(setting):
            began, missing = time.perf_counter(), absent.setdefault(name, {})
            for candidate, reason in case.absent.items():
                missing.setdefault(candidate, reason)
            for direction in case.work:
                claims.append((case, _measure(case, direction, settings, missing)))
            log.info("%s %s: %.0f s", name, case.label, time.perf_counter() - began)
            torch._dynamo.reset()  # the next shape's candidates share code with these and would count as recompiles
    # a disturbed measurement would make a low roof: again after the race, and the better one counts
    if roof is None:
        roofs.append(machine.roof(dtype, device, quick=quick))
    roof = {key: max(r[key] for r in roofs) for key in roofs[0]}
    rows = [row for _, row in claims]
    for row in rows:
        least = least_seconds(Work(row["flops"], row["bytes"]), roof)
        row["roofline"] = {name: least / median for name, median in row["medians"].items()}
    return {
        "format": FORMAT,
        "machine": machine.describe(device),
        "roof": roof,
        "dtype": settings.dtype,
        "rows": rows,
        "absent": {op: reasons for op, reasons in absent.items() if reasons},
        "headline": headline(claims),
    }


def check(settings: OpsSettings) -> None:
    """Raise UserError for an op or a device that there is not."""
    machine.check_device(settings.device)
    for name in settings.ops:
        if name not in SUITE:
            raise UserError(f"--op {name!r}; {nearest(name, SUITE.names())}")


def headline(claims: Iterable[tuple[Case, Row]]) -> dict[str, float]:
    """Return {key: ratio} from cases and their rows: of forward+backward medians, more than 1 where ours is better.

    linear_cross_entropy_memory is a ratio of peaks. Where several rows claim a key, the smallest ratio stands.
    """
    found: dict[str, list[float]] = {}
    for case, row in claims:
        if row["pass"] != BOTH:
            continue
        for key, rival in case.headline.items():
            if rival in row["ratio"]:
                found.setdefault(key, []).append(row["ratio"][rival]["ratio"])
        peaks = row["peak_bytes"]
        for key, rival in case.memory_headline.items():
            if (theirs := peaks.get(rival)) and (ours := peaks.get("ours")):
                found.setdefault(key, []).append(theirs / ours)
    return {key: min(ratios) for key, ratios in found.items()}


def _measure(case: Case, direction: str, settings: OpsSettings, absent: dict[str, str]) -> Row:
    rounds, device, quick = settings.rounds, settings.device, settings.quick
    backward = direction == BOTH
    runs = {name: _pass(run, case, backward) for name, run in case.run.items()}
    if not quick:
        gc.collect()
    first: dict[str, _First] = {}
    for name in list(runs):
        try:
            first[name] = _first_calls(case, name, runs[name], device, backward)
        except Exception as error:  # whatever a library raises about what it does not support
            if name == "ours":
                raise
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
            absent.setdefault(name, f"{direction}: {type(error).__name__}: {line}"[:300])
            del runs[name]
    call_seconds = settings.hurry * CALL_SECONDS
    quickest, together = min(f.seconds for f in first.values()), sum(f.seconds for f in first.values())
    series = interleave(
        runs,
        rounds=rounds,
        warmup=0,  # the first calls were that
        min_seconds=0.0 if quick or quickest > call_seconds else call_seconds,
        budget=settings.hurry * (ROW_SECONDS if case.main else SIZE_SECONDS),
        least=max(1, min(rounds, LEAST_ROUNDS, round(LEAST_SECONDS / together))),
        timer=machine.device_timer(device),
    )
    work, medians = case.work[direction], {name: s.median for name, s in series.items()}
    return {
        "op": case.op,
        "shape": case.label,
        "pass": direction,
        "flops": work.flops,
        "bytes": work.bytes,
        "rounds": len(series["ours"].seconds),
        "medians": medians,
        "spread": {name: s.quartiles for name, s in series.items()},
        "ratio": {name: speedup(s, series["ours"]) for name, s in series.items() if name != "ours"},
        "flops_per_s": {name: work.flops / median for name, median in medians.items()},
        "bytes_per_s": {name: work.bytes / median for name, median in medians.items()},
        "roofline": {},  # the roof is known at the end only
        "peak_bytes": {name: f.peak for name, f in first.items()},
        "saved_bytes": {name: f.saved for name, f in first.items()} if backward else {},
        "axes": dict(case.axes),
    }


def least_seconds(work: Work, roof: dict[str, float]) -> float:
    """Return the seconds that the pass takes at the GEMM peak or at the copy bandwidth, whichever is slower."""
    return max(work.flops / roof["flops_per_s"], work.bytes / roof["bytes_per_s"])


class _First(NamedTuple):
    peak: int | None
    saved: int
    seconds: float


def _first_calls(case: Case, name: str, run: Callable[[], object], device: str, backward: bool) -> _First:
    """Compile and warm up, looking at memory; a call of seconds is not repeated.

    What happens only once, compilation apart, is small in a call of seconds.
    """
    logging.disable(logging.WARNING)  # a library that cannot says so at length before it raises
    try:
        if name.endswith("compiled"):
            run()
        with memory.saved(*case.leaves, *case.frozen) as kept:
            peak, seconds = _timed_peak(run, device)
        if seconds < SLOW_SECONDS:
            peak, seconds = _timed_peak(run, device)
        return _First(peak, sum(kept.values()), seconds)
    finally:
        logging.disable(logging.NOTSET)


def _timed_peak(run: Callable[[], object], device: str) -> tuple[int | None, float]:
    began = time.perf_counter()
    return memory.peak_extra_bytes(run, device), time.perf_counter() - began


def _pass(run: Run, case: Case, backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(run)
    grad: list[torch.Tensor] = []

    def both() -> tuple[torch.Tensor, ...]:
        out = run()
        if not grad:
            grad.append(torch.ones_like(out))
        return torch.autograd.grad(out, case.leaves, grad[0])

    return both


COLUMNS = ["candidate", "median", "quartiles", "work", "traffic", "of roof", "peak", "saved", "ours faster by"]


def show(result: Report) -> None:
    """Print one table an op, a block of lines for each shape and pass; then the headline and who is absent."""
    facts = "{dtype}, {machine[threads]} threads; roof: {roof[flops_per_s]:FLOP/s}, {roof[bytes_per_s]:B/s}"
    facts = report.fill(facts, result)
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        lines: list[list[str]] = []
        for row in (r for r in result["rows"] if r["op"] == op):
            lines.append([f"{row['shape']}  {row['pass']}"] + [""] * (len(COLUMNS) - 1))
            lines += [_line(row, name) for name in row["medians"]]
        report.show(f"{op}, {facts}", COLUMNS, lines)
    if result["headline"]:
        lines = [[key, f"{ratio:.2f}x"] for key, ratio in result["headline"].items()]
        report.show("Headline", ["forward and backward", "ours is better by"], lines)
    absent = [[op, name, why] for op, reasons in result["absent"].items() for name, why in reasons.items()]
    if absent:
        report.show("Not in the race", ["op", "candidate", "reason"], absent)


def _line(row: Row, name: str) -> list[str]:
    low, high = row["spread"][name]
    peak, saved = row["peak_bytes"].get(name), row["saved_bytes"].get(name)
    return [
        f"  {name}",
        report.seconds(row["medians"][name]),
        f"{report.seconds(low)} .. {report.seconds(high)}",
        report.quantity(row["flops_per_s"][name], "FLOP/s") if row["flops"] else "",
        report.quantity(row["bytes_per_s"][name], "B/s") if row["bytes"] else "",
        f"{100 * row['roofline'][name]:.0f} %" if row["bytes"] else "",
        "" if peak is None else report.quantity(peak, "B"),
        "" if saved is None else report.quantity(saved, "B"),
        "" if name == "ours" else f"{row['ratio'][name]['ratio']:.2f}x",
    ]
