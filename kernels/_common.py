"""The parts that the Triton kernels share: launch settings, and a kernel's description for the offline compiler.

The kernels of ``tinyllava_fast/ops/<file>.py`` lie in ``kernels/<file>.py``: a launcher named like each op
(``splice_fwd``, ``splice_bwd``) that takes and returns what the torch reference does, with no autograd, no fallback and
no policy. ``define_op`` finds it by name and uses it for CUDA tensors; under TRITON_INTERPRET=1 it takes CPU tensors.
No ``@triton.autotune``: it stalls the first call, and ranks may disagree. No GPU has measured the settings: they are
chosen so that nothing spills and shared memory fits, from what ptxas says of the offline compilation.

Every kernel file has ``compile_cases()``; `tlf-bench triton` compiles them without a GPU and reads their registers,
spills, shared memory and tensor-core instructions.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch. Fused multiply-adds by name: the default differs between triton versions."""

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class CompileCase:
    """A kernel with the types and constants of one real launch.

    signature: {argument: type} of every argument that is not a constant, in Triton's words ("*bf16", "i32", "fp32").
    Pointers count as aligned to 16 bytes, as torch's are; "i64:16" says that an integer is a multiple of 16, which
    Triton finds out at a launch. shape: what the constants stand for, for people. has_dot: whether it must use tensor
    cores.
    """

    name: str
    shape: str
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    has_dot: bool


def power_of_2(n: int, low: int, high: int) -> int:
    """Return the smallest power of two that is at least n, kept in low..high (powers of two themselves)."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


@dataclass(frozen=True)
class Launch:
    """Rows and columns of a block, warps of a program, stages of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """Return the compile-time arguments of a launch."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n}

    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**self.blocks(), "num_warps": self.warps, "num_stages": self.stages, **LAUNCH}


TABLE = Path(__file__).with_name("launch.json")
"""{family: {architecture: {bucket: {part: settings}}}}; `tlf-bench ops --tune` rewrites it on a GPU.

An architecture's entry serves it and everything later, up to the next entry. attention: a bucket is the largest head
size and the kind of number ("64 half"); fwd and dq are rows of queries x columns of keys, dkv rows of queries x the
rows of keys that a program owns. The settings of sm_80 were chosen offline: registers bind before shared memory does,
every one fits the 99 KB of sm_86, and larger blocks spill (docs/LOG.md).
"""
BUCKETS = (64, 128, 256)  # head sizes up to


def read_table(path: Path = TABLE) -> dict[str, dict[str, dict[str, dict[str, Launch]]]]:
    """Return the launch table, architectures ascending."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return {
        family: {
            arch: {
                bucket: {part: Launch(**settings) for part, settings in parts.items()}
                for bucket, parts in archs[arch].items()
            }
            for arch in sorted(archs, key=arch_number)
        }
        for family, archs in raw.items()
    }


def arch_number(arch: str) -> int:
    """Return 80 of "sm_80"."""
    return int(arch.removeprefix("sm_"))


_TABLE = read_table()
_INTERPRETED = {"fwd": Launch(32, 16, 1, 1), "dq": Launch(32, 16, 1, 1), "dkv": Launch(16, 32, 1, 1)}
_targets: list[str] = []
_tried: list[dict[str, Launch]] = []


def bucket_of(head_dim: int, dtype: torch.dtype) -> str:
    """Return the key of the attention table for a head size of up to 256."""
    size = next(size for size in BUCKETS if head_dim <= size)
    return f"{size} {'float' if dtype == torch.float32 else 'half'}"


def attention_launch(device: str, head_dim: int, dtype: torch.dtype) -> dict[str, Launch]:
    """Return settings of the attention kernels: fwd, dq, dkv, and decode, the forward kernel over few rows a segment.

    device: its type. On a CPU, that is in the interpreter, blocks are small enough that tests cross them.
    """
    table = _INTERPRETED
    if device != "cpu":
        archs = _TABLE["attention"]
        wanted = arch_number(_targets[-1] if _targets else device_arch())
        fitting = [a for a in archs if arch_number(a) <= wanted] or list(archs)[:1]
        table = archs[fitting[-1]][bucket_of(head_dim, dtype)]
    if _tried:
        table = {**table, **_tried[-1]}
    return {**table, "decode": Launch(16, table["fwd"].n, 4, table["fwd"].stages)}


@functools.cache
def device_arch() -> str:
    """Return the architecture of the first GPU, the table's first one where there is none."""
    if not torch.cuda.is_available():
        return next(iter(_TABLE["attention"]))
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{10 * major + minor}"


@contextlib.contextmanager
def launches_of(arch: str) -> Iterator[None]:
    """Inside the block, launch settings are those of that architecture: for compiling without a GPU."""
    _targets.append(arch)
    try:
        yield
    finally:
        _targets.pop()


@contextlib.contextmanager
def trying(parts: dict[str, Launch]) -> Iterator[None]:
    """Inside the block, these parts (fwd, dq, dkv) of the attention kernels replace the table's: for tuning."""
    _tried.append(parts)
    try:
        yield
    finally:
        _tried.pop()
