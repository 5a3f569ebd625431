"""row_argmax: the greedy tokens of sequences that answer together, vocabulary of SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Setting, Work, nbytes
from tinyllava_fast.ops.row_argmax import row_argmax

VOCABULARY = 49152


@SUITE.register("row_argmax")
def cases(setting: Setting) -> Iterator[Case]:
    """One sequence, and as many as answer together."""
    for count in (3,) if setting.quick else (1, 32):
        yield _case(setting, setting.randn(count, 1000 if setting.quick else VOCABULARY, grad=False))


def _case(setting: Setting, x: Tensor) -> Case:
    def plain() -> Tensor:
        return x.argmax(-1)

    run = {"torch": plain, **setting.compiled("torch compiled", plain), "ours": lambda: row_argmax.infer(x)}
    return Case("row_argmax", f"R={len(x)} V={x.shape[1]}", run, {FORWARD: Work(float(x.numel()), nbytes(x))})
