"""easy-VQA (Zhou 2019): 64x64 images of one coloured shape; questions with 13 possible answers, exact match.

Reads the folder that ``python -m tinyllava_fast.data.easy_vqa`` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Answers, Benchmark, Files, Grades, Question, Score
from tinyllava_fast.eval.files import Finder
from tinyllava_fast.eval.statistics import by_group, mean_metric


@BENCHMARKS.register("easy_vqa")
class EasyVQA(Benchmark):
    """9,673 test questions about 1,000 images; types: shape, color, yes/no shape, yes/no color."""

    name = "easy_vqa"
    title = "easy-VQA"
    official = (9673, 1000)
    in_all = False
    max_new_tokens = 8

    def locate(self, root: Path) -> Files:
        """The prepared folder, itself or below root."""
        find = Finder(self.name, root, ["easy_vqa"], "python -m tinyllava_fast.data.easy_vqa DIR, which prepares it")
        questions = find.file("test.json")
        return {"questions": questions, "images": questions.parent / "images"}

    def questions(self, files: Files) -> list[Question]:
        """The questions of test.json. Raises DataError if the folder does not hold the prepared data."""
        from tinyllava_fast.data.easy_vqa import load_questions  # it imports torch

        return [
            Question(
                key=q["id"],
                id=q["id"],
                images=(files["images"] / q["image"],),
                prompt=q["question"],
                truth=q["answer"],
                category=question_type(q["question"], q["answer"]),
            )
            for q in load_questions(files["questions"].parent)
        ]

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Exact match after stripping white space; a question without an answer is wrong."""
        credit = {q.key: float(answers.get(q.key, "").strip() == q.truth) for q in questions}
        return Score(
            metrics=[mean_metric("accuracy", questions, credit)],
            headline="accuracy",
            tables={"type": by_group(questions, credit, [q.category for q in questions])},
            credit=credit,
        )


def question_type(question: str, answer: str) -> str:
    """ "shape" or "color" for open questions; "yes/no shape" or "yes/no color" by what the question names."""
    from tinyllava_fast.data.easy_vqa import COLORS

    words = question.lower().rstrip("?").split()
    if answer in ("yes", "no"):
        return "yes/no color" if any(w in COLORS for w in words) else "yes/no shape"
    return "color" if answer in COLORS else "shape"
