"""Training steps on the same samples: ours eager, compiled and with CUDA graphs, HF Trainer in its faster forms.

All sides take turns of a few steps. One that fails is told and left out; the losses of all are held against those of
the peer in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tinyllava_fast.bench import train
from tinyllava_fast.bench.gate import Worker
from tinyllava_fast.bench.gpu_job import STEPS, Job, in_a_line
from tinyllava_fast.bench.gpu_steps.machine import roof
from tinyllava_fast.bench.gpu_workload import SMALL, write_workload
from tinyllava_fast.bench.settings import TrainSettings
from tinyllava_fast.bench.timing import turns
from tinyllava_fast.errors import UserError

REFERENCE = "Trainer, float32"
LOSS_GAP = 0.02
"""Most that a loss may differ from the float32 peer's, as a share of it, over twenty steps in bfloat16."""


@dataclass(frozen=True)
class Side:
    """One competitor. keys: overrides of its run; options: of the worker; needs: a package."""

    name: str
    kind: str
    keys: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    needs: str = ""


def _peer(name: str, *options: str, needs: str = "") -> Side:
    return Side(f"Trainer, {name}", "peer", (), options, needs)


SIDES = (
    Side("ours, eager", "ours", ("engine.compile=false",)),
    Side("ours, compiled", "ours", ("engine.compile=true",)),
    Side("ours, CUDA graphs", "ours", ("engine.compile=true", "engine.cuda_graphs=true")),
    _peer("bf16 weights", "--precision", "bf16"),
    _peer("bf16 weights, Liger", "--precision", "bf16", "--liger", needs="liger_kernel"),
    _peer("bf16 weights, flash-attn", "--precision", "bf16", "--attention", "flash_attention_2", needs="flash_attn"),
    _peer("bf16 weights, flex_attention", "--precision", "bf16", "--attention", "flex_attention"),
    _peer("float32 weights, autocast", "--precision", "master"),
    Side(REFERENCE, "peer", (), ("--precision", "float32")),
)


@STEPS.register("train")
def run(job: Job) -> None:
    """Race all sides; tell each after every round."""
    tiny = job.tiny
    config = write_workload(job.scratch, SMALL, device=job.device, tiny=tiny)
    settings = TrainSettings(rounds=1, warmup=1, samples=2) if tiny else TrainSettings(rounds=4, steps=5, warmup=2)
    sides = [side for side in SIDES if not tiny or side.name in ("ours, eager", "Trainer, bf16 weights", REFERENCE)]
    peak = roof(job)["flops_per_s"]
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        measured: dict[str, train.Measured] = {}

        def attempt(side: Side, act: Callable[[], None]) -> None:
            try:
                act()
            except (UserError, ValueError, OSError) as error:  # what it said, or that it said something else
                workers.pop(side.name, None)
                measured.pop(side.name, None)
                job.tell(side.name, ok=False, error=in_a_line(str(error)))

        def start(side: Side) -> None:
            folder = job.scratch / side.name.replace(" ", "_")
            folder.mkdir(exist_ok=True)
            path = train.compose(config, side.keys, folder, settings)
            workers[side.name] = stack.enter_context(
                train.start(side.name, side.kind, path, folder, settings.samples, *side.options)
            )

        def warm(side: Side) -> None:
            measured[side.name] = train.Measured(workers[side.name].ready())
            measured[side.name].add(workers[side.name].steps(settings.warmup), warmup=True)

        for side in sides:
            if side.needs and find_spec(side.needs) is None:
                job.tell(side.name, absent=f"{side.needs} is not installed")
            else:
                attempt(side, lambda side=side: start(side))  # type: ignore[misc]
        with ThreadPoolExecutor() as pool:  # compilation takes cores, not the GPU: side by side
            ready = [side for side in sides if side.name in workers]
            list(pool.map(lambda side: attempt(side, lambda: warm(side)), ready))
        for index in range(settings.rounds):
            for name in turns([side.name for side in sides], index):
                side = next(side for side in sides if side.name == name)
                if name in workers:
                    attempt(side, lambda n=name: measured[n].add(workers[n].steps(settings.steps)))  # type: ignore[misc]
            for name, one in measured.items():
                tell(job, name, one, settings.samples, peak, measured.get(REFERENCE))


def tell(
    job: Job, name: str, one: train.Measured, samples: int, peak: float, reference: train.Measured | None = None
) -> None:
    """Write the row of a side: its step, rates, memory and losses. peak: FLOP/s that MFU divides by."""
    speed, gap = one.speed(samples), None
    if reference is not None and len(reference.losses) == len(one.losses):
        gap = train.largest_gap(one.losses, reference.losses)
    median = one.series.median
    job.tell(
        name,
        **({} if gap is None else {"ok": gap <= LOSS_GAP or not name.startswith("ours"), "loss_gap": gap}),
        step_ms=1e3 * median,
        tokens_per_s=speed["tokens_per_s"],
        mfu=sum(one.facts["flops"].values()) / median / peak,
        peak_bytes=one.peak_device_bytes or one.peak_rss_bytes,
        warmup_s=one.warmup_seconds,
        losses=one.losses,
        seconds=one.seconds,
    )


def alone(job: Job, name: str, config: Path, keys: Sequence[str], settings: TrainSettings) -> None:
    """Run our side by itself and tell it."""
    with train.alone(config, keys, settings) as (worker, measured):
        measured.add(worker.steps(settings.warmup), warmup=True)
        for _ in range(settings.rounds):
            measured.add(worker.steps(settings.steps))
    tell(job, name, measured, settings.samples, roof(job)["flops_per_s"])
