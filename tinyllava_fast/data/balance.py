"""Which process computes which packs of a step: as many for each, and nearly equal work.

Packs are full of tokens alike, so what differs is what the tower takes for their images, attention for long samples
(the square of a length) and the head for what is learnt. The packs of a step are those of the plan whatever the number
of processes; only who computes which, and in which order, follows from their work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackCosts:
    """Work in any unit, as floating-point operations: what every pack takes, and more for each thing in it."""

    pack: float
    image: float
    pair: float
    """Of two tokens of which one attends to the other."""
    text: float
    """Of a token of text, learnt or not, on average."""

    def of(self, lengths: np.ndarray, images: np.ndarray, tokens_per_image: int) -> float:
        """Return the work of a pack of these samples. lengths: tokens, those of images included; both [n]."""
        pairs = float((lengths * (lengths + 1) // 2).sum())
        shown = int(images.sum())
        text = int(lengths.sum()) - shown * tokens_per_image
        return self.pack + self.image * shown + self.pair * pairs + self.text * text


def share_out(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Return the numbers of the packs that each rank computes, in its order; equally many for each.

    The heaviest packs are computed at the same time, then the next ones: processes that wait for one another in every
    pass (fsdp, ZeRO) wait little. Of those computed together the rank with the least work so far takes the heaviest,
    so sums are even, too, for processes that wait at the end of a step alone (ddp). Packs that the ranks take first go
    round as in the plan, else rank 0 would always have the most. One rank computes them as they come.
    """
    if ranks == 1:
        return [list(range(len(work)))]
    order = sorted(range(len(work)), key=lambda pack: -work[pack])
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for first in range(0, len(order), ranks):
        together = order[first : first + ranks]
        lightest = sorted(range(ranks), key=loads.__getitem__)
        for pack, rank in zip(together if first else sorted(together), lightest, strict=True):
            shares[rank].append(pack)
            loads[rank] += work[pack]
    return shares


def idle_share(seconds: np.ndarray) -> float:
    """Return the share of the processes' time in which they have nothing to do but wait for the slowest one.

    seconds: [steps, ranks], what each takes for its own part of a step, at whose end all wait.
    """
    longest = float(seconds.max(1).sum()) * seconds.shape[1]
    return 1.0 - float(seconds.sum()) / longest if longest > 0 else 0.0
