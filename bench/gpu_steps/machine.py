"""The GPU and its roofs; whether the extension loads, and which packages are there."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from tinyllava_fast.bench import machine
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.ops import _cpp

PACKAGES = ("triton", "accelerate", "peft", "bitsandbytes", "deepspeed", "liger-kernel", "flash-attn", "vllm")
ROOF = "roof"


@STEPS.register("machine")
def run(job: Job) -> None:
    """Tell what the machine is before anything is measured, then the roofs."""
    facts = machine.describe(job.device)
    if job.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        facts |= {"capability": f"sm_{device.major}{device.minor}", "gpu_memory_bytes": device.total_memory}
        facts |= {"cuda": torch.version.cuda, "multiprocessors": device.multi_processor_count}
    job.tell("machine", **facts)
    extension, reason = _cpp.load()
    job.tell("extension", ok=extension is not None, isa=extension.isa() if extension is not None else reason)
    job.tell("packages", **{name: _version(name) for name in PACKAGES})
    job.each([ROOF], 30, lambda name: job.tell(name, **roof(job)))


def roof(job: Job) -> dict[str, float]:
    """Return the roofs that the step has measured; measure them where it has not."""
    found = job.found("machine", ROOF)
    if found is not None and "flops_per_s" in found:
        return {key: found[key] for key in ("flops_per_s", "bytes_per_s")}
    return machine.roof(torch.bfloat16, job.device, quick=job.tiny)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
