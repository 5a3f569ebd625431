"""decode_linear: the linear layers of token-by-token decoding, over as many weights as no cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Run, Setting, Work, nbytes, pack_of
from tinyllava_fast.ops import linear, quantize_int8
from tinyllava_fast.ops.decode_linear import in_huge_pages
from tinyllava_fast.ops.linear import dense_weight

LAYERS = 64


@SUITE.register("decode_linear")
def cases(setting: Setting) -> Iterator[Case]:
    """The first projection of SmolLM2-135M's MLP for one row and for sixteen, weights in the run's dtype and int8."""
    for rows in (3,) if setting.quick else (1, 16):
        yield _case(setting, rows, int8=False)
        yield _case(setting, rows, int8=True)


def _case(setting: Setting, rows: int, *, int8: bool) -> Case:
    count, width = (2 if setting.quick else LAYERS), pack_of(setting).width
    outputs = width * 8 // 3
    x = setting.randn(rows, width, grad=False)
    weights = [setting.randn(outputs, width, grad=False) for _ in range(count)]
    held: list[Any] = [in_huge_pages(w) for w in weights]
    if int8:
        quantized = [quantize_int8(w) for w in weights]
        held = [q._replace(values=in_huge_pages(q.values)) for q in quantized]
        weights = [dense_weight(q, x.dtype) for q in quantized]
    size = sum(nbytes(w.values, w.scale) if int8 else nbytes(w) for w in held)

    def plain() -> Tensor:
        return torch.cat([functional.linear(x, w) for w in weights])

    run: dict[str, Run] = {"torch": plain, "ours": lambda: torch.cat([linear(x, w) for w in held])}
    work = {FORWARD: Work(2.0 * rows * width * outputs * count, size + nbytes(x) * (1 + count * outputs / width))}
    label = f"N={rows} K={width} O={outputs}{' int8' if int8 else ''}, {count} layers"
    return Case("decode_linear", label, run, work)
