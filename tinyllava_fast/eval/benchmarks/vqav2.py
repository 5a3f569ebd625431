"""VQAv2 (Goyal et al. 2017): the EvalAI upload for the test splits, whose labels are private; a score for val2014."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    Question,
    Score,
    published_rows,
    questions_and_images,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, UniqueIds, llava_questions
from tinyllava_fast.eval.prompts import SHORT
from tinyllava_fast.eval.statistics import by_group, mean_metric
from tinyllava_fast.eval.vqa_text import normalize_m4c, official_accuracy
from tinyllava_fast.fields import Fields, read_jsonl, read_object, shown

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
    published = published_rows("overall", 78.5, 80.0, 80.1, 73.7, 72.3, split="test-dev")

    def locate(self, root: Path) -> Files:
        """Question files of the split, test2015/ or val2014/, and all test2015 ids, which an upload must hold."""
        split = self.options.split
        find = Finder(self.name, root, ["vqav2"], EVAL_ZIP)
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
        known = set(_all_ids(files["all_ids"]))
        questions = []
        for asked in llava_questions(files["questions"]):
            if asked.id not in known:
                raise DataError(f"{asked.where}: question {shown(asked.id)} is not in {files['all_ids']}")
            image = files["images"] / asked.image
            questions.append(Question(key=str(asked.id), id=asked.id, images=(image,), prompt=asked.text))
        return questions

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """Questions and images of the split."""
        return questions_and_images(questions, *COUNTS[self.options.split])

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """val2014: the challenge's accuracy of the normalized answers, a missing one being empty. Test: none."""
        if self.options.split != "val2014":
            note = "The labels are private: upload official/*.json to challenge 830 on eval.ai for the score."
            return Score(notes=[note], counts={"empty in the upload": sum(not answers.get(q.key) for q in questions)})
        credit = {q.key: official_accuracy(normalize_m4c(answers.get(q.key, "")), q.meta["answers"]) for q in questions}
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


def upload(ids: Sequence[str | int], answers: Mapping[str | int, str]) -> list[dict[str, str | int]]:
    """Rows of an EvalAI upload: every test2015 id in order with its normalized answer, "" for those not asked.

    Raises DataError if an answer belongs to none of them.
    """
    unknown = sorted(set(answers) - set(ids), key=str)
    if unknown:
        raise DataError(f"vqav2: {len(unknown)} answered ids are not in test2015, the first is {unknown[0]}")
    return [{"question_id": id, "answer": normalize_m4c(answers.get(id, ""))} for id in ids]


def _all_ids(path: Path) -> list[str | int]:
    seen, found = UniqueIds(path), []
    by_line = path.suffix == ".jsonl"
    for number, row in read_jsonl(path) if by_line else enumerate(read_object(path).mappings("questions"), 1):
        found.append(row.identifier("question_id"))
        seen.add(found[-1], number)
    return found


def _val_questions(files: Files) -> list[Question]:
    annotations: dict[str | int, Fields] = {}
    for number, row in enumerate(read_object(files["annotations"]).mappings("annotations")):
        if annotations.setdefault(row.identifier("question_id"), row) is not row:
            raise DataError(f"{files['annotations']}: annotations[{number}]: its question_id stands in an earlier one")
    ids = UniqueIds(files["questions"])
    questions = []
    for number, record in enumerate(read_object(files["questions"]).mappings("questions"), 1):
        id = record.identifier("question_id")
        ids.add(id, number)
        if id not in annotations:
            raise DataError(f"{record.where}: question {shown(id)} has no annotation in {files['annotations']}")
        known, image = annotations[id], record.integer("image_id", least=0, most=10**12 - 1)
        answers = [a.text("answer", empty=True) for a in known.mappings("answers")]
        if len(answers) != 10:
            raise DataError(f"{known.where}: {len(answers)} answers instead of ten")
        questions.append(
            Question(
                key=str(id),
                id=id,
                images=(files["images"] / f"COCO_val2014_{image:012d}.jpg",),
                prompt=record.text("question") + SHORT,
                truth=known.text("multiple_choice_answer", empty=True),
                category=known.text("answer_type"),
                meta={"answers": answers, "question_type": known.text("question_type")},
            )
        )
    return questions
