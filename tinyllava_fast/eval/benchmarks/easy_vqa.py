"""easy-VQA (Zhou 2019): 64x64 images of one coloured shape; questions with 13 possible answers, exact match.

Reads the folder that ``python -m tinyllava_fast.data.easy_vqa`` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_fast.data.easy_vqa import COLORS, load_questions
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Question, exact_match


@BENCHMARKS.register("easy_vqa")
class EasyVQA:
    """9,673 test questions about 1,000 images; types: shape, color, yes/no shape, yes/no color."""

    name = "easy_vqa"
    max_new_tokens = 8

    def questions(self, data_dir: Path) -> list[Question]:
        """The questions of test.json. Raises DataError if the folder does not hold the prepared data."""
        return [
            Question(
                id=q["id"],
                image=data_dir / "images" / q["image"],
                text=q["question"],
                answer=q["answer"],
                type=question_type(q["question"], q["answer"]),
            )
            for q in load_questions(data_dir)
        ]

    def score(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, Any]:
        """Exact match after stripping white space."""
        return exact_match(questions, answers)


def question_type(question: str, answer: str) -> str:
    """ "shape" or "color" for open questions; "yes/no shape" or "yes/no color" by what the question names."""
    words = question.lower().rstrip("?").split()
    if answer in ("yes", "no"):
        return "yes/no color" if any(w in COLORS for w in words) else "yes/no shape"
    return "color" if answer in COLORS else "shape"
