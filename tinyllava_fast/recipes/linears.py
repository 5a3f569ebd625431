"""The linear layers of a component: what LoRA wraps and bitsandbytes quantizes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tinyllava_fast.models.lmm import LMM


def linears(lmm: LMM, component: str) -> Iterator[tuple[str, nn.Linear]]:
    """(name within the model, module) of every linear layer of a component whose forward is called, in module order.

    Left out: the output head, whose weight the loss reads directly, and the projections inside nn.MultiheadAttention,
    which reads theirs likewise.
    """
    head = lmm.llm.get_output_embeddings()
    for name, module in _walk(getattr(lmm, component), component):
        if module is not head:
            yield name, module


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    for name, child in module.named_children():
        full = f"{prefix}.{name}"
        if isinstance(child, nn.Linear):
            yield full, child
        elif not isinstance(child, nn.MultiheadAttention):
            yield from _walk(child, full)
