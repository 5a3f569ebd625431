"""What the Triton kernels share: launch settings, and how a kernel tells the offline compiler about itself.

The kernels of ``tinyllava_fast/ops/<file>.py`` lie in ``kernels/<file>.py``: a launcher named like each op
(``splice_fwd``, ``splice_bwd``) that takes and returns what the torch reference does, with no autograd, no fallback and
no policy. ``define_op`` finds it by name and uses it for CUDA tensors; under TRITON_INTERPRET=1 it takes CPU tensors.
No ``@triton.autotune``: it stalls the first call, and ranks may disagree. No GPU has measured the settings: they are
chosen so that nothing spills and shared memory fits, from what ptxas says of the offline compilation.

Every kernel file has ``compile_cases()``; `tlf-bench triton` compiles them without a GPU and reads their registers,
spills, shared memory and tensor-core instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}
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
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    has_dot: bool


def power_of_2(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, kept in low..high (powers of two themselves)."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


@dataclass(frozen=True)
class Launch:
    """Rows and columns of a block, warps of a program, stages of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """The compile-time arguments of a launch."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n}

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return {**self.blocks(), "num_warps": self.warps, "num_stages": self.stages, **LAUNCH}


# fwd and dq: rows of queries x columns of keys. dkv: rows of queries x rows of keys that a program owns. Keyed by
# (head size up to, "half" | "float"). One table serves sm_80 and everything later: registers bind before shared memory
# does, every setting fits the 99 KB of sm_86, and larger blocks spill on sm_80 (docs/LOG.md).
ATTENTION: dict[tuple[int, str], dict[str, Launch]] = {
    (64, "half"): {"fwd": Launch(128, 64, 8, 3), "dq": Launch(128, 64, 8, 3), "dkv": Launch(32, 128, 8, 3)},
    (128, "half"): {"fwd": Launch(64, 64, 8, 3), "dq": Launch(64, 64, 8, 2), "dkv": Launch(32, 64, 8, 2)},
    (256, "half"): {"fwd": Launch(64, 32, 8, 2), "dq": Launch(32, 32, 8, 2), "dkv": Launch(32, 32, 8, 2)},
    (64, "float"): {"fwd": Launch(64, 32, 8, 2), "dq": Launch(32, 32, 8, 2), "dkv": Launch(32, 32, 8, 2)},
    (128, "float"): {"fwd": Launch(16, 32, 8, 2), "dq": Launch(32, 16, 8, 2), "dkv": Launch(32, 32, 8, 2)},
    (256, "float"): {"fwd": Launch(16, 16, 8, 1), "dq": Launch(16, 16, 8, 1), "dkv": Launch(16, 16, 8, 1)},
}
_INTERPRETED = {"fwd": Launch(32, 16, 1, 1), "dq": Launch(32, 16, 1, 1), "dkv": Launch(16, 32, 1, 1)}


def attention_launch(device: str, head_dim: int, dtype: torch.dtype) -> dict[str, Launch]:
    """Settings of the attention kernels: fwd, dq, dkv, and decode, the forward kernel over few rows a segment.

    device: its type. On a CPU, that is in the interpreter, blocks are small enough that tests cross them.
    """
    table = _INTERPRETED
    if device != "cpu":
        bucket = next(size for size in (64, 128, 256) if head_dim <= size)
        table = ATTENTION[bucket, "float" if dtype == torch.float32 else "half"]
    return {**table, "decode": Launch(16, table["fwd"].n, 4, table["fwd"].stages)}
