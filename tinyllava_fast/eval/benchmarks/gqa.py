"""GQA (Hudson and Manning 2019), testdev_balanced, as LLaVA's patched ``eval.py`` scores it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import (
    BENCHMARKS,
    Answers,
    Benchmark,
    Files,
    Grades,
    Metric,
    Question,
    Score,
    published_rows,
)
from tinyllava_fast.eval.files import EVAL_ZIP, Finder, llava_questions
from tinyllava_fast.eval.statistics import by_group, mean_metric, require_answers
from tinyllava_fast.fields import Fields, read_object, shown

NOT_A_STEP = ("exist", "query: name", "choose name")


@BENCHMARKS.register("gqa")
class GQA(Benchmark):
    """12,578 compositional questions about 398 images; exact match of the lower-cased answer."""

    name = "gqa"
    title = "GQA"
    official = (12578, 398)
    published = published_rows("accuracy", 62.0, 63.3, 62.1, 58.0, 55.8)

    def locate(self, root: Path) -> Files:
        """Question file, annotations (below gqa/, data/ or questions1.2/), images (images/ or data/images/)."""
        stanford = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        find = Finder(self.name, root, ["gqa"], EVAL_ZIP)
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
        annotations = read_object(files["annotations"])
        questions = []
        for asked in llava_questions(files["questions"]):
            id = str(asked.id)
            if id not in annotations.values:
                raise DataError(f"{asked.where}: question {shown(id)} is not in {files['annotations']}")
            known = annotations.mapping(id)
            types = known.mapping("types")
            questions.append(
                Question(
                    key=id,
                    id=asked.id,
                    images=(files["images"] / asked.image,),
                    prompt=asked.text,
                    truth=known.text("answer"),
                    category=types.text("structural"),
                    meta={
                        "isBalanced": known.boolean("isBalanced"),
                        "semantic type": types.text("semantic"),
                        "group": _global_group(known.mapping("groups")),
                        "steps": steps(known.mappings("semantic", empty=True)),
                        "words": len(known.text("question").split()),
                    },
                )
            )
        return questions

    def score(self, questions: Sequence[Question], answers: Answers, grades: Grades | None = None) -> Score:
        """Accuracy over balanced questions, binary and open apart, and the official breakdowns."""
        asked = [q for q in questions if q.meta["isBalanced"]]
        require_answers(self.name, asked, answers)
        said = {q.key: prediction(answers[q.key]) for q in asked}
        credit = {q.key: float(said[q.key] == q.truth) for q in asked}
        kinds = [q.category for q in asked]
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
                "semantic type": by_group(asked, credit, [q.meta["semantic type"] for q in asked]),
                "steps": by_group(asked, credit, [q.meta["steps"] for q in asked]),
                "words": by_group(asked, credit, [q.meta["words"] for q in asked]),
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


def steps(program: Sequence[Fields]) -> int:
    """Reasoning steps of a question's program: its operations but those that only look or name."""
    texts = [f"{step.text('operation')}: {step.text('argument', empty=True)}" for step in program]
    return sum(not any(trivial in text for trivial in NOT_A_STEP) for text in texts)


def _global_group(groups: Fields) -> str | None:
    """The group of a question among all images; null is official and means none, a missing one is an error."""
    return groups.text("global", None) if "global" in groups.values else groups.text("global")


def distribution(questions: Sequence[Question], said: Mapping[str, str]) -> float:
    """Chi-square of predicted against true answers in each global group, weighted by size, over 100; 0 is best."""
    gold: dict[str, Counter[str]] = {}
    predicted: dict[str, Counter[str]] = {}
    for q in questions:
        group = q.meta["group"]
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
