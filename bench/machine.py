"""The abilities of this machine: measured GEMM peak per dtype, copy bandwidth, and what it is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tinyllava_fast import hardware
from tinyllava_fast.bench.timing import interleave
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import _cpp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def copy_bandwidth(device: str = "cpu", *, megabytes: int = 256, rounds: int = 5) -> float:
    """Bytes per second of a large tensor copy, read and write counted."""
    count = megabytes * 2**20 // 4
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    series = interleave(
        {"copy": lambda: target.copy_(source)},
        rounds=rounds,
        warmup=2,
        min_seconds=0.05,
        sync=device_sync(device),
    )
    return 2 * 4 * count / series["copy"].median


def device_sync(device: str) -> Callable[[], None] | None:
    """Return the function that waits for the device's queue, or None where calls are synchronous."""
    return torch.cuda.synchronize if device.startswith("cuda") else None


def pick_device(name: str) -> str:
    """ "auto" as cuda where there is one, else cpu; any other name as it is."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def check_device(device: str) -> None:
    """Raise UserError for a device that the command cannot measure here."""
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {device}: there is no such device here; known: cpu, and cuda where there is a GPU")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Facts without measurement: CPU, cores, instruction sets, versions, GPU if any."""
    extension, reason = _cpp.load()
    facts: dict[str, Any] = {
        "device": device,
        "cpu": hardware.processor(),
        "cores": hardware.cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": hardware.total_memory_bytes(),
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "isa_tlf": extension.isa() if extension is not None else reason,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": None,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def roof(dtype: torch.dtype, device: str = "cpu", *, quick: bool = False) -> dict[str, float]:
    """The two roofs of this machine: flops_per_s of the dtype's GEMM and bytes_per_s of a copy, both measured.

    quick: see measure().
    """
    shapes, rounds, seconds, megabytes = (((64, 64, 64),), 2, 0.0, 1) if quick else (None, 5, 0.05, 256)
    rates = hardware.gemm_rates(dtype, device, shapes=shapes, rounds=rounds, min_seconds=seconds)
    bandwidth = copy_bandwidth(device, megabytes=megabytes, rounds=rounds)
    return {"flops_per_s": max(rates.values()), "bytes_per_s": bandwidth}


def measure(device: str = "cpu", *, quick: bool = False) -> dict[str, Any]:
    """The whole report: describe() plus gemm {dtype: {flops_per_s, by_shape}} and copy_bytes_per_s.

    quick: tiny shapes and few rounds, for tests of the command; its numbers mean nothing.
    """
    shapes = ((64, 64, 64),) if quick else None
    rounds, seconds = (2, 0.0) if quick else (7, 0.1)
    gemm = {}
    for name, dtype in DTYPES.items():
        rates = hardware.gemm_rates(dtype, device, shapes=shapes, rounds=rounds, min_seconds=seconds)
        gemm[name] = {"flops_per_s": max(rates.values()), "by_shape": rates}
    bandwidth = copy_bandwidth(device, megabytes=1 if quick else 256, rounds=rounds)
    return {**describe(device), "gemm": gemm, "copy_bytes_per_s": bandwidth}
