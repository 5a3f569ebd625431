"""The next token of each sequence from its logits: greedy, or drawn with the request's own seed.

Legend: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.infer.types import Sampling
from tinyllava_fast.ops.row_argmax import row_argmax

NUCLEUS_GUESS = 256  # most nuclei are smaller: taking so many is 10 times faster than sorting a vocabulary of 49k
COLD = 1e-5  # a temperature below is as good as greedy, and logits divided by it may be no numbers


def next_tokens(logits: Tensor, samplings: Sequence[Sampling], places: Sequence[int]) -> list[int]:
    """One token id per row. logits: [R, V] float. places: how many tokens each sequence has generated before."""
    largest = row_argmax.infer(logits) if logits.is_cpu else logits.argmax(-1)
    chosen: list[int] = largest.tolist()
    for row, (sampling, place) in enumerate(zip(samplings, places, strict=True)):
        if sampling.temperature > COLD:
            chosen[row] = draw(logits[row], sampling, place)
    return chosen


def all_finite(numbers: Tensor) -> bool:
    """Return whether all numbers [...] are finite. One sum tells; only if that overflows is every number looked at."""
    return bool(numbers.sum(dtype=torch.float32).isfinite()) or bool(numbers.isfinite().all())


def draw(logits: Tensor, sampling: Sampling, place: int) -> int:
    """One token of softmax(logits / temperature) within top_k, then top_p, then min_p, as transformers orders them.

    logits: [V]. The one random number is a function of the request's seed and the place of the token in the answer, so
    a draw depends on nothing that runs beside it, and repeats when a sequence had to start anew.
    """
    ids, probabilities = candidates(
        logits.float() / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    )
    # double: the sum of 49k small numbers has to end where its last number lies
    total = probabilities.double().cumsum(0).cpu()
    goal = point(sampling, place) * float(total[-1])
    index = min(int(np.searchsorted(total.numpy(), goal, side="right")), len(total) - 1)
    return index if ids is None else int(ids[index])


def point(sampling: Sampling, place: int) -> float:
    """Return the random number, 0 <= u < 1, of the token at a place of a request's answer."""
    return float(np.random.Generator(np.random.Philox(key=sampling.seed % 2**64, counter=place)).random())


def candidates(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> tuple[Tensor | None, Tensor]:
    """(ids [N], probabilities [N], not normalized) of the tokens that may be drawn; ids None: all [V] in order.

    logits: [V] float32, divided by the temperature. top_k 0: all. A token belongs to the nucleus if those more probable
    than it do not reach top_p, so one always remains (Holtzman et al., arXiv:1904.09751). It belongs to those of min_p
    if it is at least so many times as probable as the most probable one (Nguyen et al., arXiv:2407.01082).
    """
    if not top_k and top_p >= 1:
        probabilities = logits.softmax(-1)
        return None, probabilities * (probabilities >= min_p * probabilities.max()) if min_p else probabilities
    size = len(logits)
    values, ids = logits.topk(min(top_k or NUCLEUS_GUESS, size))
    # top_p counts within the k that top_k left
    probabilities = (values - (values if top_k else logits).logsumexp(-1)).exp()
    if not top_k and len(ids) < size and float(probabilities.sum()) < top_p:
        ids, probabilities = _nucleus(logits.softmax(-1), top_p)
    elif top_p < 1:
        count = max(1, int((probabilities.double().cumsum(0) - probabilities < top_p).sum()))
        ids, probabilities = ids[:count], probabilities[:count]
    if min_p:
        kept = probabilities >= min_p * probabilities.max()
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(ids [N], probabilities [N]) of the nucleus of a wide distribution [V], in the order of the vocabulary.

    Sorting values alone and looking for those above the last one takes 0.2 ms on a CPU, sorting ids along 3 (V = 49k).
    """
    if probabilities.is_cpu:
        ordered = torch.from_numpy(np.sort(probabilities.numpy())[::-1].copy())
    else:
        ordered = probabilities.sort(descending=True).values
    kept = max(1, int((ordered.double().cumsum(0) - ordered < top_p).sum()))
    last = ordered[kept - 1]
    inside = probabilities > last
    equal = (probabilities == last).nonzero()[:, 0]
    inside[equal[: kept - int(inside.sum())]] = True
    return inside.nonzero()[:, 0], probabilities[inside]
