"""The next token of each row of logits, greedy or drawn, without a word to the host.

    w[j]  = exp((x[j] - max x) / t)         0 where w[j] < min_p (largest w)
    y     = the first j with  w[0] + ... + w[j] > point (w[0] + ... + w[V - 1])        t > 0
    y     = the first j with  x[j] = max x                                             t = 0
    y     = -1                              where some x[j] is nan or infinite, but for -inf: a token that may not come

``point`` is the draw's one random number, so a token is a function of its logits and of that number, on every device.
Sums are float64: that of 49k small weights has to end where its last one lies. Not differentiable.
Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op
from tinyllava_fast.ops.row_argmax import row_argmax

OP = "draw_tokens"


def _check(x: Tensor, temperature: Tensor, min_p: Tensor, point: Tensor) -> None:
    expect(OP, "x", x, "R V", FLOATS)
    if x.shape[1] == 0:
        raise ValueError(f"{OP}: x has no columns, so there is no token to draw")
    for name, numbers in (("temperature", temperature), ("min_p", min_p), ("point", point)):
        expect(OP, name, numbers, "R", (torch.float64,), like=x)
        if len(numbers) != len(x):
            raise ValueError(f"{OP}: {name} has {len(numbers)} entries for {len(x)} rows")


def _run_cpp(x: Tensor, temperature: Tensor, min_p: Tensor, point: Tensor) -> Tensor:
    """Greedy rows in C++; of the others the reference."""
    drawn = temperature > 0
    found = row_argmax.infer(x)
    bad = ~torch.isfinite(x.sum(1, dtype=torch.float32))  # else every number is one
    rows = (drawn | bad).nonzero()[:, 0]
    if len(rows):
        found[rows] = draw_tokens.reference(x[rows], temperature[rows], min_p[rows], point[rows])
    return found


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, x: Tensor, temperature: float, min_p: float = 0.0) -> Sample:
        rows = len(x)
        settings = torch.full((rows,), temperature, dtype=torch.float64), torch.full((rows,), min_p).double()
        if temperature and rows > 1:
            settings[0][1] = 0
        # far from the borders of small vocabularies: rounding must not choose another token
        point = (torch.arange(rows).double() + 0.37) / max(rows, 1)
        return Sample((x, *settings, point), label, differentiable=False, kept=(1, 2, 3))

    yield case("greedy", torch.randn(4, 1500, generator=g), 0.0)
    yield case("drawn", torch.randint(-2, 2, (5, 37), generator=g).float(), 0.8)
    yield case("likely ones", torch.randint(0, 6, (3, 41), generator=g).float(), 1.5, 0.3)
    barred = torch.zeros(3, 2060)
    barred[:, 7:2051] = -torch.inf
    yield case("barred tokens", barred, 1.0)
    yield case("barred tokens, greedy", barred - 1, 0.0)
    yield case("one token", torch.zeros(2, 1), 1.0)
    yield case("no row", torch.zeros(0, 5), 1.0)
    strange = torch.zeros(4, 1100)
    strange[0, 1090], strange[1, 30] = torch.nan, torch.inf
    strange[3] = -torch.inf
    yield case("no numbers", strange, 1.0)
    yield case("strided", torch.randint(0, 3, (31, 6), generator=g).float().t(), 1.0)


@define_op(
    module=OP,
    check=_check,
    fake=lambda x, *_: x.new_empty(x.shape[0], dtype=torch.int64),
    cpp=_run_cpp,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples,
)
def draw_tokens(x: Tensor, temperature: Tensor, min_p: Tensor, point: Tensor) -> Tensor:
    """x [R, V >= 1] float; temperature, min_p, point (in 0..1) [R] float64 -> [R] int64."""
    wide = x.double()
    top, greedy = wide.max(1, keepdim=True).values, wide.argmax(1)
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    weight = ((wide - top) / heat).exp()
    weight = torch.where(weight >= min_p[:, None], weight, 0.0)
    total = weight.cumsum(1)
    reached = (total <= point[:, None] * total[:, -1:]).sum(1)
    last = torch.where(weight > 0, torch.arange(x.shape[1], device=x.device), -1).amax(1)
    found = torch.where(temperature > 0, torch.minimum(reached, last), greedy)
    return torch.where(top[:, 0].isfinite() & ~wide.isnan().any(1), found, -1)
