"""Your own questions: a JSONL file beside a folder of images.

Each line: {"question": ..., "answer": ..., "image": ...} with, if wanted, "id", "category" and "choices". answer is a
text or a list of them: several that count, or for the metric vqa ten people's. image is a path below the image folder,
or a list of them; without it the question is text only. The question is put to the model as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyllava_fast.config.ranges import PositiveInt, Text
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Files,
    Grades,
    Question,
    Score,
)
from tinyllava_fast.eval.files import Finder, UniqueIds, read_jsonl, require
from tinyllava_fast.eval.statistics import by_group, mean_metric
from tinyllava_fast.eval.vqa_text import m4c_accuracy, normalise_m4c

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Options:
    """Settings of custom."""

    file: Text = "questions.jsonl"
    """The questions, below --data."""
    images: Text = "."
    """The image folder, below --data."""
    metric: Literal["exact", "contains", "vqa", "choice"] = "exact"
    """exact: an answer, but for case, articles and punctuation. contains: an answer stands in it as whole words.
    vqa: soft accuracy against ten answers. choice: the letter of the right option of "choices", or its text."""
    max_new_tokens: PositiveInt = 128
    """Longest answer."""


@BENCHMARKS.register("custom")
class Custom(Benchmark):
    """Questions of your own with one of four metrics."""

    name = "custom"
    title = "custom"
    in_all = False
    Options = Options

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.max_new_tokens = self.options.max_new_tokens

    def locate(self, root: Path) -> Files:
        """The question file and the image folder, below root or below root/custom."""
        find = Finder(self.name, root, ["custom"], "your own records: custom.file and custom.images name them")
        return {"questions": find.file(self.options.file), "images": find.folder(self.options.images)}

    def questions(self, files: Files) -> list[Question]:
        """The lines of the file; an id that is not given is the number of the line."""
        ids = UniqueIds(files["questions"])
        questions = []
        for line, record in read_jsonl(files["questions"]):
            where = f"{files['questions']}, line {line}"
            id = record.get("id", line)
            ids.add(str(id), line)
            truths = require(record, "answer", where)
            truths = [str(t) for t in truths] if isinstance(truths, list) else [str(truths)]
            choices = tuple(str(c) for c in record.get("choices", ()))
            self._check(truths, choices, where)
            images = record.get("image", [])
            questions.append(
                Question(
                    key=str(id),
                    id=id,
                    images=tuple(files["images"] / i for i in ([images] if isinstance(images, str) else images)),
                    prompt=str(require(record, "question", where)),
                    truth=max(truths, key=truths.count) if truths else "",
                    category=str(record.get("category", "")),
                    choices=choices,
                    meta={"answers": truths},
                )
            )
        return questions

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Mean credit by the chosen metric, overall and by category; a question without an answer earns nothing."""
        credit_of = CREDIT[self.options.metric]
        credit = {q.key: credit_of(answers.get(q.key, ""), q) for q in questions}
        tables = {}
        if any(q.category for q in questions):
            tables["category"] = by_group(questions, credit, [q.category for q in questions])
        return Score(
            metrics=[mean_metric("accuracy", questions, credit)], headline="accuracy", tables=tables, credit=credit
        )

    def _check(self, truths: list[str], choices: tuple[str, ...], where: str) -> None:
        if not truths:
            raise DataError(f"{where}: answer is an empty list")
        if self.options.metric == "vqa" and len(truths) != 10:
            raise DataError(f"{where}: {len(truths)} answers; custom.metric=vqa needs ten people's")
        if self.options.metric == "choice" and not (choices and _option(truths[0], choices) is not None):
            raise DataError(f"{where}: custom.metric=choice needs choices, and answer as one of them or its letter")


def _exact(text: str, question: Question) -> float:
    return float(normalise_m4c(text) in {normalise_m4c(t) for t in question.meta["answers"]})


def _contains(text: str, question: Question) -> float:
    said = f" {normalise_m4c(text)} "
    return float(any(f" {t} " in said for t in map(normalise_m4c, question.meta["answers"]) if t))


def _vqa(text: str, question: Question) -> float:
    return m4c_accuracy(text, question.meta["answers"])


def _choice(text: str, question: Question) -> float:
    right = _option(question.meta["answers"][0], question.choices)
    return float(_option(text, question.choices) == right)


def _option(text: str, choices: Sequence[str]) -> int | None:
    """Index of the option that a text names: by its own words, or by a letter that stands alone or leads."""
    said = normalise_m4c(text)
    for index, choice in enumerate(choices):
        if said and said == normalise_m4c(choice):
            return index
    letter = re.match(r"\s*\(?([A-Z])(?:[.):,]|\s*$)", text)
    index = LETTERS.index(letter.group(1)) if letter else -1
    return index if 0 <= index < len(choices) else None


CREDIT: dict[str, Callable[[str, Question], float]] = {
    "exact": _exact,
    "contains": _contains,
    "vqa": _vqa,
    "choice": _choice,
}
