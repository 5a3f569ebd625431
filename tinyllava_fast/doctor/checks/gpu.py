"""A GPU: that torch sees what the driver has, and has code for it. The check of kernels runs Triton on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok

DRIVER = Path("/proc/driver/nvidia/version")


@CHECKS.register("gpu")
def gpu() -> Iterator[Finding]:
    """Driver, torch's build, capability, memory, Triton."""
    driver = driver_version()
    if not torch.cuda.is_available():
        if driver is None:
            yield ok("no NVIDIA driver: everything runs on the CPU")
        elif torch.version.cuda is None:
            yield fault(
                f"there is an NVIDIA driver ({driver}), and torch is built for CPUs",
                "pip install --force-reinstall torch, of the index that has builds for CUDA",
            )
        else:
            yield fault(
                f"torch for CUDA {torch.version.cuda} finds no GPU under the NVIDIA driver {driver}",
                "nvidia-smi shows whether the driver works; upgrade it if its CUDA is older; unset "
                "CUDA_VISIBLE_DEVICES; in a container ask for the GPUs (docker run --gpus all)",
            )
        return
    known = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        said = (
            f"GPU {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        )
        if not any(arch.startswith((f"sm_{facts.major}", f"compute_{facts.major}")) for arch in known):
            yield fault(f"{said}; torch has no code for it ({', '.join(known)})", "install a torch built for it")
        else:
            yield ok(f"{said}, driver {driver}, CUDA {torch.version.cuda}")
        if facts.major < 8:
            yield note(f"GPU {index} has no bfloat16", "train with engine.dtype=float16 or float32")
    if find_spec("triton") is None:
        yield fault("triton is not installed: ops run as plain torch on the GPU", "pip install triton")


def driver_version() -> str | None:
    """Return the version of NVIDIA's kernel driver; None without one."""
    try:
        text = DRIVER.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else "unknown"
