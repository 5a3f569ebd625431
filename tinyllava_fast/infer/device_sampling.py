"""The next tokens of a batch, chosen where the logits are: sampling.py's choices, without a word to the host.

A draw's random number comes from the host (sampling.point), so a request's answer is the same here as there, up to how
tokens of equal logits are ordered and sums are rounded. Legend: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.infer.sampling import COLD, NUCLEUS_GUESS, point
from tinyllava_fast.infer.types import Sampling
from tinyllava_fast.ops.draw_tokens import draw_tokens

COLUMNS = 5


class Draws(NamedTuple):
    """What the draws of R sequences are made from, [R] float64 each."""

    temperature: Tensor  # 0: greedy
    top_k: Tensor  # 0: all
    top_p: Tensor
    min_p: Tensor
    point: Tensor  # the random number, 0..1


def draw_rows(samplings: Sequence[Sampling], places: Sequence[int]) -> np.ndarray:
    """The columns of Draws, [R, COLUMNS] float64. places: how many tokens each sequence has generated before."""
    rows = np.zeros((len(samplings), COLUMNS))
    rows[:, 2] = 1.0
    for row, (sampling, place) in enumerate(zip(samplings, places, strict=True)):
        if sampling.temperature > COLD:
            limits = sampling.top_k, sampling.top_p, sampling.min_p
            rows[row] = sampling.temperature, *limits, point(sampling, place)
    return rows


def needs_order(rows: np.ndarray) -> bool:
    """Return whether a draw among [R, COLUMNS] has to know the order of its tokens."""
    return bool(((rows[:, 1] > 0) | (rows[:, 2] < 1)).any())


def tokens(logits: Tensor, draws: Draws, *, order: bool) -> Tensor:
    """Return the token of each row of logits [R, V], [R] int64; -1 for a row of what are no numbers.

    order: whether a row may have top_k or top_p; sorting a vocabulary costs more than all the rest.
    """
    if not order:
        return draw_tokens.infer(logits, draws.temperature, draws.min_p, draws.point)
    is_limited = (draws.temperature > 0) & ((draws.top_k > 0) | (draws.top_p < 1))
    heat = torch.where(is_limited, draws.temperature, 1.0)[:, None].float()
    x, ids = _limited(logits.float() / heat, draws)
    x = torch.where(is_limited[:, None], x, logits.float())
    temperature = torch.where(is_limited, 1.0, draws.temperature)
    found = draw_tokens.infer(x, temperature, draws.min_p, draws.point)
    named = ids.gather(1, found.clamp(min=0)[:, None])[:, 0]
    return torch.where(is_limited & (found >= 0), named, found)


def _limited(x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """(logits [R, V], -inf where top_k or top_p bars a token; their ids), in the order that sampling.candidates has.

    x: divided by the temperature. That order is the vocabulary's for a wide nucleus, and from the likeliest on else.
    """
    size = x.shape[1]
    ordered, ids = x.sort(dim=1, descending=True, stable=True)
    place = torch.arange(size, device=x.device)
    most = torch.where(draws.top_k > 0, draws.top_k, size)[:, None]
    within = ordered.masked_fill(place >= most, -torch.inf)
    share = within.softmax(1)
    before = share.double().cumsum(1) - share
    limit = draws.top_p[:, None]
    kept = (place < most) & ((before < limit) | (limit >= 1) | (place == 0))
    guess = share[:, :NUCLEUS_GUESS].sum(1)
    is_wide = (draws.top_k == 0) & (size > NUCLEUS_GUESS) & (guess < draws.top_p)
    allowed = torch.zeros_like(kept).scatter(1, ids, kept)
    by_id = x.masked_fill(~allowed, -torch.inf)
    wide = is_wide[:, None]
    return torch.where(wide, by_id, ordered.masked_fill(~kept, -torch.inf)), torch.where(wide, place, ids)
