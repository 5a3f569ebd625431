"""Losses of training, ours against the plainest float32 loop over transformers' model, as `tlf-bench parity` has it."""

from __future__ import annotations

from tinyllava_fast.bench import parity
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.gpu_workload import SMALL, write_workload
from tinyllava_fast.bench.settings import ParitySettings

DTYPES = ("bfloat16", "float32")
ITEM_S = 60


@STEPS.register("parity")
def run(job: Job) -> None:
    """Train two seeds in each dtype."""
    config = write_workload(job.scratch, SMALL, device=job.device, tiny=job.tiny)
    settings = ParitySettings(steps=2, samples=2, seeds=2) if job.tiny else ParitySettings(steps=10, samples=4, seeds=2)

    def one(dtype: str) -> None:
        found = parity.benchmark(config, [f"engine.dtype={dtype}"], settings)
        told = {key: found[key] for key in ("gap", "noise", "ratio", "bias", "bias_error", "ours", "reference")}
        job.tell(dtype, ok=found["parity"], **told)

    job.each(DTYPES[1:] if job.tiny else DTYPES, ITEM_S, one)
