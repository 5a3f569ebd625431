"""What this machine can do: measured GEMM peak per dtype, copy bandwidth, and what it is.

The peak is measured, not read from a data sheet: it is the roof that MFU divides by, so it must be what torch's own
GEMM reaches here today.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from tinyllava_fast import hardware
from tinyllava_fast.bench.timing import interleave
from tinyllava_fast.ops import _cpp

# (m, k, n): a large square, and a decoder's own widths (SmolLM2-135M: 3072 tokens through up and down)
GEMM_SHAPES = ((2048, 2048, 2048), (3072, 576, 1536), (3072, 1536, 576))
CUDA_GEMM_SHAPES = ((8192, 8192, 8192), (16384, 4096, 4096))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gemm_peak(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    rounds: int = 7,
    min_seconds: float = 0.1,
) -> dict[str, Any]:
    """Best sustained GEMM rate in FLOP/s of torch.mm over the shapes (median of the rounds of each).

    Returns flops_per_s (the best), and by_shape {"m x k x n": FLOP/s}.
    """
    if shapes is None:
        shapes = CUDA_GEMM_SHAPES if device.startswith("cuda") else GEMM_SHAPES
    generator = torch.Generator().manual_seed(0)
    runs: dict[str, Callable[[], Any]] = {}
    work: dict[str, int] = {}
    for m, k, n in shapes:
        left = torch.randn(m, k, generator=generator).to(device, dtype)
        right = torch.randn(n, k, generator=generator).to(device, dtype)  # [N, K]: the layout of nn.Linear
        out = torch.empty(m, n, device=device, dtype=dtype)
        name = f"{m}x{k}x{n}"
        runs[name] = lambda left=left, right=right, out=out: torch.mm(left, right.t(), out=out)  # type: ignore[misc]
        work[name] = 2 * m * k * n
    series = interleave(runs, rounds=rounds, warmup=2, min_seconds=min_seconds, sync=device_sync(device))
    by_shape = {name: work[name] / s.median for name, s in series.items()}
    return {"flops_per_s": max(by_shape.values()), "by_shape": by_shape}


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
    """What waits for the device's queue, or None where calls are synchronous."""
    return torch.cuda.synchronize if device.startswith("cuda") else None


def pick_device(name: str) -> str:
    """ "auto" as cuda where there is one, else cpu; any other name as it is."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


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
    gemm = gemm_peak(dtype, device, shapes=shapes, rounds=rounds, min_seconds=seconds)
    bandwidth = copy_bandwidth(device, megabytes=megabytes, rounds=rounds)
    return {"flops_per_s": gemm["flops_per_s"], "bytes_per_s": bandwidth}


def measure(device: str = "cpu", *, quick: bool = False) -> dict[str, Any]:
    """The whole report: describe() plus gemm {dtype: {flops_per_s, by_shape}} and copy_bytes_per_s.

    quick: tiny shapes and few rounds, for tests of the command; its numbers mean nothing.
    """
    shapes = ((64, 64, 64),) if quick else None
    rounds, seconds = (2, 0.0) if quick else (7, 0.1)
    gemm = {
        name: gemm_peak(dtype, device, shapes=shapes, rounds=rounds, min_seconds=seconds)
        for name, dtype in DTYPES.items()
    }
    bandwidth = copy_bandwidth(device, megabytes=1 if quick else 256, rounds=rounds)
    return {**describe(device), "gemm": gemm, "copy_bytes_per_s": bandwidth}
