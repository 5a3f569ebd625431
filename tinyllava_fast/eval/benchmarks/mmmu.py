"""MMMU, validation split: college-level questions of 30 subjects, multiple choice and open.

Files and prompts are TinyLLaVA Factory's (anns_for_eval.json, which holds finished prompts), the score that of MMMU's
main_eval_only.py. A multiple-choice reply without a letter is answered by a random draw, as in the original; the draws
come from a generator of this benchmark's own, in file order, whatever order the questions were answered in.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava_fast.config.ranges import NonNegativeInt
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
from tinyllava_fast.eval.files import Finder, UniqueIds, read_json, require
from tinyllava_fast.eval.mmmu_answers import chosen_letter, open_is_right, open_values
from tinyllava_fast.eval.statistics import mean_metric, require_answers

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(subject for subjects in DOMAINS.values() for subject in subjects)
CHOICE = "multiple-choice"
NO_IMAGE = "INVALID GENERATION FOR MULTIPLE IMAGE INPUTS"


@dataclass(frozen=True)
class Options:
    """Settings of mmmu."""

    seed: NonNegativeInt = 42
    """Of the random draws; 42 is the official one."""


@BENCHMARKS.register("mmmu")
class MMMU(Benchmark):
    """900 questions, 30 a subject. Scores are per cent, one decimal: the official 0.367 is 36.7 here, as in papers."""

    name = "mmmu"
    title = "MMMU"
    Options = Options
    max_new_tokens = 1024
    published = published_rows("Overall", None, 36.4, 38.4, 27.9, 29.7)

    def locate(self, root: Path) -> Files:
        """anns_for_eval.json, answer_dict_val.json and all_images/ of MMMU/."""
        find = Finder(self.name, root, ["MMMU", "mmmu"], "TinyLLaVA Factory's MMMU.zip (its documentation, Evaluation)")
        folder = "answer_dict_val.json"
        return {
            "questions": find.file("anns_for_eval.json"),
            "truths": find.file(
                f"eval/{folder}", folder, f"mmmu/{folder}", source="the MMMU repository (MMMU-Benchmark/MMMU, mmmu/)"
            ),
            "images": find.folder("all_images"),
        }

    def questions(self, files: Files) -> list[Question]:
        """The questions in file order.

        "image" is a file name, or a list of them for the markers <image 1>, <image 2>, ... of the prompt. Without it
        the reference doesn't ask the model: a multiple-choice question counts as one without a letter in its reply.
        """
        path, truths = files["questions"], read_json(files["truths"])
        seen, questions = UniqueIds(path), []
        for number, record in enumerate(read_json(path), 1):
            where = f"{path}, record {number}"
            id = str(require(record, "id", where))
            seen.add(id, number)
            if id not in truths:
                raise DataError(f"{files['truths']}: no answer to {id!r}, which {where} asks")
            questions.append(_question(id, record, truths[id], files, where))
        return questions

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """900 questions, 847 of them multiple choice, 30 subjects."""
        return [
            Count("questions", len(questions), 900),
            Count("multiple choice", sum(bool(q.choices) for q in questions), 847),
            Count("subjects", len({q.category for q in questions}), len(SUBJECTS)),
        ]

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Accuracy per subject and domain, and overall. Raises DataError if a question has no answer."""
        require_answers(self.name, questions, answers)
        parsed, drawn = parse(questions, answers, self.options.seed)
        credit, expected = {}, {}
        for q in questions:
            gold = q.meta["gold"]
            if q.choices:
                credit[q.key] = float(parsed[q.key] == gold or (not isinstance(gold, str) and parsed[q.key] in gold))
            else:
                credit[q.key] = float(open_is_right(open_values(answers[q.key]), gold))
            expected[q.key] = 1 / len(q.choices) if q.key in drawn else credit[q.key]
        subjects = [_metric(s, asked, credit) for s in SUBJECTS if (asked := _of(questions, [s]))]
        domains = [_metric(d, asked, credit) for d, s in DOMAINS.items() if (asked := _of(questions, s))]
        return Score(
            metrics=[
                _metric("Overall", questions, credit),
                _metric("Overall with draws at their expected value", questions, expected),
            ],
            headline="Overall",
            tables={"domain": domains, "subject": subjects},
            credit=credit,
            counts={"random draws": len(drawn), "not asked": sum(q.canned is not None for q in questions)},
            notes=[f"{len(drawn)} multiple-choice answers were drawn at random, seed {self.options.seed}"],
        )

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """<experiment>_output.json for main_eval_only.py: id -> letter, or the reply to an open question."""
        path = folder / f"{experiment}_output.json"
        parsed, _ = parse(questions, answers, self.options.seed)
        path.write_text(json.dumps({q.id: parsed[q.key] for q in questions}, indent=2), encoding="utf-8")
        return [path]


def parse(questions: Sequence[Question], answers: Answers, seed: int) -> tuple[dict[str, str], set[str]]:
    """Question key -> letter (or the whole reply to an open question), and the keys whose letter was drawn.

    Questions come in file order: the draws are consecutive ones of Python's generator of that seed.
    """
    generator, parsed, drawn = random.Random(seed), {}, set()
    for q in questions:
        reply = answers[q.key]
        if not q.choices:
            parsed[q.key] = reply
            continue
        letter = chosen_letter(reply, dict(zip(q.meta["letters"], q.choices, strict=True)))
        if letter is None:
            letter = generator.choice(q.meta["letters"])
            drawn.add(q.key)
        parsed[q.key] = letter
    return parsed, drawn


def subject_of(id: str) -> str:
    """The subject in an id: "validation_Art_Theory_12" -> "Art_Theory"."""
    return "_".join(id.split("_")[1:-1])


def _question(id: str, record: dict[str, Any], truth: dict[str, Any], files: Files, where: str) -> Question:
    subject = subject_of(id)
    if subject not in SUBJECTS:
        raise DataError(f"{where}: id {id!r} names no subject of MMMU; validation_<Subject>_<n> is expected")
    kind = require(record, "question_type", where)
    images = record.get("image") or []
    names = [images] if isinstance(images, str) else list(images)
    letters: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    if kind == CHOICE:
        letters = tuple(require(record, "all_choices", where))
        options = require(record, "index2ans", where)
        if missing := [letter for letter in letters if letter not in options]:
            raise DataError(f"{where}: index2ans has no text of option {missing[0]}")
        choices = tuple(str(options[letter]) for letter in letters)
    gold = require(truth, "ground_truth", f"{files['truths']}, {id!r}")
    return Question(
        key=id,
        id=id,
        images=tuple(files["images"] / name for name in names),
        prompt=_place(str(require(record, "prompt", where)), len(names)),
        truth=gold if isinstance(gold, str) else " or ".join(gold),
        category=subject,
        choices=choices,
        meta={"letters": letters, "gold": gold},
        canned=None if names else ("" if letters else NO_IMAGE),
    )


def _place(prompt: str, images: int) -> str:
    """With several images, the markers <image i> become the model's own if each stands there once, in order."""
    markers = [f"<image {i}>" for i in range(1, images + 1)]
    places = [prompt.find(m) for m in markers]
    once = all(prompt.count(m) == 1 for m in markers)
    if images > 1 and once and places == sorted(places):
        for marker in markers:
            prompt = prompt.replace(marker, "<image>")
    return prompt


def _of(questions: Sequence[Question], subjects: Sequence[str]) -> list[Question]:
    return [q for q in questions if q.category in subjects]


def _metric(name: str, questions: Sequence[Question], credit: dict[str, float]) -> Metric:
    return mean_metric(name, questions, credit, digits=1)
