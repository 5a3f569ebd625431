"""Cases of lora_linear for the tests of every op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops._op import Sample
from tinyllava_fast.ops.nf4 import random_nf4


def samples() -> Iterator[Sample]:
    """Dense and NF4 weights, with and without dropout, ragged shapes, one row and none."""
    g = torch.Generator().manual_seed(0)

    def case(
        label: str, n: int, o: int, k: int, r: int, *, p: float = 0.0, nf4: bool = False, bias: bool = True
    ) -> Sample:
        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g)

        x = randn(k, n).t() if n % 2 else randn(n, k)
        packed, absmax, _, _, blocksize = random_nf4(g, o, k, 64)
        base = (None, packed, absmax, blocksize) if nf4 else (randn(o, k), None, None, 0)
        args = (x, *base, randn(o) if bias else None, randn(r, k), randn(o, r), 0.5, p, torch.tensor((5 << 32) + n))
        return Sample(args, label, kept=(3,) if nf4 else ())

    yield case("dense", 12, 20, 33, 4)
    yield case("dense, dropout", 23, 17, 70, 8, p=0.3)
    yield case("no bias, more than one part", 530, 6, 5, 2, p=0.1, bias=False)
    yield case("nf4", 13, 10, 64, 4, nf4=True)
    yield case("nf4, dropout, ragged", 11, 9, 48, 3, p=0.5, nf4=True, bias=False)
    yield case("one row", 1, 24, 40, 16, p=0.2)
    yield case("nf4, one row", 1, 24, 64, 16, nf4=True)
    yield case("no row", 0, 8, 16, 2, p=0.2)
