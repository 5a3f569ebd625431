"""linear_cross_entropy, against logits of every token as transformers makes them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.bench.case import BOTH, SUITE, Candidate, Case, Run, Setting, Work, gpu_peer, nbytes, pack_of
from tinyllava_fast.ops import linear_cross_entropy

FULL = "torch, full logits"
SHARE, VOCABULARY = 0.05, 49152
LARGE = 256_000
"""Gemma's vocabulary, at SmolLM2's width: the full logits need 12 GB here; Gemma's width of 2,048 would add 2 GB."""


@SUITE.register("linear_cross_entropy")
def cases(setting: Setting) -> Iterator[Case]:
    """4,096 tokens of which 5 % are supervised, then all of them, and a vocabulary of 256,000."""
    yield _case(setting, SHARE, main=True)
    if setting.quick:
        return
    yield _case(setting, 1.0)
    yield _case(setting, SHARE, vocabulary=LARGE)
    if setting.sweep:
        for share in (0.01, 0.2, 0.5):
            yield _case(setting, share)
        for vocabulary in (8192, 128_256):
            yield _case(setting, SHARE, vocabulary=vocabulary)


def _case(setting: Setting, share: float, *, vocabulary: int = VOCABULARY, main: bool = False) -> Case:
    pack = pack_of(setting, vocabulary=vocabulary)
    count = max(1, round(share * pack.tokens))
    rows = torch.randperm(pack.tokens, generator=setting.generator)[:count].sort().values.to(setting.device)
    labels = torch.full((pack.tokens,), -100, device=setting.device)
    labels[rows] = setting.randint(pack.vocabulary, count)
    supervised = torch.full((pack.tokens,), pack.tokens, device=setting.device)
    supervised[:count] = rows
    hidden, weight = setting.randn(pack.tokens, pack.width), setting.randn(pack.vocabulary, pack.width)

    def full() -> Tensor:
        logits = functional.linear(hidden, weight)
        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    def selected() -> Tensor:
        logits = functional.linear(hidden.index_select(0, rows), weight)
        return functional.cross_entropy(logits.float(), labels.index_select(0, rows), reduction="sum")

    run: dict[str, Candidate] = {FULL: full}
    if share < 1:
        run["torch, supervised rows"] = selected
    if main:
        run |= setting.compiled(f"{FULL}, compiled", full)
        run["liger-kernel"] = gpu_peer("liger_kernel", setting.device) or _liger(hidden, weight, labels)
    leaves = (hidden, weight)
    run["ours"] = lambda: linear_cross_entropy(hidden, weight, labels, supervised)
    flops = 2.0 * count * pack.width * pack.vocabulary
    read = count * pack.width * hidden.element_size() + nbytes(weight)
    both = Work(3 * flops, read + nbytes(hidden, weight))  # logits and gradients of a chunk while the weight is at hand
    work = {BOTH: both}  # the op makes its gradients in the forward pass
    axes: dict[str, float] = {}
    if pack.vocabulary == VOCABULARY:
        axes["supervised tokens in %, vocabulary 49,152"] = 100 * share
    if share == SHARE:
        axes["vocabulary, 5 % supervised"] = pack.vocabulary
    label = f"T={pack.tokens} D={pack.width} V={pack.vocabulary} supervised={count}"
    headline = {"linear_cross_entropy_vs_full_logits": FULL} if main else {}
    memory = {"linear_cross_entropy_memory": FULL} if main else {}
    frozen = (labels, supervised, rows)
    return Case("linear_cross_entropy", label, run, work, leaves, frozen, headline, memory, axes, main=main)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    loss = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda: loss(hidden, weight, labels, reduction="sum")
