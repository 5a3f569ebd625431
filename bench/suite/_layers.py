"""A step's linear layers of one shape in a row, over as many weights as no cache holds, dense or in int8."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import FORWARD, Case, Setting, Work, nbytes, pack_of
from tinyllava_fast.ops import quantize_int8
from tinyllava_fast.ops.decode_linear import Int8, in_huge_pages
from tinyllava_fast.ops.linear import dense_weight


def layers_case(
    op: str,
    setting: Setting,
    layer: Callable[[Tensor, Tensor | Int8], Tensor],
    *,
    rows: int,
    outputs: int,
    layers: int,
    int8: bool,
    join: Callable[[list[Tensor]], Tensor] = itemgetter(-1),
) -> Case:
    """Return the case of so many rows times so many weights, each by ``layer``; join makes one tensor of them."""
    count, width = (2 if setting.quick else layers), pack_of(setting).width
    x = setting.randn(rows, width, grad=False)
    weights = [setting.randn(outputs, width, grad=False) for _ in range(count)]
    held: list[Tensor | Int8] = [in_huge_pages(w) for w in weights]
    size = nbytes(*weights)
    if int8:
        quantized = [quantize_int8(w) for w in weights]
        held = [q._replace(values=in_huge_pages(q.values)) for q in quantized]
        weights = [dense_weight(q, x.dtype) for q in quantized]
        size = sum(nbytes(*q) for q in quantized)
    run = {
        "torch": lambda: join([functional.linear(x, w) for w in weights]),
        "ours": lambda: join([layer(x, w) for w in held]),
    }
    work = {FORWARD: Work(2.0 * rows * width * outputs * count, size + nbytes(x) * (1 + count * outputs / width))}
    label = f"N={rows} K={width} O={outputs}{' int8' if int8 else ''}, {count} layers"
    return Case(op, label, run, work)
