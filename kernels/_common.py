"""What the Triton kernels share: launch options, and how a kernel tells the offline compiler about itself.

The kernels of ``tinyllava_fast/ops/<file>.py`` lie in ``kernels/<file>.py``: a launcher named like each op
(``splice_fwd``, ``splice_bwd``) that takes and returns what the torch reference does, with no autograd, no fallback and
no policy. ``define_op`` finds it by name and uses it for CUDA tensors. Under TRITON_INTERPRET=1 it takes CPU tensors:
tests/kernels compares it with the reference on every sample. No ``@triton.autotune``: it stalls the first call, and
ranks may disagree.

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
