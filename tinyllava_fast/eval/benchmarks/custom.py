"""Your own questions: a JSONL file beside a folder of images.

Each line: {"question": ..., "answer": ..., "image": ...} with, if wanted, "id", "category" and "choices". answer is a
text or a number, or a list of them: several that count, or for the metric vqa ten people's. image is a path below the
image folder, or a list of them, which may also be called images; without it the question is text only. The question is
put to the model as it stands; with several images, it holds one ``<image>`` each or none. null counts as "not given"
for image, images, choices, category and id. Other fields are not used; one that seems to be a misspelt name of a field
that is not given is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from tinyllava_fast.config.ranges import PositiveInt, Text
from tinyllava_fast.data.pictures import IMAGE_ALIASES
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Answers, Benchmark, Files, Grades, Question, Score
from tinyllava_fast.eval.files import Finder, UniqueIds
from tinyllava_fast.eval.own_answers import contains, equal, key_of, option_of
from tinyllava_fast.eval.prompts import IMAGE_MARKER
from tinyllava_fast.eval.statistics import by_group, mean_metric
from tinyllava_fast.eval.vqa_text import agreement
from tinyllava_fast.fields import Fields, read_jsonl, shown
from tinyllava_fast.log import log

FIELDS = ("id", "question", "answer", "image", "images", "choices", "category")
ALIASES = {
    "id": ("question_id",),
    "question": ("prompt", "text", "query", "instruction", "input"),
    "answer": ("label", "labels", "target", "truth", "ground_truth", "gold", "gt", "output"),
    "image": IMAGE_ALIASES,
    "choices": ("option", "options"),
}
"""Names of the fields in other formats."""
_PICTURE = re.compile(r"(?<![a-z])(image|img|picture|pic|photo)(s|file|url|path|name)?(?![a-z])")
"""Part of the name of a field that seems to hold a picture: image_url, imgPath, photo-file."""


@dataclass(frozen=True)
class Options:
    """Settings of custom."""

    file: Text = "questions.jsonl"
    """The questions, below --data."""
    images: Text = "."
    """The image folder, below --data."""
    metric: Literal["exact", "contains", "vqa", "choice"] = "exact"
    """exact: an answer, but for case, articles and punctuation; a number's sign counts. contains: an answer stands in
    it as whole words (signs are not seen). vqa: soft accuracy against ten answers. choice: the right option of
    "choices", by its text or its letter: "B", "b.", "(B)", "**B**", "B. dog", "Answer: B", "Option B", "B is right".
    An empty reply earns nothing with any of them."""
    max_new_tokens: PositiveInt = 128
    """Longest answer."""


@BENCHMARKS.register("custom")
class Custom(Benchmark):
    """Questions of your own with one of four metrics."""

    name = "custom"
    title = "custom"
    in_all = False
    Options = Options
    scored_by = ("metric",)

    def __init__(self, options: object = None) -> None:
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
        unused: dict[str, int] = {}
        numbered = False  # whether some line has no id
        for line, record in read_jsonl(files["questions"]):
            for name in _unused(record):
                unused.setdefault(name, line)
            id = record.identifier("id", None)
            numbered = numbered or id is None
            question = self._question(record, line if id is None else id, files["images"])
            try:
                ids.add(question.id, line)
            except DataError as error:
                rest = "; the id of a line without one is its number, so give every line an id, or none" * numbered
                raise DataError(f"{error}{rest}") from None
            questions.append(question)
        if unused:
            first = ", ".join(f"{shown(name)} (first in line {line})" for name, line in list(unused.items())[:8])
            rest = f" and {len(unused) - 8} others" if len(unused) > 8 else ""
            log.warning("%s: fields that are not used: %s%s; known are %s", files["questions"], first, rest,
                        ", ".join(FIELDS))  # fmt: skip
        return questions

    def _question(self, record: Fields, id: str | int, folder: Path) -> Question:
        truths = record.words("answer", single=True)
        choices = tuple(record.words("choices", []))
        self._check(record, truths, choices)
        if "image" in record and "images" in record:
            raise DataError(f"{record.where}: images: given beside 'image'; keep one of them")
        images = record.paths("image", []) or record.paths("images", [], single=False)
        prompt = record.text("question")
        _check_markers(record, prompt.count(IMAGE_MARKER), len(images))
        return Question(
            key=str(id),
            id=id,
            images=tuple(folder / image for image in images),
            prompt=prompt,
            truth=max(truths, key=truths.count),
            category=record.word("category", ""),
            choices=choices,
            meta={"answers": truths},
        )

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Mean credit by the chosen metric, overall and by category; a question without an answer earns nothing."""
        credit_of = CREDIT[self.options.metric]
        said = {q.key: answers.get(q.key, "") for q in questions}
        credit = {q.key: credit_of(said[q.key], q) if said[q.key].strip() else 0.0 for q in questions}
        tables = {}
        if any(q.category for q in questions):
            tables["category"] = by_group(questions, credit, [q.category for q in questions])
        return Score(
            metrics=[mean_metric("accuracy", questions, credit)], headline="accuracy", tables=tables, credit=credit
        )

    def _check(self, record: Fields, truths: list[str], choices: tuple[str, ...]) -> None:
        """DataError for truths that the metric cannot use."""
        if len(set(choices)) < len(choices):
            record.fail("choices", "options that differ", list(choices))
        if self.options.metric == "vqa" and len(truths) != 10:
            raise DataError(f"{record.where}: {len(truths)} answers; custom.metric=vqa needs ten people's")
        if self.options.metric == "choice":
            bad = [t for t in truths if option_of(t, choices) is None]
            if bad or not choices:
                raise DataError(
                    f"{record.where}: custom.metric=choice needs choices, and answer as one of them or its letter; "
                    f"got answer {shown(bad[0] if bad else truths[0])}, choices {shown(list(choices))}"
                )


