"""The plan of `tlf-bench gpu`, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.bench.settings import Settings, option
from tinyllava_fast.errors import UserError

PLAN: dict[str, tuple[float, bool, str]] = {  # most seconds, whether times are measured, what it tells
    "machine": (40, True, "what the GPU is, its measured roofs, and whether the C++ extension loads"),
    "kernels": (
        90,
        False,
        "every Triton kernel against float64, forward and backward, in three dtypes, real shapes",
    ),
    "opcheck": (60, False, "torch's own checks of every op on the GPU"),
    "parity": (90, False, "losses of a seeded model against a plain float32 loop over transformers"),
    "train": (110, True, "20 steps: eager, compiled and with CUDA graphs, against HF Trainer in its faster forms"),
    "infer": (60, True, "prefill and decoding of 1, 8 and 64 sequences against transformers"),
    "mfu": (100, True, "share of the GEMM peak, and memory, of three models under four recipes"),
    "ops": (80, True, "every op against what else computes the same, as a share of the roof"),
    "engines": (50, True, "fsdp and ZeRO-2 in one process"),
    "profile": (40, True, "the operators of a training step by their time, and how often it waits for the GPU"),
    "tune": (90, True, "launch settings of the attention kernels"),
}
"""In order of worth."""


@dataclass(frozen=True, kw_only=True)
class GpuSettings(Settings):
    """The settings of `tlf-bench gpu`."""

    minutes: float = option(8.0, "that all steps may take together", parse=float)
    steps: tuple[str, ...] = option((), "only this step; repeat", flag="--step", parse=str, names=PLAN)
    dry_run: bool = option(False, "walk the plan on a CPU, with tiny shapes; its numbers mean nothing")
    out: Path | None = option(  # noqa: RUF009 a dataclass field
        None, "folder of the results (default: a new one under runs/)", metavar="DIR", parse=Path
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.minutes <= 24 * 60:
            raise UserError(f"--minutes {self.minutes:g}: more than 0, and at most a day")
