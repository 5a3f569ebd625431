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
    Count,
    Files,
    Grades,
    Published,
    Question,
    Score,
    line_key,
)
from tinyllava_fast.eval.files import Finder, llava_questions, read_json, require
from tinyllava_fast.eval.prompts import SHORT
from tinyllava_fast.eval.statistics import mean_metric
from tinyllava_fast.eval.vqa_text import m4c_accuracy

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
    Options = Options
    published = (
        Published("LLaVA-1.5-7B", 58.2, "accuracy"),
        Published("LLaVA-1.5-13B", 61.3, "accuracy"),
        Published("TinyLLaVA-Phi-2-SigLIP-3.1B", 60.3, "accuracy"),
        Published("TinyLLaVA-TinyLlama-CLIP-1.5B", 46.3, "accuracy"),
        Published("TinyLLaVA-Qwen2-0.5B-SigLIP", 45.2, "accuracy"),
    )

    def locate(self, root: Path) -> Files:
        """Question file, annotations, train_images/."""
        meta = "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
        find = Finder(self.name, root, ["textvqa"], "LLaVA's eval.zip (docs/Evaluation.md of LLaVA)")
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
        annotations = {}
        for number, row in enumerate(require(read_json(files["annotations"]), "data", str(files["annotations"]))):
            if len(row["answers"]) != 10:
                raise DataError(f"{files['annotations']}, data[{number}]: {len(row['answers'])} answers instead of ten")
            annotations[row["image_id"], row["question"].lower()] = row
        questions: list[Question] = []
        for line, record in llava_questions(files["questions"], unique=False):
            where = f"{files['questions']}, line {line}"
            id, asked = str(record["question_id"]), prompt_question(record["text"])
            if asked is None:
                raise DataError(f"{where}: not a TextVQA prompt: {record['text']!r}")
            row = annotations.get((id, asked))
            if row is None:
                raise DataError(f"{where}: no annotation of image {id!r} asks {asked!r} in {files['annotations']}")
            prompt = record["text"]
            if not self.options.ocr:
                prompt = row["question"] + SHORT
            questions.append(
                Question(
                    key=line_key(len(questions), id),
                    id=record["question_id"],
                    images=(files["images"] / record["image"],),
                    prompt=prompt,
                    truth=max(row["answers"], key=row["answers"].count),
                    meta={"answers": row["answers"], "asked": asked},
                )
            )
        return questions

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """5,000 questions about 3,166 images."""
        images = len({q.images for q in questions})
        return [Count("questions", len(questions), 5000), Count("images", images, 3166)]

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


def prompt_question(prompt: str) -> str | None:
    """The question in one of the prompt forms of LLaVA's files, lower-cased; None for any other text."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1).lower() if found else None
    lines = prompt.split("\n")
    if len(lines) == 3 and f"{OCR_LINE} " in prompt:
        return lines[1 if prompt.startswith(OCR_LINE) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None
