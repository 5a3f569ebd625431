"""Who answers the questions of an evaluation: a model folder (local.py) or a server (endpoint.py)."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.types import Facts


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer to a question."""

    key: str
    """Of the question."""
    text: str
    finish: str
    """As in infer.types.Answer."""
    tokens: int = 0
    latency: float | None = None
    """Seconds; None if the question was not put to the model."""
    why: str = ""
    """The fault of a question that could not be answered; the text is empty then."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What answering took, beside time. counters: of the engine, empty if it did nothing here, or lies elsewhere."""

    counters: dict[str, int]
    dtype: str = ""


class Answerer(Protocol):
    """Answers questions. Nothing heavy is opened before the first one."""

    facts: Facts
    """What its answers depend on: ``model``, which names it, ``model_digest`` and more."""
    asked_again: Collection[str]
    """Finishes of replies that another run might turn into answers."""

    def replies(
        self, questions: Sequence[Question], max_new_tokens: int, *, blind: bool, resumed: bool = False
    ) -> Generator[Reply, None, None]:
        """Yield one reply a question as they come, in any order.

        What is wrong with one question costs that one. blind: show a blank image in place of each. resumed:
        it has answered others of the same benchmark before. Raises UserError for
        what is wrong with the answerer itself. Left early, it stops.
        """
        ...

    def effort(self) -> Effort:
        """Return what it took so far."""
        ...
