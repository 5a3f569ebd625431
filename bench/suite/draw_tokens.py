"""draw_tokens: the drawn tokens of sequences that answer together, vocabulary of SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Setting, Work, nbytes
from tinyllava_fast.ops.draw_tokens import draw_tokens

VOCABULARY = 49152


@SUITE.register("draw_tokens")
def cases(setting: Setting) -> Iterator[Case]:
    """One sequence, and as many as answer together."""
    for count in (3,) if setting.quick else (1, 32):
        yield _case(setting, setting.randn(count, 1000 if setting.quick else VOCABULARY, grad=False))


def _case(setting: Setting, x: Tensor) -> Case:
    point = (torch.arange(len(x), dtype=torch.float64, device=x.device) + 0.5) / len(x)
    heat, none = torch.ones_like(point), torch.zeros_like(point)

    def plain() -> Tensor:
        total = x.double().softmax(1).cumsum(1)
        return (total <= point[:, None]).sum(1)

    run = {"torch": plain, **setting.compiled("torch compiled", plain)}
    run["ours"] = lambda: draw_tokens.infer(x, heat, none, point)
    return Case("draw_tokens", f"R={len(x)} V={x.shape[1]}", run, {FORWARD: Work(4.0 * x.numel(), nbytes(x))})
