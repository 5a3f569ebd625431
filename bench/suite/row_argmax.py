"""row_argmax: the greedy tokens of sequences that answer together, vocabulary of SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tinyllava_fast.bench.case import FORWARD, SUITE, Case, Run, Setting, Work, nbytes
from tinyllava_fast.ops.row_argmax import row_argmax

VOCABULARY = 49152


@SUITE.register("row_argmax")
def cases(setting: Setting) -> Iterator[Case]:
    """One sequence, and as many as answer together."""
    for count in (3,) if setting.quick else (1, 32):
        x = setting.randn(count, 1000 if setting.quick else VOCABULARY, grad=False)
        run: dict[str, Run] = {"torch": lambda x=x: x.argmax(-1)}
        run |= setting.compiled("torch compiled", lambda x=x: torch.argmax(x, -1))
        run["ours"] = lambda x=x: row_argmax.infer(x)
        yield Case("row_argmax", f"R={count} V={x.shape[1]}", run, {FORWARD: Work(float(x.numel()), nbytes(x))})
