"""ScienceQA, test split: multiple choice, half of the questions about an image; the option's letter is the answer.

Files, prompt and scoring are those of LLaVA (llava/eval/model_vqa_science.py, eval_science_qa.py). One difference:
images are converted to RGB, where LLaVA opens this benchmark's alone as they are. CLIP's processor converts by itself,
and SigLIP's stops at anything but three channels, so no score changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Count,
    Files,
    Grades,
    Question,
    Score,
    published_rows,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, UniqueIds
from tinyllava_fast.eval.prompts import IMAGE_MARKER, OPTION, whole_prompt
from tinyllava_fast.eval.statistics import by_group, mean_metric
from tinyllava_fast.fields import Fields, read_object, read_objects, shown

LETTERS = "ABCDE"
FAILED = "FAILED"
IMAGE_ACCURACY = "IMG-Accuracy"


def parse_letter(reply: str) -> str:
    """The letter in a reply, or FAILED: all of it, before ". " at its start, or in a single "The answer is X.".

    As in the original, white space at the ends is not forgiven; replies are stripped when they are generated.
    """
    if len(reply) == 1 and reply in LETTERS:
        return reply
    if reply[1:3] == ". " and reply[0] in LETTERS:
        return reply[0]
    found: list[str] = re.findall(r"The answer is ([A-Z]).", reply)  # the last dot is any character, as in the original
    return found[0] if len(found) == 1 else FAILED


def option_index(letter: str, options: int) -> int:
    """The option's index, or -1 if the letter is none of the first ``options``."""
    return LETTERS[:options].find(letter) if letter != FAILED else -1


@dataclass(frozen=True)
class Options:
    """Settings of sqa."""

    images_only: bool = False
    """Leave out the questions without an image; IMG-Accuracy does not depend on them."""


class _Entry(TypedDict):
    """A question in the output of eval_science_qa.py."""

    question_id: str | int
    parsed_ans: str
    ground_truth: str
    question: str
    pred: str
    is_multimodal: bool


@BENCHMARKS.register("sqa")
class ScienceQA(Benchmark):
    """4,241 questions, 2,017 of them about an image; those give IMG-Accuracy, the number in papers' tables."""

    name = "sqa"
    title = "ScienceQA"
    Options = Options
    max_new_tokens = 1024
    published = published_rows(IMAGE_ACCURACY, 66.8, 71.6, 73.0, 59.9, 60.1)

    def locate(self, root: Path) -> Files:
        """Question file, problems.json and the images of scienceqa/."""
        find = Finder(self.name, root, ["scienceqa"], EVAL_ZIP)
        release = "the ScienceQA release (github.com/lupantech/ScienceQA)"
        return {
            "questions": find.file("llava_test_CQM-A.json"),
            "problems": find.file("problems.json", "data/scienceqa/problems.json", source=release),
            "images": find.folder("images/test", "test", "images", source=f"test.zip of {release}"),
        }

    def questions(self, files: Files) -> list[Question]:
        """The questions in the order of the question file."""
        path, problems = files["questions"], read_object(files["problems"])
        seen, questions = UniqueIds(path), []
        for number, record in enumerate(read_objects(path), 1):
            id = str(record.identifier("id"))
            seen.add(id, number)
            if id not in problems.values:
                raise DataError(f"{files['problems']}: no problem {shown(id)}, which {record.where} asks for")
            question = self._question(id, record, problems.mapping(id), files["images"])
            if question.images or not self.options.images_only:
                questions.append(question)
        return questions

    def _question(self, id: str, record: Fields, problem: Fields, images: Path) -> Question:
        text, image = record.mappings("conversations")[0].text("value"), record.path("image", None)
        if image is None and IMAGE_MARKER in text:
            record.fail("image", "a path, because the question holds " + IMAGE_MARKER, None)
        choices = tuple(problem.words("choices"))
        answer = problem.integer("answer", least=0)
        if answer >= min(len(choices), len(LETTERS)):
            problem.fail("answer", f"the index of one of its {len(choices)} choices", answer)
        return Question(
            key=id,
            id=id,
            images=() if image is None else (images / image,),
            prompt=text.replace(IMAGE_MARKER, "").strip() + OPTION,
            truth=LETTERS[answer],
            category=problem.text("subject", "", empty=True),
            choices=choices,
        )

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """4,241 questions, 2,017 with an image."""
        pictured = Count("questions with an image", sum(bool(q.images) for q in questions), 2017)
        return [pictured] if self.options.images_only else [Count("questions", len(questions), 4241), pictured]

    def recorded_prompt(self, question: Question) -> str:
        """The whole prompt: official scorers look for ``<image>`` in it."""
        return whole_prompt(question)

    def is_asked_by(self, question: Question, prompt: str) -> bool:
        """Return True if the question is part of the recorded prompt."""
        return question.prompt in prompt

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Share of right letters. An unanswered question is wrong, but not part of IMG-Accuracy, as in the original."""
        letters = {q.key: parse_letter(answers[q.key]) for q in questions if q.key in answers}
        credit = {
            q.key: float(option_index(letters.get(q.key, FAILED), len(q.choices)) == LETTERS.index(q.truth))
            for q in questions
        }
        pictured = [q for q in questions if q.images]
        asked = [q for q in pictured if q.key in answers]
        notes = []
        if len(asked) < len(pictured):
            notes.append(
                f"{len(pictured) - len(asked):,} questions with an image have no answer; the official scorer leaves "
                f"them out of {IMAGE_ACCURACY}, so it is not comparable"
            )
        if len(pictured) == len(questions):
            notes.append("Accuracy is over questions with an image only")
        return Score(
            metrics=[mean_metric(IMAGE_ACCURACY, asked, credit), mean_metric("Accuracy", questions, credit)],
            headline=IMAGE_ACCURACY,
            tables={
                "subject": by_group(questions, credit, [q.category for q in questions]),
                "image": by_group(questions, credit, ["with image" if q.images else "text only" for q in questions]),
                "options": by_group(questions, credit, [len(q.choices) for q in questions]),
            },
            credit=credit,
            counts={
                "letters not found": sum(letter == FAILED for letter in letters.values()),
                "unanswered": len(questions) - len(letters),
            },
            notes=notes,
        )

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """<experiment>_output.jsonl and <experiment>_result.json, as eval_science_qa.py writes them."""
        entries = [self._entry(q, answers) for q in questions]
        right = [bool(score.credit[q.key]) for q in questions]
        analysis = {
            "correct": [e for e, ok in zip(entries, right, strict=True) if ok],
            "incorrect": [e for e, ok in zip(entries, right, strict=True) if not ok],
        }
        result = {
            "acc": score["Accuracy"].value,
            "correct": sum(right),
            "count": len(questions),
            "results": {
                e["question_id"]: option_index(e["parsed_ans"], len(q.choices))
                for q, e in zip(questions, entries, strict=True)
            },
            "outputs": {e["question_id"]: e["pred"] for e in entries},
        }
        contents = {f"{experiment}_output.jsonl": analysis, f"{experiment}_result.json": result}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        return [folder / name for name in contents]

    def _entry(self, question: Question, answers: Answers) -> _Entry:
        answered = question.key in answers
        reply = answers.get(question.key, FAILED)
        return {
            "question_id": question.id,
            "parsed_ans": parse_letter(reply),
            "ground_truth": question.truth,
            "question": self.recorded_prompt(question) if answered else "Unknown",
            "pred": reply,
            "is_multimodal": answered and bool(question.images),
        }
