"""The abilities of this machine: its measured GEMM peak per dtype, copy bandwidth, and what it is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TypedDict

import torch
import transformers

from tinyllava_fast import hardware
from tinyllava_fast.bench import report
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.timing import Timer, interleave
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import _cpp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Rates(TypedDict):
    """The measured GEMM of one dtype."""

    flops_per_s: float  # of the best shape
    by_shape: dict[str, float]


def gemm_peak(dtype: torch.dtype, device: str = "cpu", *, quick: bool = False) -> Rates:
    """Return the FLOP/s of the dtype's GEMM. quick: of a tiny one."""
    shapes, rounds, seconds = (((64, 64, 64),), 2, 0.0) if quick else (None, 7, 0.1)
    rates = hardware.gemm_rates(dtype, device, shapes=shapes, rounds=rounds, min_seconds=seconds)
    return {"flops_per_s": max(rates.values()), "by_shape": rates}


def copy_bandwidth(device: str = "cpu", *, quick: bool = False) -> float:
    """Return the bytes per second of a large tensor copy, read and write counted. quick: of a small one."""
    count, rounds = (2**18, 2) if quick else (2**26, 7)
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)  # zeros travel faster
    copy = {"copy": lambda: target.copy_(source)}
    series = interleave(copy, rounds=rounds, warmup=2, min_seconds=0.05, timer=device_timer(device))
    return 2 * 4 * count / series["copy"].median


def read_bandwidth(device: str = "cpu", *, quick: bool = False) -> float:
    """Return the bytes per second at which a large tensor is read once. quick: a small one."""
    count, rounds = (2**18, 2) if quick else (2**26, 7)
    source = torch.ones(count, device=device)
    series = interleave({"read": source.amax}, rounds=rounds, warmup=2, min_seconds=0.05, timer=device_timer(device))
    return 4 * count / series["read"].median


def device_sync(device: str) -> Callable[[], None] | None:
    """Return the function that waits for the device's queue, or None where calls are synchronous."""
    return torch.cuda.synchronize if device.startswith("cuda") else None


def device_peak(device: str) -> Callable[[], int]:
    """Return the function that tells the most bytes of tensors on the device since its last call; 0 on a CPU."""

    def peak() -> int:
        bytes_ = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return bytes_

    return peak if device.startswith("cuda") else lambda: 0


def device_timer(device: str) -> Timer | None:
    """Return what times repeated calls by the GPU's own events, or None where the host's clock does."""

    def timed(run: Callable[[], object], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    return timed if device.startswith("cuda") else None


def pick_device(name: str) -> str:
    """Return cuda for "auto" where there is one, else cpu; any other name as it is."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def check_device(device: str) -> None:
    """Raise UserError for a device that the command cannot measure here."""
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {device}: there is no such device here; known: cpu, and cuda where there is a GPU")


def describe(device: str = "cpu") -> dict[str, object]:
    """Return the facts without measurement: CPU, cores, instruction sets, versions, GPU if any."""
    extension, reason = _cpp.load()
    return {
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def roof(dtype: torch.dtype, device: str = "cpu", *, quick: bool = False) -> dict[str, float]:
    """Return the two roofs: flops_per_s of the dtype's GEMM and bytes_per_s of a copy. quick: see measure()."""
    peak = gemm_peak(dtype, device, quick=quick)["flops_per_s"]
    return {"flops_per_s": peak, "bytes_per_s": copy_bandwidth(device, quick=quick)}


def measure(device: str = "cpu", *, quick: bool = False) -> Report:
    """Return the whole report: describe() plus gemm {dtype: Rates} and copy_bytes_per_s.

    quick: tiny shapes and few rounds, for tests of the command; its numbers mean nothing.
    """
    gemm = {name: gemm_peak(dtype, device, quick=quick) for name, dtype in DTYPES.items()}
    return {**describe(device), "gemm": gemm, "copy_bytes_per_s": copy_bandwidth(device, quick=quick)}


def show(result: Report) -> None:
    """Print the report as a table."""
    rows = [[k, str(v)] for k, v in result.items() if k not in ("gemm", "copy_bytes_per_s")]
    rows += [[f"GEMM {k}", report.quantity(v["flops_per_s"], "FLOP/s")] for k, v in result["gemm"].items()]
    rows.append(["copy", report.quantity(result["copy_bytes_per_s"], "B/s")])
    report.show("This machine", ["", "value"], rows)
