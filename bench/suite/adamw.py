"""adamw: the update of one bfloat16 weight with its norm, the embedding's and a projection's size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Setting, Work, nbytes
from tinyllava_fast.ops.adamw import adamw, square_sum, step_scalars

LR, BETAS, EPS, CLIP = 1e-6, (0.9, 0.95), 1e-8, 1.0  # a rate at which calls differ in how often they ran, not in p


@SUITE.register("adamw")
def cases(setting: Setting) -> Iterator[Case]:
    """SmolLM2-135M's embedding and the gate of one of its layers."""
    for rows in (11,) if setting.quick else (49152, 1536):
        yield _case(setting, rows, 576)


def _case(setting: Setting, *shape: int) -> Case:
    start, grad = setting.randn(*shape, grad=False).float(), setting.randn(*shape, grad=False)

    def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return start.clone(), torch.zeros_like(start), torch.zeros_like(start), start.bfloat16()

    state, steps = made(), [0]

    def ours() -> Tensor:
        steps[0] += 1
        factor = 1.0 / torch.clamp((square_sum.infer(grad).sqrt() + 1e-6) / CLIP, min=1.0)
        adamw.infer(*state, grad, step_scalars(factor, BETAS, steps[0]), LR, 0.0, *BETAS, EPS)
        return state[0]

    p, _, _, weight = made()
    optimizer = torch.optim.AdamW([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    def theirs() -> Tensor:
        p.grad = torch.empty_like(p).copy_(grad)
        norm = torch.nn.utils.get_total_norm([p.grad], foreach=True)
        optimizer.grad_scale = torch.clamp((norm + 1e-6) / CLIP, min=1.0)  # type: ignore[attr-defined]
        optimizer.step()
        weight.copy_(p)
        return p

    label = f"{shape[0]}x{shape[1]}"
    least = 2 * nbytes(grad) + 2 * nbytes(*state[:3]) + nbytes(weight)  # the norm must be known before the update
    return Case("adamw", label, {"torch, four passes": theirs, "ours": ours}, {FORWARD: Work(0.0, least)})
