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
from tinyllava_fast.eval.files import Finder, UniqueIds
from tinyllava_fast.eval.mmmu_answers import chosen_letter, open_is_right, open_values
from tinyllava_fast.eval.statistics import mean_metric, require_answers
from tinyllava_fast.fields import Fields, read_object, read_objects, shown

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
KINDS = (CHOICE, "short-answer", "open")
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
    scored_by = ("seed",)
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
        path, truths = files["questions"], read_object(files["truths"])
        seen, questions = UniqueIds(path), []
        for number, record in enumerate(read_objects(path), 1):
            id = record.text("id")
            seen.add(id, number)
            if id not in truths.values:
                raise DataError(f"{files['truths']}: no answer to {shown(id)}, which {record.where} asks")
            questions.append(_question(id, record, truths.mapping(id), files["images"]))
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
                credit[q.key] = float(parsed[q.key] in gold)
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


def _question(id: str, record: Fields, truth: Fields, folder: Path) -> Question:
    subject = subject_of(id)
    if subject not in SUBJECTS:
        raise DataError(
            f"{record.where}: id {shown(id)} names no subject of MMMU; validation_<Subject>_<n> is expected"
        )
    names = record.paths("image", [])
    letters: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    if record.one_of("question_type", KINDS) == CHOICE:
        letters, options = tuple(record.texts("all_choices")), record.mapping("index2ans")
        if len(set(letters)) < len(letters):
            record.fail("all_choices", "letters that differ", list(letters))
        choices = tuple(options.word(letter) for letter in letters)
    gold = truth.words("ground_truth", single=True)
    return Question(
        key=id,
        id=id,
        images=tuple(folder / name for name in names),
        prompt=_place(record.text("prompt"), len(names)),
        truth=" or ".join(gold),
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
