"""Triton kernel of ops/adamw.py: a step of one weight in one pass over memory.

The norm that clipping needs is torch's: one call for the gradients of all weights (train/optim.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase

BLOCK = 1024
"""Elements of a program: 8 a thread, so that loads are wide."""
WARPS = 4


@triton.jit
def update(
    p, exp_avg, exp_avg_sq, weight, grad, scalars, size, lr, keep, grow1, beta2, grow2, eps,
    GRAD: tl.constexpr, ROUND: tl.constexpr, DITHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK elements; none if the factor, the first scalar, is nan. See ops/adamw.py for the dither."""
    factor = tl.load(scalars)
    if factor != factor:
        return
    correction1 = tl.load(scalars + 1)
    scale = tl.sqrt(tl.load(scalars + 2).to(tl.float32))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    x = tl.load(p + at, mask=inside, other=0.0)
    if GRAD:
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor.to(tl.float32)
    else:
        g = m * 0.0
    m = m + (g - m) * grow1
    v = v * beta2 + g * g * grow2
    rate = (lr / correction1).to(tl.float32)
    x = x * keep - rate * (m / (tl.sqrt(v) / scale + eps))
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(p + at, x, mask=inside)
    if DITHER:
        hashed = at.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)
        hashed = (hashed ^ (hashed >> 15)) * tl.full([], 0x85EBCA77, tl.uint32)
        bits = x.to(tl.uint32, bitcast=True) + (hashed >> 16)
        half = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(weight + at, half, mask=inside)
    elif ROUND:
        tl.store(weight + at, x.to(weight.dtype.element_ty), mask=inside)


def adamw(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    scalars: Tensor,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """See ops/adamw.py; p, its moments and weight are contiguous."""
    if p.numel() == 0:
        return
    grad = None if grad is None else grad.contiguous()
    with torch.cuda.device_of(p):
        update[(triton.cdiv(p.numel(), BLOCK),)](
            *(p, exp_avg, exp_avg_sq, p if weight is None else weight, p if grad is None else grad, scalars),
            *(p.numel(), lr, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps),
            **_constants(None if weight is None else weight.dtype, grad is not None),
            num_warps=WARPS,
            **LAUNCH,
        )


def _constants(weight: torch.dtype | None, has_grad: bool) -> dict[str, bool | int]:
    return {"GRAD": has_grad, "ROUND": weight is not None, "DITHER": weight == torch.bfloat16, "BLOCK": BLOCK}


def compile_cases() -> Iterator[CompileCase]:
    """Weights and gradients as training has them."""
    fixed = dict.fromkeys(("p", "exp_avg", "exp_avg_sq"), "*fp32") | {"scalars": "*fp64", "size": "i32:16"}
    fixed |= dict.fromkeys(("lr", "keep", "grow1", "beta2", "grow2", "eps"), "fp32")
    for weight, grad in (
        (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
        (None, torch.float32),
    ):  # fmt: skip
        kind = TRITON_TYPES[weight or torch.float32]
        types = {**fixed, "weight": f"*{kind}", "grad": f"*{TRITON_TYPES[grad]}"}
        shape = f"{'no' if weight is None else kind} weight, {TRITON_TYPES[grad]} gradient"
        yield CompileCase("update", shape, update, types, _constants(weight, True), WARPS, 3, False)
