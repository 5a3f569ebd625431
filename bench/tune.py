"""`tlf-bench ops --tune`: measure launch settings of the attention kernels on this GPU, rewrite kernels/launch.json.

For each bucket of the table (head size, kind of number) and each part (fwd, dq, dkv), the settings that fit shared
memory race in one run, interleaved; the one with the smallest median wins if it beats the present one by GAIN. A
setting that does not compile, does not fit or changes the result is dropped. Parts are searched one after another:
each kernel has its own settings, so what one of them takes does not depend on the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.case import Pack, Setting
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.timing import Series, interleave
from tinyllava_fast.errors import UserError
from tinyllava_fast.kernels._common import (
    BUCKETS,
    TABLE,
    Launch,
    arch_number,
    attention_launch,
    bucket_of,
    device_arch,
    read_table,
    trying,
)  # fmt: skip
from tinyllava_fast.ops import packed_attention

GAIN = 1.03
"""A setting replaces the present one if it is faster by this factor; less is noise."""
PARTS = ("fwd", "dq", "dkv")
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
Runs = Mapping[str, Callable[[], object]]
Times = dict[str, Series]
Race = Callable[[Runs], Times]
Table = dict[str, dict[str, dict[str, dict[str, Launch]]]]


def tune(path: Path = TABLE) -> Report:
    """Search every bucket on this GPU and rewrite the table.

    Returns {"arch", "gpu", "winners": {bucket: {part: settings}}, "changes": [{bucket, part, before, after, ratio}]}.
    UserError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("--tune measures launch settings of the Triton kernels, which needs a GPU; there is none here")
    arch, gpu = device_arch(), torch.cuda.get_device_name()
    winners: dict[str, dict[str, Launch]] = {}
    changes: list[dict[str, object]] = []
    for head_dim, dtype in product(BUCKETS, (torch.bfloat16, torch.float32)):
        bucket = bucket_of(head_dim, dtype)
        winners[bucket], changed = search(Problem(Pack(head_dim=head_dim), dtype, "cuda"), shared_limit(), race)
        changes += [{"bucket": bucket, **change} for change in changed]
    rewrite(path, arch, winners)
    plain = {bucket: {part: asdict(launch) for part, launch in parts.items()} for bucket, parts in winners.items()}
    return {"arch": arch, "gpu": gpu, "winners": plain, "changes": changes}


def shared_limit() -> int:
    """Return the bytes of shared memory that a block of this GPU may have."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"])


def race(runs: Runs) -> Times:
    """Measure interleaved on a GPU."""
    return interleave(runs, rounds=7, warmup=2, min_seconds=0.005, budget=30.0, timer=machine.device_timer("cuda"))


class Problem:
    """Attention over a pack, of which one kernel at a time is run with settings on trial."""

    def __init__(self, pack: Pack, dtype: torch.dtype, device: str) -> None:
        self.pack, self.dtype, self.device = pack, dtype, device
        randn, heads = Setting(dtype, device).randn, (pack.heads, pack.kv_heads, pack.kv_heads)
        q, k, v = (randn(pack.tokens, count, pack.head_dim) for count in heads)
        self.qkv = (q, k, v)
        self.cu = torch.tensor(pack.bounds, dtype=torch.int32, device=device)
        self.out = packed_attention(*self.qkv, self.cu)[0]
        self.grad = torch.ones_like(self.out)

    def present(self) -> dict[str, Launch]:
        """Return the table's settings for this problem."""
        return {part: attention_launch(self.device, self.pack.head_dim, self.dtype)[part] for part in PARTS}

    def run(self, part: str, launch: Launch) -> list[Tensor]:
        """Return the results of the pass that the part belongs to, with these settings for it."""
        with trying({part: launch}):
            if part == "fwd":
                with torch.no_grad():
                    return [packed_attention(*self.qkv, self.cu)[0]]
            return list(torch.autograd.grad(self.out, self.qkv, self.grad, retain_graph=True))


