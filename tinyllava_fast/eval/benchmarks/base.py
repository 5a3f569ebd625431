"""What a benchmark is: questions out of its official files, and the official score of the answers.

A new benchmark is one file in this folder: a class with these members, registered under its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinyllava_fast.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark.

    id: unique in the benchmark. image: absolute or working-directory path, None for text only. text: the prompt as the
    model gets it. answer: the truth. type: the category that accuracy is also reported by.
    """

    id: str
    image: Path | None
    text: str
    answer: str
    type: str = ""


class Benchmark(Protocol):
    """The official files of a benchmark, its prompts and its score. Stateless."""

    name: str
    max_new_tokens: int

    def questions(self, data_dir: Path) -> list[Question]:
        """All questions, in the official order. Raises DataError naming file, record and field."""
        ...

    def score(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, Any]:
        """The official score of ``answers`` (question id -> text), a pure function; unanswered questions are wrong.

        Holds at least accuracy (0..1), accuracy_by_type, questions, and correct: {question id: bool}.
        """
        ...


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "tinyllava_fast.eval.benchmarks")


def exact_match(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, Any]:
    """Share of questions whose stripped answer equals the truth, overall and by type."""
    correct = {q.id: answers.get(q.id, "").strip() == q.answer for q in questions}
    by_type: dict[str, list[bool]] = {}
    for q in questions:
        by_type.setdefault(q.type, []).append(correct[q.id])
    return {
        "accuracy": _mean(list(correct.values())),
        "accuracy_by_type": {kind: _mean(marks) for kind, marks in sorted(by_type.items())},
        "questions_by_type": {kind: len(marks) for kind, marks in sorted(by_type.items())},
        "questions": len(questions),
        "correct": correct,
    }


def _mean(marks: list[bool]) -> float:
    return sum(marks) / len(marks) if marks else 0.0
