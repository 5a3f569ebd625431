"""VQAv2 (Goyal et al. 2017): the EvalAI upload for the test splits, whose labels are private; a score for val2014."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
)
from tinyllava_fast.eval.files import Finder, UniqueIds, llava_questions, read_json, require
from tinyllava_fast.eval.prompts import SHORT
from tinyllava_fast.eval.statistics import by_group, mean_metric
from tinyllava_fast.eval.vqa_text import normalise_m4c, official_accuracy

COUNTS = {"test-dev2015": (107394, 36807), "test2015": (447793, 81434), "val2014": (214354, 40504)}  # with images
COCO = "http://images.cocodataset.org/zips/"
OFFICIAL = "https://visualqa.org/download.html"


@dataclass(frozen=True)
class Options:
    """Settings of vqav2."""

    split: Literal["test-dev2015", "test2015", "val2014"] = "test-dev2015"
    """The test splits end in an upload file for EvalAI; val2014 is scored with the official annotations."""


@BENCHMARKS.register("vqav2")
class VQAv2(Benchmark):
    """107,394 questions of test-dev2015 about 36,807 images."""

    name = "vqav2"
    title = "VQAv2"
    Options = Options
    published = (
        Published("LLaVA-1.5-7B (test-dev)", 78.5, "overall"),
        Published("LLaVA-1.5-13B (test-dev)", 80.0, "overall"),
        Published("TinyLLaVA-Phi-2-SigLIP-3.1B (test-dev)", 80.1, "overall"),
        Published("TinyLLaVA-TinyLlama-CLIP-1.5B (test-dev)", 73.7, "overall"),
        Published("TinyLLaVA-Qwen2-0.5B-SigLIP (test-dev)", 72.3, "overall"),
    )

    def locate(self, root: Path) -> Files:
        """Question files of the split, test2015/ or val2014/, and all test2015 ids, which an upload must hold."""
        split = self.options.split
        find = Finder(self.name, root, ["vqav2"], "LLaVA's eval.zip (docs/Evaluation.md of LLaVA)")
        year = "val2014" if split == "val2014" else "test2015"
        elsewhere = [f"../{folder}/{year}" for folder in ("coco", "pope")]
        images = find.folder(year, *elsewhere, source=f"{COCO}{year}.zip")
        if split == "val2014":
            return {
                "questions": find.file(f"v2_OpenEnded_mscoco_{split}_questions.json", source=OFFICIAL),
                "annotations": find.file(f"v2_mscoco_{split}_annotations.json", source=OFFICIAL),
                "images": images,
            }
        return {
            "questions": find.file(f"llava_vqav2_mscoco_{split}.jsonl"),
            "all_ids": find.file("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json"),
            "images": images,
        }

    def questions(self, files: Files) -> list[Question]:
        """The questions of the split; those of val2014 are the official file's with the sentence that LLaVA's have."""
        if "annotations" in files:
            return _val_questions(files)
        return [
            Question(
                key=str(record["question_id"]),
                id=record["question_id"],
                images=(files["images"] / require(record, "image", f"{files['questions']}, line {line}"),),
                prompt=record["text"],
            )
            for line, record in llava_questions(files["questions"])
        ]

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """Questions and images of the split."""
        asked, images = COUNTS[self.options.split]
        return [Count("questions", len(questions), asked), Count("images", len({q.images for q in questions}), images)]

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """val2014: the challenge's accuracy of the normalised answers, a missing one being empty. Test: none."""
        if self.options.split != "val2014":
            note = "The labels are private: upload official/*.json to challenge 830 on eval.ai for the score."
            return Score(notes=[note], counts={"empty in the upload": sum(not answers.get(q.key) for q in questions)})
        credit = {q.key: official_accuracy(normalise_m4c(answers.get(q.key, "")), q.meta["answers"]) for q in questions}
        kinds = by_group(questions, credit, [q.category for q in questions])
        return Score(
            metrics=[mean_metric("overall", questions, credit), *kinds],
            headline="overall",
            tables={
                "answer type": kinds,
                "question type": by_group(questions, credit, [q.meta["question_type"] for q in questions]),
            },
            credit=credit,
        )

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """<experiment>.json for EvalAI. It is written only if every question of the split was asked."""
        if "all_ids" not in files or len(questions) < len(self.questions(files)):
            return []
        rows = upload(_all_ids(files["all_ids"]), {q.id: answers[q.key] for q in questions if q.key in answers})
        path = folder / f"{experiment}.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        return [path]


def upload(ids: Sequence[int], answers: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Rows of an EvalAI upload: every test2015 id in order with its normalised answer, "" for those not asked.

    Raises DataError if an answer belongs to none of them.
    """
    unknown = sorted(set(answers) - set(ids))
    if unknown:
        raise DataError(f"vqav2: {len(unknown)} answered ids are not in test2015, the first is {unknown[0]}")
    return [{"question_id": id, "answer": normalise_m4c(answers.get(id, ""))} for id in ids]


def _all_ids(path: Path) -> list[int]:
    if path.suffix == ".jsonl":
        return [record["question_id"] for _, record in llava_questions(path)]
    return [record["question_id"] for record in require(read_json(path), "questions", str(path))]


def _val_questions(files: Files) -> list[Question]:
    annotations = {a["question_id"]: a for a in require(read_json(files["annotations"]), "annotations", "annotations")}
    ids = UniqueIds(files["questions"])
    questions = []
    for number, record in enumerate(require(read_json(files["questions"]), "questions", str(files["questions"])), 1):
        id = record["question_id"]
        ids.add(id, number)
        if id not in annotations:
            raise DataError(f"{files['questions']}: question {id} has no annotation in {files['annotations']}")
        known = annotations[id]
        questions.append(
            Question(
                key=str(id),
                id=id,
                images=(files["images"] / f"COCO_val2014_{record['image_id']:012d}.jpg",),
                prompt=record["question"] + SHORT,
                truth=known["multiple_choice_answer"],
                category=known["answer_type"],
                meta={
                    "answers": [a["answer"] for a in known["answers"]],
                    "question_type": known["question_type"],
                },
            )
        )
    return questions
