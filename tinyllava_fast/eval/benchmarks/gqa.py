"""GQA (Hudson and Manning 2019), testdev_balanced, as LLaVA's patched ``eval.py`` scores it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Count,
    Files,
    Grades,
    Metric,
    Published,
    Question,
    Score,
)
from tinyllava_fast.eval.files import Finder, llava_questions, read_json
from tinyllava_fast.eval.statistics import by_group, mean_metric, require_answers

NOT_A_STEP = ("exist", "query: name", "choose name")


@BENCHMARKS.register("gqa")
class GQA(Benchmark):
    """12,578 compositional questions about 398 images; exact match of the lower-cased answer."""

    name = "gqa"
    title = "GQA"
    published = (
        Published("LLaVA-1.5-7B", 62.0, "accuracy"),
        Published("LLaVA-1.5-13B", 63.3, "accuracy"),
        Published("TinyLLaVA-Phi-2-SigLIP-3.1B", 62.1, "accuracy"),
        Published("TinyLLaVA-TinyLlama-CLIP-1.5B", 58.0, "accuracy"),
        Published("TinyLLaVA-Qwen2-0.5B-SigLIP", 55.8, "accuracy"),
    )

    def locate(self, root: Path) -> Files:
        """Question file, annotations (below gqa/, data/ or questions1.2/), images (images/ or data/images/)."""
        stanford = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        find = Finder(self.name, root, ["gqa"], "LLaVA's eval.zip (docs/Evaluation.md of LLaVA)")
        annotations = "testdev_balanced_questions.json"
        return {
            "questions": find.file("llava_gqa_testdev_balanced.jsonl"),
            "annotations": find.file(
                *(f"{folder}{annotations}" for folder in ("", "data/", "data/questions1.2/", "questions1.2/")),
                source=f"{stanford} (questions)",
            ),
            "images": find.folder("images", "data/images", source=f"{stanford} (images)"),
        }

    def questions(self, files: Files) -> list[Question]:
        """The lines of the question file with the annotations of the same id."""
        annotations = read_json(files["annotations"])
        questions = []
        for line, record in llava_questions(files["questions"]):
            id = str(record["question_id"])
            known = annotations.get(id)
            if known is None:
                raise DataError(f"{files['questions']}, line {line}: question {id!r} is not in {files['annotations']}")
            questions.append(
                Question(
                    key=id,
                    id=record["question_id"],
                    images=(files["images"] / record["image"],),
                    prompt=record["text"],
                    truth=known["answer"],
                    category=known["types"]["structural"],
                    meta=known,
                )
            )
        return questions

    def counts(self, files: Files, questions: Sequence[Question]) -> list[Count]:
        """12,578 questions about 398 images."""
        images = len({q.images for q in questions})
        return [Count("questions", len(questions), 12578), Count("images", images, 398)]

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Accuracy over balanced questions, binary and open apart, and the official breakdowns."""
        asked = [q for q in questions if q.meta["isBalanced"]]
        require_answers(self.name, asked, answers)
        said = {q.key: prediction(answers[q.key]) for q in asked}
        credit = {q.key: float(said[q.key] == q.truth) for q in asked}
        kinds = [q.meta["types"]["structural"] for q in asked]
        binary = [q for q, kind in zip(asked, kinds, strict=True) if kind != "query"]
        openly = [q for q, kind in zip(asked, kinds, strict=True) if kind == "query"]
        return Score(
            metrics=[
                mean_metric("accuracy", asked, credit),
                mean_metric("binary", binary, credit),
                mean_metric("open", openly, credit),
                Metric(name="distribution", value=distribution(asked, said), scale=0, questions=len(asked)),
            ],
            headline="accuracy",
            tables={
                "structural type": by_group(asked, credit, kinds),
                "semantic type": by_group(asked, credit, [q.meta["types"]["semantic"] for q in asked]),
                "steps": by_group(asked, credit, [steps(q.meta["semantic"]) for q in asked]),
                "words": by_group(asked, credit, [len(q.meta["question"].split()) for q in asked]),
            },
            credit=credit,
        )

    def outputs(
        self, questions: Sequence[Question], answers: Answers, score: Score, files: Files, folder: Path, experiment: str
    ) -> list[Path]:
        """testdev_balanced_predictions.json, which the official eval.py reads."""
        rows = [{"questionId": q.id, "prediction": prediction(answers[q.key])} for q in questions if q.key in answers]
        path = folder / "testdev_balanced_predictions.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        return [path]


def prediction(text: str) -> str:
    """An answer in the form that is compared: without full stops at the end, lower-cased."""
    return text.rstrip(".").lower()


def steps(program: Sequence[Mapping[str, Any]]) -> int:
    """Reasoning steps of a question's program: its operations but those that only look or name."""
    texts = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(not any(trivial in text for trivial in NOT_A_STEP) for text in texts)


def distribution(questions: Sequence[Question], said: Mapping[str, str]) -> float:
    """Chi-square of predicted against true answers in each global group, weighted by size, over 100; 0 is best."""
    gold: dict[str, Counter[str]] = {}
    predicted: dict[str, Counter[str]] = {}
    for q in questions:
        group = q.meta["groups"]["global"]
        if group is not None:
            gold.setdefault(group, Counter())[q.truth] += 1
            predicted.setdefault(group, Counter())[said[q.key]] += 1
    total = sum(truth.total() for truth in gold.values())
    if not total:
        return 0.0
    squares = (
        sum((predicted[group][answer] - count) ** 2 / count for answer, count in truth.items()) * truth.total()
        for group, truth in gold.items()
    )
    return sum(squares) / total / 100
