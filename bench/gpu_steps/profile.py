"""The operators of a few of our training steps by their time, and how often the host waits for the GPU."""

from __future__ import annotations

import io
import json

import torch
from torch.profiler import ProfilerActivity

from tinyllava_fast.bench import sides, train
from tinyllava_fast.bench.gate import Facts, Gate
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.gpu_workload import SMALL, write_workload
from tinyllava_fast.bench.settings import TrainSettings
from tinyllava_fast.config.load import load_run

WARMUP, STEPS_SEEN, TOP = 3, 4, 40
WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync")


class _Profiled(Gate):
    """Opens for some steps and records the last of them."""

    def __init__(self, device: str) -> None:
        super().__init__(io.StringIO(), io.StringIO())
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.profiler = torch.profiler.profile(activities=kinds)
        self.steps = 0

    def ready(self, facts: Facts) -> None:
        """Nobody waits."""

    def begin(self) -> None:
        """Start to record behind the warm-up."""
        if self.steps == WARMUP:
            self.profiler.start()

    def end(self, loss: float) -> None:
        """Count the step; end with the last."""
        self.steps += 1
        if self.steps == WARMUP + STEPS_SEEN:
            self.profiler.stop()
            raise EOFError


@STEPS.register("profile")
def run(job: Job) -> None:
    """Record eager steps of the small model."""
    config = write_workload(job.scratch, SMALL, device=job.device, tiny=job.tiny)
    settings = TrainSettings(rounds=STEPS_SEEN, warmup=WARMUP, samples=1 if job.tiny else 8)
    run = load_run(train.compose(config, ["engine.compile=false"], job.scratch, settings))
    gate = _Profiled(job.device)
    try:
        sides.serve("ours", run, gate, per_step=settings.samples, precision="bf16")
    except EOFError:
        pass
    events = gate.profiler.key_averages()
    on_gpu = job.device == "cuda"

    def microseconds(event: object) -> float:
        return float(getattr(event, "self_device_time_total" if on_gpu else "self_cpu_time_total"))

    slowest = sorted(events, key=microseconds, reverse=True)[:TOP]
    table = [{"name": e.key, "calls": e.count, "ms_a_step": microseconds(e) / 1e3 / STEPS_SEEN} for e in slowest]
    (job.folder / "profile.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    job.tell("step", ms=sum(map(microseconds, events)) / 1e3 / STEPS_SEEN, operators=len(events))
    waits = {name: sum(e.count for e in events if e.key == name) / STEPS_SEEN for name in WAITS}
    job.tell("waits a step", **waits)  # the loss is read once a step, as the race does
    for one in table[:10]:
        job.tell(str(one["name"])[:80], calls=one["calls"], ms_a_step=one["ms_a_step"])
