"""Attention weights of a few rows: what packed attention computes and does not keep.

Legend: T tokens, R rows that are wanted, H heads, Hkv key/value heads, Dh head size, V vocabulary, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyllava_fast.models.attention import Watched
from tinyllava_fast.models.lmm import LMM


def attention_rows(seen: Watched, rows: Tensor) -> Tensor:
    """Return the causal attention weights [H, R, T] float32 of the queries at ``rows`` [R] int64.

    The memory is R x T a head, whatever the length of the sequence squared would be.
    """
    group = seen.q.shape[1] // seen.k.shape[1]
    q = seen.q[rows].transpose(0, 1).float()  # [H, R, Dh]
    k = seen.k.repeat_interleave(group, 1).transpose(0, 1).float()  # [H, T, Dh]
    scale = seen.q.shape[-1] ** -0.5 if seen.scale is None else seen.scale
    scores = q @ k.transpose(1, 2) * scale
    if seen.softcap:
        scores = seen.softcap * torch.tanh(scores / seen.softcap)
    behind = rows[:, None] - torch.arange(k.shape[1], device=rows.device)  # [R, T]
    hidden = behind < 0
    if seen.window:
        hidden |= behind >= seen.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@dataclass
class Pass:
    """What a forward pass over one sequence shows.

    weights: of each layer [H, R, T], R rows. hidden: after each layer [T, D], before the final norm. final [T, D]:
    after it, with gradients where they were asked for. read: maps hidden states [n, D] to logits [n, V].
    """

    weights: list[Tensor]
    hidden: list[Tensor]
    final: Tensor
    read: Callable[[Tensor], Tensor]


def watched(lmm: LMM, embeds: Tensor, rows: Tensor) -> Pass:
    """Run the decoder over the embeddings [T, D] of one sequence and return what it shows of ``rows`` [R]."""
    weights: dict[int, Tensor] = {}
    hidden: list[Tensor] = []
    called: list[tuple[nn.Module, Tensor]] = []  # of the body's own parts, in the order they run

    def watch(seen: Watched) -> None:
        with torch.no_grad():
            weights[seen.layer] = attention_rows(seen, rows)

    def keep(_: nn.Module, __: object, out: Any) -> None:
        hidden.append((out[0] if isinstance(out, tuple) else out).detach()[0])

    def note(module: nn.Module, _: object, out: Any) -> None:
        if isinstance(out, Tensor):
            called.append((module, out))

    layers = lmm.family.layers(lmm.llm)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        for part in lmm.llm.base_model.children():
            hooks.callback(part.register_forward_hook(note).remove)
        positions = torch.arange(len(embeds), device=embeds.device)
        bounds = torch.tensor([0, len(embeds)], dtype=torch.int32, device=embeds.device)
        watching: Any = watch
        final = lmm.decode(embeds, positions, cu_seqlens=bounds, watch=watching)
    norm = next((m for m, out in reversed(called) if out.data_ptr() == final.data_ptr()), nn.Identity())
    return Pass([weights[i] for i in range(len(layers))], hidden, final, lambda h: lmm.logits(norm(h[None])[0]))


def answer_log_probabilities(
    lmm: LMM, sequences: Iterable[Tensor], tokens: Tensor, *, vocab: int, most: int = 8192
) -> Tensor:
    """Return the log-probability of an answer after each of several prompts, [n] float64.

    sequences: of each the embeddings [T, D] of prompt and answer but for its last token; read lazily. tokens: [R]
    int64, the answer. vocab: tokens that are ever chosen. Sequences run packed, about ``most`` tokens a pass.
    """
    totals: list[Tensor] = []
    waiting: list[Tensor] = []

    def run() -> None:
        lengths = torch.tensor([0, *(len(e) for e in waiting)], device=tokens.device)
        bounds = lengths.cumsum(0)
        positions = torch.cat([torch.arange(len(e), device=tokens.device) for e in waiting])
        hidden = lmm.decode(torch.cat(waiting), positions, cu_seqlens=bounds.to(torch.int32))
        last = (bounds[1:, None] - len(tokens) + torch.arange(len(tokens), device=tokens.device)).flatten()
        log_p = lmm.logits(hidden[last])[:, :vocab].float().log_softmax(-1)
        totals.append(log_p.gather(1, tokens.repeat(len(waiting))[:, None]).view(len(waiting), -1).double().sum(1))
        waiting.clear()

    for embeds in sequences:
        if waiting and sum(map(len, waiting)) + len(embeds) > most:
            run()
        waiting.append(embeds)
    if waiting:
        run()
    return torch.cat(totals).cpu()