def _unused(record: Fields) -> list[str]:
    """Names of fields that are not known. DataError for one that seems to be the name of a field that is not given."""
    unused = [name for name in record.values if name not in FIELDS]
    for name in unused:
        low = name.lower()
        meant = next((known for known, others in ALIASES.items() if low in others), None)
        meant = meant or next(iter(get_close_matches(low, FIELDS[1:], n=1, cutoff=0.75)), None)
        if meant is None and _PICTURE.search(low) and isinstance(record.values[name], (str, list)):
            meant = None if "image" in record.values or "images" in record.values else "image"
        given = ("image", "images") if meant in ("image", "images") else (meant or "",)
        if meant and not any(known in record for known in given):
            raise DataError(
                f"{record.where}: unknown field {shown(name)}; did you mean {meant!r}? Rename it or remove it"
            )
    return unused


def _check_markers(record: Fields, markers: int, images: int) -> None:
    if markers and not images:
        raise DataError(f"{record.where}: question: it holds {IMAGE_MARKER} but the line names no image; add image")
    if markers and images > 1 and markers != images:
        raise DataError(
            f"{record.where}: question: it holds {markers} {IMAGE_MARKER} but the line names {images} images; "
            "give one marker for each image, or none at all"
        )


def _exact(text: str, question: Question) -> float:
    return float(any(equal(text, truth) for truth in question.meta["answers"]))


def _contains(text: str, question: Question) -> float:
    return float(any(contains(text, truth) for truth in question.meta["answers"]))


def _vqa(text: str, question: Question) -> float:
    return agreement(key_of(text), [key_of(truth) for truth in question.meta["answers"]])


def _choice(text: str, question: Question) -> float:
    right = {option_of(truth, question.choices) for truth in question.meta["answers"]}
    return float(option_of(text, question.choices) in right)


CREDIT: dict[str, Callable[[str, Question], float]] = {
    "exact": _exact,
    "contains": _contains,
    "vqa": _vqa,
    "choice": _choice,
}
