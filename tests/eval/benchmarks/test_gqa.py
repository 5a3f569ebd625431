"""GQA's scores on the vectors of its official script."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.eval.golden import GOLDEN, rows, value
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.gqa import prediction

BENCH = BENCHMARKS.get("gqa")()
SYNTHETIC = GOLDEN / "gqa" / "synthetic"
FILES = {
    "questions": SYNTHETIC / "llava_gqa_testdev_balanced.jsonl",
    "annotations": SYNTHETIC / "testdev_balanced_questions.json",
    "images": Path("images"),
}
ANSWERS = {r["question_id"]: r["text"] for r in rows("gqa/synthetic/answers.jsonl")}


def check(score, expected):
    for metric, name in (("accuracy", "Accuracy"), ("binary", "Binary"), ("open", "Open")):
        assert round(score[metric].value, 2) == expected[name]
    assert round(score["distribution"].value, 2) == expected["Distribution"]
    for title, name in (("structural type", ""), ("semantic type", ""), ("steps", " number"), ("words", " number")):
        rows = {m.name: {"percent": round(m.value, 2), "n": m.questions} for m in score.tables[title]}
        assert rows == expected[f"Accuracy / {title}{name}"]


def test_synthetic_vectors(tmp_path):
    questions = BENCH.questions(FILES)
    check(score := BENCH.score(questions, ANSWERS), value("gqa/synthetic/expected.json")["scores"])
    assert 0 < score["accuracy"].stderr < 10
    shuffled = random.Random(0).sample(sorted(ANSWERS), len(ANSWERS))
    assert BENCH.score(questions, {key: ANSWERS[key] for key in shuffled}) == score
    expected = value("gqa/synthetic/expected_testdev_balanced_predictions.json")
    (path,) = BENCH.outputs(questions, ANSWERS, score, FILES, tmp_path, "x")
    written = rows_by_id(value(str(path)))
    assert written == rows_by_id(expected)


def rows_by_id(found):
    return {row["questionId"]: row["prediction"] for row in found}


def test_official_rows(tmp_path):
    annotations = GOLDEN / "gqa/official_rows/val_balanced_questions_5rows.json"
    known = json.loads(annotations.read_text()).items()
    lines = [{"question_id": id, "image": a["imageId"], "text": a["question"]} for id, a in known]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = BENCH.questions({**FILES, "questions": tmp_path / "q.jsonl", "annotations": annotations})
    answers = rows_by_id(value("gqa/official_rows/predictions.json"))
    check(BENCH.score(questions, answers), value("gqa/official_rows/expected.json")["scores"])


def test_prediction_form():
    vectors = rows("gqa/prediction_form.jsonl")
    assert [prediction(v["text"]) for v in vectors] == [v["prediction"] for v in vectors]


def test_a_missing_balanced_answer_is_refused():
    questions = BENCH.questions(FILES)
    asked = next(q for q in questions if q.meta["isBalanced"])
    with pytest.raises(DataError, match=r"gqa: 1 of 141 questions have no answer"):
        BENCH.score(questions, {k: v for k, v in ANSWERS.items() if k != asked.key})


def test_an_id_without_annotation(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": "1", "image": "a.jpg", "text": "x"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: question '1' is not in"):
        BENCH.questions({**FILES, "questions": tmp_path / "q.jsonl"})
