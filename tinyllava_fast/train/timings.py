"""Seconds of a step on this machine, eager and compiled: measured by every run, kept for ``engine.compile: auto``.

compile.json in the user's cache folder, a few numbers for each kind of step:

    {"Intel(R) Xeon(R), 2 threads, torch 2.13.0+cpu, bfloat16, full frozen full, 41 layers, 3136 tokens, 2.3e+12 FLOPs":
        {"eager_s": 2.9, "compiled_s": 2.4, "compile_s": 71.0}}

The medians of the last run that had such steps; compile_s is what its compilation took, which is little where Inductor
still had the results.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from tinyllava_fast import hardware
from tinyllava_fast.files import write_file
from tinyllava_fast.log import log

WARMUP = 2  # first steps of a stage that don't count: memory is touched, graphs are made
FEWEST = 3  # steps that a median is taken of


def kind_of_step(device: torch.device, dtype: str, recipe: str, *, layers: int, tokens: int, flops: float) -> str:
    """The key of the file: steps of one kind take the same time. recipe: what trains, and how, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    machine = f"{name}{threads}, torch {torch.__version__}"
    return f"{machine}, {dtype}, {recipe}, {layers} layers, {tokens} tokens, {flops:.1e} FLOPs"


def read(kind: str) -> dict[str, float]:
    """Return the times of a kind of step: eager_s, compiled_s, compile_s, those that were measured."""
    return _read_all(_path()).get(kind, {})


def write(kind: str, seconds: Sequence[float], compile_s: float | None) -> None:
    """Keep the seconds of the steps of a stage, in order. compile_s: of compilation; None: the steps ran eagerly.

    Too few steps say nothing and are left out.
    """
    timed = list(seconds)[WARMUP:]
    if len(timed) < FEWEST:
        return
    median = statistics.median(timed)
    found = {"eager_s": median} if compile_s is None else {"compiled_s": median, "compile_s": compile_s}
    path = _path()
    known = _read_all(path)
    known[kind] = known.get(kind, {}) | found
    try:
        write_file(path, (json.dumps(known, indent=1) + "\n").encode())
    except OSError as error:  # no reason to lose a finished stage
        log.warning("the times of this stage are not kept for engine.compile: auto: %s", error)


def _path() -> Path:
    return hardware.cache_folder() / "compile.json"


def _read_all(path: Path) -> dict[str, dict[str, float]]:
    """The file; empty where it is missing or damaged, since it can be made again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {k: {n: float(s) for n, s in v.items()} for k, v in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
