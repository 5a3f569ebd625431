"""`tlf-bench ops`: every op against eager and compiled torch on the shapes of `tlf-bench train`, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.cases import TINY, Case, Shapes, cases
from tinyllava_fast.bench.timing import interleave, speedup
from tinyllava_fast.errors import UserError, nearest

PASSES = ("forward", "forward+backward")


def benchmark(
    ops: Sequence[str] | None = None,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    rounds: int = 7,
    quick: bool = False,
) -> dict[str, Any]:
    """Time the named ops (None: all). quick: tiny shapes, for tests of the command.

    Returns {"machine", "dtype", "rows": [{op, shape, pass, medians {name: s}, spread {name: ...}, ratio {name: x}}]};
    ratio says how many times faster ours is than that competitor. UserError for an unknown op or dtype.
    """
    if dtype not in machine.DTYPES:
        raise UserError(f"--dtype {dtype!r}; {nearest(dtype, machine.DTYPES)}")
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least 1")
    every = list(cases(TINY if quick else Shapes(), machine.DTYPES[dtype], device))
    known = [case.op for case in every]
    for name in ops or ():
        if name not in known:
            raise UserError(f"--op {name!r}; {nearest(name, known)}")
    rows: list[dict[str, Any]] = []
    for case in every:
        if ops and case.op not in ops:
            continue
        for direction in PASSES if case.leaves else PASSES[:1]:
            rows.append(_measure(case, direction, device, rounds, 0.0 if quick else 0.2))
    return {"machine": machine.describe(device), "dtype": dtype, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """One table: an op and pass a row block, a competitor a line."""
    lines = []
    for row in result["rows"]:
        for name, median in row["medians"].items():
            rate = report.quantity(row["flops"] / median, "FLOP/s") if row["flops"] else ""
            ratio = "" if name == "ours" else f"{row['ratio'][name]['ratio']:.2f}x"
            spread = f"{report.seconds(row['spread'][name][0])} .. {report.seconds(row['spread'][name][1])}"
            lines.append([f"{row['op']} {row['pass']}", name, report.seconds(median), spread, rate, ratio])
    columns = ["op", "candidate", "median", "quartiles", "rate", "ours is faster by"]
    report.show(f"Ops, {result['dtype']}, {result['machine']['threads']} threads", columns, lines)


def _measure(case: Case, direction: str, device: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    backward = direction != "forward"
    runs = {name: _pass(run, case.leaves if backward else ()) for name, run in case.run.items()}
    series = interleave(runs, rounds=rounds, warmup=3, min_seconds=min_seconds, sync=machine.device_sync(device))
    return {
        "op": case.op,
        "shape": case.label,
        "pass": direction,
        "flops": case.flops * (3 if backward else 1),
        "medians": {name: s.median for name, s in series.items()},
        "spread": {name: s.quartiles for name, s in series.items()},
        "ratio": {name: speedup(s, series["ours"]) for name, s in series.items() if name != "ours"},
    }


def _pass(run: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    if not leaves:
        return torch.no_grad()(run)
    grad: list[Tensor] = []

    def both() -> Any:
        out = run()
        if not grad:
            grad.append(torch.ones_like(out))
        return torch.autograd.grad(out, leaves, grad[0])

    return both