def candidates(part: str, head_dim: int, itemsize: int, shared_limit: int) -> Iterator[Launch]:
    """Yield the settings whose tiles fit: the tiles a program keeps, and a pipeline of those it streams, in bytes.

    fwd keeps q and streams k and v; dq keeps q and dout and streams k and v; dkv keeps k and v (n rows) and streams q
    and dout (m rows).
    """
    for m, n, warps, stages in product(ROWS, ROWS, WARPS, STAGES):
        kept = {"fwd": m, "dq": 2 * m, "dkv": 2 * n}[part]
        streamed = 2 * (m if part == "dkv" else n)
        if (kept + stages * streamed) * head_dim * itemsize <= shared_limit and m * n >= 32 * warps:
            yield Launch(m, n, warps, stages)


def search(problem: Problem, shared_limit: int, race: Race) -> tuple[dict[str, Launch], list[dict[str, object]]]:
    """Return the best settings of each part, and what changed: [{part, before, after, ratio}]."""
    best = problem.present()
    changes: list[dict[str, object]] = []
    for part in PARTS:
        before = best[part]
        winner, ratio = _fastest(problem, part, before, shared_limit, race)
        if winner != before:
            best[part] = winner
            changes.append({"part": part, "before": asdict(before), "after": asdict(winner), "ratio": ratio})
    return best, changes


def _fastest(problem: Problem, part: str, present: Launch, shared_limit: int, race: Race) -> tuple[Launch, float]:
    expected = problem.run(part, present)
    runs: dict[str, Callable[[], object]] = {}
    launches = {_name(present): present}
    for launch in candidates(part, problem.pack.head_dim, problem.dtype.itemsize, shared_limit):
        launches.setdefault(_name(launch), launch)
    for name, launch in launches.items():
        if launch == present or _works(problem, part, launch, expected):
            runs[name] = lambda launch=launch: problem.run(part, launch)  # type: ignore[misc]
    series = race(runs)
    winner = min(series, key=lambda name: series[name].median)
    ratio = series[_name(present)].median / series[winner].median
    return (launches[winner], ratio) if ratio >= GAIN else (present, 1.0)


def _works(problem: Problem, part: str, launch: Launch, expected: list[Tensor]) -> bool:
    try:
        got = problem.run(part, launch)
    except Exception:  # out of registers or shared memory, or whatever else the compiler refuses
        return False
    tolerance = 1e-3 if problem.dtype == torch.float32 else 2e-2
    return all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(got, expected, strict=True))


def _name(launch: Launch) -> str:
    return f"{launch.m}x{launch.n}, {launch.warps} warps, {launch.stages} stages"


def rewrite(path: Path, arch: str, winners: Mapping[str, Mapping[str, Launch]]) -> None:
    """Put the winners into the attention table under the architecture; other entries stay as they are.

    Buckets that were not searched are taken over from the entry that has served the architecture so far.
    """
    table = read_table(path)
    archs = table["attention"]
    older = [a for a in archs if arch_number(a) <= arch_number(arch)] or list(archs)[:1]
    entry = {bucket: dict(parts) for bucket, parts in archs[older[-1]].items()}
    for bucket, parts in winners.items():
        entry[bucket] = {**entry.get(bucket, {}), **parts}
    archs[arch] = entry
    path.write_text(dumps(table), encoding="utf-8")


def dumps(table: Table) -> str:
    """Return the table as text, one line a setting, architectures ascending."""
    ascending = {
        family: {arch: archs[arch] for arch in sorted(archs, key=arch_number)} for family, archs in table.items()
    }
    text = json.dumps(ascending, indent=2, default=asdict)
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + re.sub(r",\s+", ", ", m[1]) + "}", text) + "\n"


def show(result: Report) -> None:
    """Print what changed."""
    lines = [
        [c["bucket"], c["part"], _name(Launch(**c["before"])), _name(Launch(**c["after"])), f"{c['ratio']:.2f}x"]
        for c in result["changes"]
    ]
    title = f"Launch settings for {result['arch']} ({result['gpu']}): {len(lines)} changed in {TABLE}"
    report.show(title, ["bucket", "part", "before", "now", "faster by"], lines)
