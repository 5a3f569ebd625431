"""The samples of an epoch that is mixed of several sources, and their order: a pure function of the seed and the epoch.

Each source is an endless stream: all its samples in random order, then all of them in another order, and so on. An
epoch takes the next so many of each stream, so that a source of which it shows a part goes on where the last epoch
ended, and none is shown twice before all have been shown once. The streams are interleaved evenly: up to any point of
an epoch every source has given its share, to within a few samples. One source shown once is a shuffle of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyllava_fast.config.sources import SourceConfig

_PLACES = 2  # of an epoch's seeds: that of the places of the sources' samples among one another


def samples_per_epoch(sizes: Sequence[int], sources: Sequence[SourceConfig]) -> list[int]:
    """Return how many samples of each source an epoch has, at least one. sizes: samples that each source holds."""
    if sources[0].weight is not None:
        return by_weight(sum(sizes), [source.weight or 0.0 for source in sources])
    each = zip(sizes, sources, strict=True)
    return [source.samples or max(round(size * (source.times or 1.0)), 1) for size, source in each]


def by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers with the given sum in the given proportions, largest remainders rounded up."""
    exact = total * np.array(weights) / sum(weights)
    counts = np.floor(exact).astype(np.int64)
    upward = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[upward] += 1
    return [max(int(count), 1) for count in counts]


def epoch_order(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Return the samples of an epoch in order, as tickets: sample + (number of all samples) * (showing in this epoch).

    Samples are numbered through the sources. A ticket tells the showings of one sample apart, from 0.
    """
    total, first = sum(sizes), 0
    tickets, places = [], []
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        taken = np.arange(epoch * count, (epoch + 1) * count)
        rounds, within = np.divmod(taken, size)
        order = np.concatenate(
            [_shuffled(size, seed, int(r), number)[within[rounds == r]] for r in range(rounds[0], rounds[-1] + 1)]
        )
        tickets.append(first + order + total * (rounds - rounds[0]))
        jitter = np.random.default_rng([seed, epoch, _PLACES, number]).random(count)
        places.append((np.arange(count) + jitter) / count)
        first += size
    return np.concatenate(tickets)[np.argsort(np.concatenate(places), kind="stable")]


def _shuffled(size: int, seed: int, turn: int, source: int) -> np.ndarray:
    """Return the order of one pass over a source."""
    # NumPy fills the entropy up with zeros, so that the first source has the order of one that is alone.
    return np.random.default_rng([seed, turn, 0, source]).permutation(size)
