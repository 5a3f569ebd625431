"""Log-likelihood of given options: the probabilities of their tokens, and their way back to the questions.

Legend: N scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinyllava_fast.infer.scheduling.sequence import Sequence
from tinyllava_fast.infer.types import Request, Scores


def log_probabilities(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, rows: int, vocab: int
) -> tuple[Tensor, Tensor]:
    """(log p [N] float32, greedy [N] bool) of each target token, ``rows`` at a time.

    hidden: [N, D] of the position before each. targets: [N] int64. The probabilities are those the model was trained
    with, over all V rows of its head, so that a logit which is no number makes its row's log p none; greedy: whether
    the target is the likeliest of the ``vocab`` ever chosen.
    """
    each, best = [], []
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = logits_of(some).float()  # [<= rows, V]
        each.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
        best.append(logits[:, :vocab].argmax(-1) == wanted)
    return torch.cat(each).cpu(), torch.cat(best).cpu()


@dataclass(eq=False)
class _Open:
    """A question of which not all options are done."""

    request: Request
    options: tuple[str, ...]
    read: int = 0  # options that are sequences by now
    results: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prompt_tokens: int = 0


class Collector:
    """Puts the options of each question together again, whatever order they finish in."""

    def __init__(self) -> None:
        self._questions: deque[_Open] = deque()  # read, but not all of their sequences seen
        self._owner: dict[Sequence, tuple[_Open, int]] = {}  # of each sequence in flight: its question and option

    def watch(self, questions: Iterable[tuple[Request, Items[str]]]) -> Iterator[tuple[Request, tuple[str, ...]]]:
        """The questions as they are, remembered."""
        for request, options in questions:
            self._questions.append(_Open(request, tuple(options)))
            yield request, self._questions[-1].options

    def register(self, sequences: Iterator[Sequence]) -> Iterator[Sequence]:
        """The sequences as they are, one per option in the order of ``watch``, each remembered with its question."""
        for sequence in sequences:
            question = self._questions[0]
            self._owner[sequence] = (question, question.read)
            question.prompt_tokens = len(sequence.prompt) + 1 - len(sequence.scored)
            question.read += 1
            if question.read == len(question.options):
                self._questions.popleft()
            yield sequence

    def add(self, sequence: Sequence) -> Scores | None:
        """Take a finished sequence; the scores of its question if it was the last one."""
        question, option = self._owner.pop(sequence)
        assert sequence.result is not None  # noqa: S101 it has ended, and no error is left to be raised
        question.results[option] = sequence.result
        if len(question.results) < len(question.options):
            return None
        results = [question.results[i] for i in range(len(question.options))]
        sums = [float(each.double().sum()) for each, _ in results]
        return Scores(
            id=question.request.id,
            options=question.options,
            sums=sums,
            means=[total / len(each) for total, (each, _) in zip(sums, results, strict=True)],
            greedy=[bool(best.all()) for _, best in results],
            prompt_tokens=question.prompt_tokens,
        )
