"""`tlf-train --profile`: the time and memory of a step by component, as a trace and a one-page table.

Time is attributed by operator: a product of matrices to the component whose weight and number of rows it has, the ops
of this toolkit by name, the optimizer and the wait for data by the regions that the loop marks. Kernels that Inductor
fuses and element-wise operators belong to no component and are a row of their own.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from tinyllava_fast.config.schema import RecipeConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import writing
from tinyllava_fast.hardware import gemm_flops_per_s, peak_rss_bytes
from tinyllava_fast.log import log
from tinyllava_fast.models.flops import Trains, costs_of, pack_flops
from tinyllava_fast.models.lmm import COMPONENTS, LMM
from tinyllava_fast.train import cpu_pool

WARMUP, RECORDED = 3, 2
"""Steps before the record begins (compilation and first touch of memory lie there), and steps in it."""

ROWS = {
    "vision": "vision: products of weights",
    "connector": "connector: products of weights",
    "llm": "decoder: products of weights",
    "attention": "attention, decoder and tower",
    "head": "output projection and loss",
    "fused": "fused and element-wise kernels",
    "optimizer": "optimizer, gradient sums included",
    "data": "waiting for data",
    "rest": "rest",
}
_OPS = {"tlf::packed_attention": "attention", "tlf::linear_cross_entropy": "head"}
_REGIONS = {"tlf.optimizer": "optimizer", "tlf.data": "data"}
_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "tlf::gemm": (0, 1)}
"""Positions of the two factors among the inputs."""


class Operator(TypedDict):
    """An operator at inputs of some shapes, for one step."""

    operator: str
    inputs: str
    seconds: float
    calls: float


class Result(TypedDict):
    """The numbers of profile-STAGE.json."""

    stage: str
    step_seconds: float
    rows: dict[str, dict[str, float]]
    """Seconds and FLOPs of one step by the keys of ROWS."""
    longest: list[Operator]
    useful_flops: dict[str, float]
    gemm_flops_per_s: float
    mfu: float
    hfu: float
    state_bytes: dict[str, int]
    activation_peak_bytes: int | None
    peak_rss_bytes: int


@dataclass
class _Share:
    seconds: float = 0.0
    calls: int = 0
    flops: int = 0  # of products


@dataclass
class StepProfiler:
    """Records a few steps of a stage.

    folder: of the run. model: after its recipe is applied. moments: bytes a weight that the optimizer keeps of them.
    """

    folder: Path
    stage: str
    model: LMM
    recipe: RecipeConfig
    dtype: torch.dtype
    moments: float = 8
    _done: int = 0
    _started: float = 0.0
    _batches: list[PackedBatch] = field(default_factory=list)
    _record: torch.profiler.profile | None = None

    def begin(self) -> None:
        """Start recording if it is time. Call it before each step."""
        if self._done == WARMUP:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._record = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
            cpu_pool.stats(reset=True)
            self._record.start()
            self._started = time.perf_counter()

    def end(self, batches: Sequence[PackedBatch]) -> None:
        """Note a step's micro-batches, and write the files after the last recorded step. Call it after each step."""
        self._done += 1
        if self._record is None:
            return
        self._batches += batches
        if self._done == WARMUP + RECORDED:
            seconds = time.perf_counter() - self._started
            self._record.stop()
            self._write(self._record, seconds)
            self._record = None

    def close(self) -> None:
        """Say so if the stage, which has ended, was too short to be recorded."""
        if self._done < WARMUP + RECORDED:
            log.warning(
                "--profile: stage %s has %d steps, the record needs %d", self.stage, self._done, WARMUP + RECORDED
            )
            if self._record is not None:
                self._record.stop()

    def _write(self, record: torch.profiler.profile, seconds: float) -> None:
        trace = self.folder / f"profile-{self.stage}.trace.json"
        with writing(trace):
            self.folder.mkdir(parents=True, exist_ok=True)
            record.export_chrome_trace(str(trace))
        if self.model.device.type != "cpu":
            log.info("--profile: trace in %s; the table is made on a CPU only", trace)
            return
        result = self._result(record.events(), seconds)
        text = render(result)
        with writing(self.folder):
            numbers = json.dumps(result, indent=2) + "\n"
            (self.folder / f"profile-{self.stage}.json").write_text(numbers, encoding="utf-8")
            (self.folder / f"profile-{self.stage}.md").write_text(text, encoding="utf-8")
        log.info("--profile: %s\n%s", trace, text)

    def _result(self, events: Iterable[FunctionEvent], seconds: float) -> Result:
        costs, steps = costs_of(self.model), RECORDED
        useful: dict[str, float] = defaultdict(float)
        for batch in self._batches:
            cached = batch.pixel_values.dim() == 3
            for name, value in pack_flops(costs, batch, trains(self.recipe), cached=cached).items():
                useful[name] += value / steps
        rows = {(len(b.input_ids), len(b.pixel_values)) for b in self._batches}
        shares, longest = attribute(events, self.model, rows)
        peak = gemm_flops_per_s(self.dtype)
        step = seconds / steps
        products = sum(s.flops for s in shares.values()) / steps + useful["attention"]
        pool = cpu_pool.stats()
        return {
            "stage": self.stage,
            "step_seconds": step,
            "rows": {key: {"seconds": shares[key].seconds / steps, "flops": shares[key].flops / steps} for key in ROWS},
            "longest": [
                {"operator": name, "inputs": shapes, "seconds": s.seconds / steps, "calls": s.calls / steps}
                for (name, shapes), s in longest
            ],
            "useful_flops": useful,
            "gemm_flops_per_s": peak,
            "mfu": sum(useful.values()) / step / peak,
            "hfu": products / step / peak,
            "state_bytes": state_bytes(self.model, self.moments),
            "activation_peak_bytes": pool.peak - pool.used if pool else None,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def trains(recipe: RecipeConfig) -> Trains:
    """Return the components that get gradients of their own weights; those of adapters are not counted."""
    return Trains(**{name: getattr(recipe, name).tune in ("full", "partial") for name in COMPONENTS})


def state_bytes(model: LMM, moments: float = 8) -> dict[str, int]:
    """Bytes of each component's weights, and of what training keeps for it: float32 master and moments.

    moments: bytes a weight.
    """
    sizes: dict[str, int] = {}
    for name, parameters in model.component_parameters().items():
        sizes[name] = sum(p.numel() * p.element_size() for _, p in parameters)
        learnt = [p for _, p in parameters if p.requires_grad]
        sizes[f"{name}, optimizer"] = sum(
            round(p.numel() * (moments + (0 if p.dtype == torch.float32 else 4))) for p in learnt
        )
    return sizes


def attribute(
    events: Iterable[FunctionEvent], model: LMM, batches: set[tuple[int, int]]
) -> tuple[dict[str, _Share], list[tuple[tuple[str, str], _Share]]]:
    """Self time of every event by row of the table, and the longest operators. batches: (tokens, images) of packs."""
    owners = _owners(model, batches)
    shares: dict[str, _Share] = {key: _Share() for key in ROWS}
    operators: dict[tuple[str, str], _Share] = defaultdict(_Share)
    for event in events:
        seconds = event.self_cpu_time_total / 1e6
        flops, dims = _product(event)
        share = shares[_row(event, dims, owners)]
        share.seconds += seconds
        share.calls += 1
        share.flops += flops
        shapes = " ".join(str(s) for s in (event.input_shapes or []) if s)
        operator = operators[(event.name, shapes[:60])]
        operator.seconds += seconds
        operator.calls += 1
    longest = sorted(operators.items(), key=lambda item: -item[1].seconds)
    return shares, longest[:12]


def _owners(model: LMM, batches: set[tuple[int, int]]) -> dict[tuple[int, ...], str]:
    """Sorted (rows, in, out) of every product with a weight, forward and backward alike -> component.

    Where two components have the same one, the decoder counts for it: it has more of them.
    """
    owners: dict[tuple[int, ...], str] = {}
    for tokens, images in batches:
        seen = model.vision.num_tokens + getattr(model.vision, "num_dropped", 0)
        for name, rows in (
            ("vision", (images * seen, images * model.vision.num_tokens)),
            ("connector", (images * model.vision.num_tokens, images * model.tokens_per_image)),
            ("llm", (tokens,)),
        ):
            for module in getattr(model, name).modules():
                if isinstance(module, nn.Linear):
                    for row in rows:
                        owners[tuple(sorted((row, *module.weight.shape)))] = name
    return owners


def _product(event: FunctionEvent) -> tuple[int, tuple[int, ...]]:
    """Return FLOPs and sorted dimensions of a product of two matrices; (0, ()) for another event."""
    shapes = cast(Sequence[Sequence[int]], event.input_shapes)  # torch's annotation is of one shape
    if event.name not in _PRODUCTS:
        return 0, ()
    left, right = (shapes[i] for i in _PRODUCTS[event.name])
    dims = (*left, right[1])
    return 2 * dims[0] * dims[1] * dims[2], tuple(sorted(dims))


def _row(event: FunctionEvent, dims: tuple[int, ...], owners: dict[tuple[int, ...], str]) -> str:
    node: FunctionEvent | None = event
    while node is not None:
        for prefix, row in _OPS.items():
            if node.name.startswith(prefix):
                return row
        if node.name in _REGIONS:
            return _REGIONS[node.name]
        node = node.cpu_parent
    if dims:
        return owners.get(dims, "rest")
    if "convolution" in event.name:
        return "vision"
    if event.name.startswith(("## Call CompiledFxGraph", "aten::", "graph_")):
        return "fused"
    return "rest"


def render(result: Result) -> str:
    """Return the result as a page of Markdown."""
    step = result["step_seconds"]
    lines = [
        f"# A step of stage {result['stage']}: {step:.3f} s",
        "",
        "| | seconds | share | GEMM rate |",
        "|---|---|---|---|",
    ]
    for key, title in ROWS.items():
        row = result["rows"][key]
        rate = f"{row['flops'] / row['seconds'] / 1e12:.2f} TFLOP/s" if row["flops"] and row["seconds"] else ""
        lines.append(f"| {title} | {row['seconds']:.3f} | {100 * row['seconds'] / step:.1f} % | {rate} |")
    lines += [
        "",
        f"MFU {100 * result['mfu']:.1f} %, HFU {100 * result['hfu']:.1f} % of {result['gemm_flops_per_s'] / 1e12:.2f} "
        f"TFLOP/s measured; {sum(result['useful_flops'].values()) / 1e12:.2f} TFLOP useful.",
        "",
        "| memory | GiB |",
        "|---|---|",
    ]
    lines += [f"| {name} | {size / 2**30:.2f} |" for name, size in result["state_bytes"].items() if size]
    if result["activation_peak_bytes"] is not None:
        lines.append(f"| activations and temporary tensors, at most | {result['activation_peak_bytes'] / 2**30:.2f} |")
    lines.append(f"| peak of the process | {result['peak_rss_bytes'] / 2**30:.2f} |")
    lines += ["", "| longest operators | inputs | calls | seconds |", "|---|---|---|---|"]
    for one in result["longest"]:
        name = one["operator"][:48]
        lines.append(f"| {name} | {one['inputs']} | {one['calls']:.0f} | {one['seconds']:.3f} |")
    return "\n".join(lines) + "\n"
