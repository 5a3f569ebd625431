"""POPE (Li et al. 2023) on COCO: is an object in the image? As TinyLLaVA's and LLaVA's ``eval_pope.py`` score it.

Those align answers and labels by position, which silently breaks with the label files of today's POPE repository.
Here labels are joined by image and question, whose "a", "an" and "imange" differ between the two versions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Count,
    Files,
    Grades,
    Metric,
    Question,
    Score,
    published_rows,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, llava_questions
from tinyllava_fast.eval.prompts import SHORT
from tinyllava_fast.eval.statistics import clustered_error, mean, mean_influence, ratio_influence, require_answers
from tinyllava_fast.fields import read_jsonl, shown

SPLITS = {"adversarial": 3000, "popular": 3000, "random": 2910}
LABELS = "https://github.com/AoiDragon/POPE, folder output/coco, at commit e3e3926"
EPSILON = 1e-6  # TinyLLaVA adds it to the denominators


@dataclass(frozen=True)
class Options:
    """Settings of pope."""

    protocol: Literal["tinyllava", "llava"] = "tinyllava"
    """tinyllava: the headline is the mean accuracy. llava: the mean F1, whose denominators have no epsilon."""


@BENCHMARKS.register("pope")
class POPE(Benchmark):
    """8,910 yes/no questions about 500 images in three splits; scores are 0..1."""

    name = "pope"
    title = "POPE"
    Options = Options
    published = (
        *published_rows("f1_mean", 0.859, 0.859, None, None, None),
        *published_rows("accuracy_mean", None, None, 0.872, 0.855, 0.866),
    )

    def locate(self, root: Path) -> Files:
        """Question file, the three label files below coco/, COCO's val2014/."""
        find = Finder(self.name, root, ["pope", "POPE"], EVAL_ZIP)
        return {
            "questions": find.file("llava_pope_test.jsonl"),
            **{split: find.file(f"coco/coco_pope_{split}.json", source=LABELS) for split in SPLITS},
            "images": find.folder(
                "val2014",
                "coco/val2014",
                "../coco/val2014",
                "../vqav2/val2014",
                source="http://images.cocodataset.org/zips/val2014.zip",
            ),
        }

    def questions(self, files: Files) -> list[Question]:
        """The lines of the question file with their labels. DataError for label files of another release."""
        labels = {split: _labels(files[split]) for split in SPLITS}
        questions = []
        for asked in llava_questions(files["questions"]):
            split = asked.fields.one_of("category", list(SPLITS))
            label = labels[split].get(_join_key(asked.image, asked.text))
            if label is None:
                raise DataError(
                    f"{asked.where}: {files[split]} has no label for {shown(asked.image)}, {shown(asked.text)}. It has "
                    f"{len(labels[split]):,} labels; {SPLITS[split]:,} go with LLaVA's questions: {LABELS}"
                )
            questions.append(
                Question(
                    key=str(asked.id),
                    id=asked.id,
                    images=(files["images"] / asked.image,),
                    prompt=asked.text,
                    truth=label,
                    category=split,
                )
            )
        return questions

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """8,910 questions, by split, about 500 images."""
        splits = [q.category for q in questions]
        found = [Count(f"{split} questions", splits.count(split), count) for split, count in SPLITS.items()]
        return [*found, Count("images", len({q.images for q in questions}), 500)]

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Accuracy, precision, recall, F1 and share of "yes" of each split, and the means over the splits."""
        require_answers(self.name, questions, answers)
        tables: dict[str, list[Metric]] = {}
        influences: dict[str, dict[str, float]] = {"f1": {}, "accuracy": {}}
        credit: dict[str, float] = {}
        for split in (s for s in SPLITS if any(q.category == s for q in questions)):
            asked = [q for q in questions if q.category == split]
            said = [parse(answers[q.key]) for q in asked]
            truths = [q.truth for q in asked]
            tables[split], moved = _split(asked, said, truths, EPSILON * (self.options.protocol == "tinyllava"))
            credit |= {q.key: float(s == q.truth) for q, s in zip(asked, said, strict=True)}
            for name, values in moved.items():
                influences[name] |= {q.key: v for q, v in zip(asked, values, strict=True)}
        metrics = []
        for name, moved_by in influences.items():
            error = clustered_error((moved_by[q.key] / len(tables) for q in questions), [q.cluster for q in questions])
            value = mean([m.value for table in tables.values() for m in table if m.name == name])
            metrics.append(_metric(f"{name}_mean", value, error, len(questions)))
        headline = "f1_mean" if self.options.protocol == "llava" else "accuracy_mean"
        said_all = [answers[q.key] for q in questions]
        counts = {"unclear, counted as yes": sum(bool(s.strip()) and is_unclear(s) for s in said_all)}
        return Score(metrics=metrics, headline=headline, tables=tables, credit=credit, counts=counts)


def parse(text: str) -> Literal["yes", "no"]:
    """Read an answer as "no" if its first sentence holds the word No, no or not, else as "yes", even if empty."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def is_unclear(text: str) -> bool:
    """Return True if an answer that officially counts as "yes" says neither yes nor no: "maybe", "NO", "", "Nope".

    The official numbers keep them; a reader should know how many there are.
    """
    words = text.lower().replace(",", " ").replace(".", " ").replace("!", " ").split()
    return parse(text) == "yes" and "yes" not in words


def _split(
    questions: Sequence[Question], said: Sequence[str], truths: Sequence[str], epsilon: float
) -> tuple[list[Metric], dict[str, list[float]]]:
    """The metrics of one split, and each question's influence on F1 and accuracy."""
    pairs = list(zip(said, truths, strict=True))
    hit, alarm = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    calm, miss = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    precision = _ratio(hit, hit + alarm + epsilon)
    recall = _ratio(hit, hit + miss + epsilon)
    f1 = _ratio(2 * precision * recall, precision + recall + epsilon)
    right = [float(s == t) for s, t in pairs]
    moved = {  # F1 = sum of 2 [hit] over sum of [said yes] + [is yes]
        "f1": ratio_influence(
            [2.0 * (p == ("yes", "yes")) for p in pairs], [float(s == "yes") + (t == "yes") for s, t in pairs]
        ),
        "accuracy": mean_influence(right),
    }
    errors = {name: clustered_error(values, [q.cluster for q in questions]) for name, values in moved.items()}
    count = len(pairs)
    return [
        _metric("f1", f1, errors["f1"], count),
        _metric("accuracy", (hit + calm) / count, errors["accuracy"], count),
        _metric("precision", precision, None, count),
        _metric("recall", recall, None, count),
        _metric("yes_ratio", (hit + alarm) / count, None, count),
    ], moved


def _metric(name: str, value: float, error: float | None, count: int) -> Metric:
    return Metric(name=name, value=value, scale=1.0, stderr=error, questions=count, digits=3)


def _ratio(upper: float, lower: float) -> float:
    return upper / lower if lower else 0.0


def _labels(path: Path) -> dict[tuple[str, str], str]:
    labels: dict[tuple[str, str], str] = {}
    for _, row in read_jsonl(path):
        label = row.one_of("label", ["yes", "no"])
        if labels.setdefault(_join_key(row.path("image"), row.text("text")), label) != label:
            row.fail("label", "the label that this question has in an earlier line", label)
    return labels


def _join_key(image: str, text: str) -> tuple[str, str]:
    """Image and question without what differs between the releases."""
    return image, re.sub(r"\ban?\b", "a", text.removesuffix(SHORT).strip()).replace("imange", "image")
