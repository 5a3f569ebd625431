"""TextVQA 0.5.1 (Singh et al. 2019), validation set, as TinyLLaVA's and LLaVA's ``eval_textvqa.py`` score it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Files,
    Grades,
    Question,
    Score,
    line_key,
    published_rows,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, llava_questions
from tinyllava_fast.eval.prompts import SHORT
from tinyllava_fast.eval.statistics import mean_metric
from tinyllava_fast.eval.vqa_text import m4c_accuracy
from tinyllava_fast.fields import read_object, shown

OCR_LINE = "Reference OCR token:"


@dataclass(frozen=True)
class Options:
    """Settings of textvqa."""

    ocr: bool = True
    """Keep the line of OCR tokens in the prompt, as the published numbers of LLaVA-1.5 and TinyLLaVA do."""


@BENCHMARKS.register("textvqa")
class TextVQA(Benchmark):
    """5,000 questions about text in 3,166 images; soft accuracy against ten answers."""

    name = "textvqa"
    title = "TextVQA"
    official = (5000, 3166)
    Options = Options
    published = published_rows("accuracy", 58.2, 61.3, 60.3, 46.3, 45.2)

    def locate(self, root: Path) -> Files:
        """Question file, annotations, train_images/."""
        meta = "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
        find = Finder(self.name, root, ["textvqa"], EVAL_ZIP)
        return {
            "questions": find.file("llava_textvqa_val_v051_ocr.jsonl"),
            "annotations": find.file("TextVQA_0.5.1_val.json", source=meta),
            "images": find.folder(
                "train_images",
                "train_val_images/train_images",
                source="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            ),
        }

    def questions(self, files: Files) -> list[Question]:
        """The lines of the question file. Ids are image ids and repeat: annotations are joined by (image, question)."""
        annotations = _annotations(files["annotations"])
        questions: list[Question] = []
        for record in llava_questions(files["questions"], unique=False):
            id, asked = str(record.id), prompt_question(record.text)
            if asked is None:
                raise DataError(f"{record.where}: not a TextVQA prompt: {shown(record.text)}")
            if (id, asked) not in annotations:
                raise DataError(
                    f"{record.where}: no annotation of image {shown(id)} asks {shown(asked)} in {files['annotations']}"
                )
            question, answers = annotations[id, asked]
            questions.append(
                Question(
                    key=line_key(len(questions), id),
                    id=record.id,
                    images=(files["images"] / record.image,),
                    prompt=record.text if self.options.ocr else question + SHORT,
                    truth=max(answers, key=answers.count),
                    meta={"answers": answers, "asked": asked},
                )
            )
        return questions

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Mean soft accuracy over the questions that have an answer, as the official script takes it."""
        answered = [q for q in questions if q.key in answers]
        credit = {q.key: m4c_accuracy(answers[q.key], q.meta["answers"]) for q in answered}
        said = "with" if self.options.ocr else "without"
        notes = [f"The prompts are {said} the line of OCR tokens (textvqa.ocr={str(self.options.ocr).lower()})."]
        if len(answered) < len(questions):
            notes.append(
                f"{len(questions) - len(answered):,} questions have no answer and are left out, as officially."
            )
        metrics = [mean_metric("accuracy", answered, credit)]
        return Score(metrics=metrics, headline="accuracy", credit=credit, notes=notes)

    def is_asked_by(self, question: Question, prompt: str) -> bool:
        """By the question in it, so that answers with and without OCR tokens are both accepted."""
        return prompt_question(prompt) == question.meta["asked"]


def _annotations(path: Path) -> dict[tuple[str, str], tuple[str, list[str]]]:
    """(image, question in lower case) -> the question and its ten answers."""
    found = {}
    for row in read_object(path).mappings("data"):
        question, answers = row.text("question"), row.texts("answers")
        if len(answers) != 10:
            raise DataError(f"{row.where}: {len(answers)} answers instead of ten")
        found[row.text("image_id"), question.lower()] = (question, answers)
    return found


def prompt_question(prompt: str) -> str | None:
    """The question in one of the prompt forms of LLaVA's files, lower-cased; None for any other text."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1).lower() if found else None
    lines = prompt.split("\n")
    if len(lines) == 3 and f"{OCR_LINE} " in prompt:
        return lines[1 if prompt.startswith(OCR_LINE) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None
