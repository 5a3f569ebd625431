"""The engines of several processes, in one: what their hooks and copies cost where nothing is sent."""

from __future__ import annotations

from importlib.util import find_spec

from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.gpu_steps.train import alone
from tinyllava_fast.bench.gpu_workload import SMALL, write_workload
from tinyllava_fast.bench.settings import TrainSettings

ENGINES = {
    "torch": ("engine.type=torch",),
    "ddp": ("engine.type=ddp",),
    "fsdp": ("engine.type=fsdp",),
    "zero2": ("engine.type=deepspeed", "engine.zero_stage=2"),
}
ITEM_S = 40


@STEPS.register("engines")
def run(job: Job) -> None:
    """Train the small model under each, eagerly."""
    config = write_workload(job.scratch, SMALL, device=job.device, tiny=job.tiny)
    settings = TrainSettings(samples=1, rounds=1, warmup=1) if job.tiny else TrainSettings(rounds=4, steps=2)

    def one(name: str) -> None:
        if name == "zero2" and find_spec("deepspeed") is None:
            job.tell(name, absent="deepspeed is not installed")
            return
        alone(job, name, config, ENGINES[name], settings)

    job.each(["fsdp"] if job.tiny else ENGINES, ITEM_S, one)
