"""TextVQA's scores and joins on the vectors of the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval.golden import GOLDEN, load
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
from tinyllava_fast.eval.benchmarks.textvqa import Options, prompt_question
from tinyllava_fast.eval.official import read_answers
from tinyllava_fast.eval.prompts import SHORT

TEXTVQA = BENCHMARKS.get("textvqa")
SYNTHETIC = GOLDEN / "textvqa" / "synthetic"
FILES = {
    "questions": SYNTHETIC / "llava_textvqa_val_v051_ocr.jsonl",
    "annotations": SYNTHETIC / "TextVQA_0.5.1_val.json",
    "images": Path("train_images"),
}


def test_synthetic_vectors(tmp_path):
    bench, expected = TEXTVQA(), load("textvqa/synthetic/expected.json")
    questions = bench.questions(FILES)
    answers = read_answers(SYNTHETIC / "answers.jsonl", bench, questions)
    score = bench.score(questions, answers)
    assert round(score["accuracy"].value, 2) == expected["accuracy_percent"] and len(answers) == 60
    assert [score.credit[key] for key in answers] == pytest.approx(expected["per_row_accuracy_in_file_order"])
    assert bench.score(questions, dict(reversed(answers.items()))) == score

    half = tmp_path / "half.jsonl"
    half.write_text("".join((SYNTHETIC / "answers.jsonl").read_text().splitlines(keepends=True)[:30]))
    partly = bench.score(questions, read_answers(half, bench, questions))
    official = next(c for c in expected["cases"] if c["case"] == "half of the predictions only")["result"]
    assert round(partly["accuracy"].value, 2) == official["accuracy_percent"] and partly["accuracy"].questions == 30
    assert "30 questions have no answer" in partly.notes[1]


def test_prompt_question():
    vectors = load("textvqa/prompt_question.jsonl")
    assert [prompt_question(v["prompt"]) for v in vectors] == [v.get("question") for v in vectors]


def test_without_the_ocr_line():
    bench = TEXTVQA(Options(ocr=False))
    questions = bench.questions(FILES)
    assert all("OCR" not in q.prompt and q.prompt.endswith(SHORT) for q in questions)
    assert "without" in bench.score(questions, {}).notes[0]
    assert read_answers(SYNTHETIC / "answers.jsonl", bench, questions)  # answers given with it can still be scored


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "a\nb\nc\nd"}, "line 1: not a TextVQA prompt"),
        ({"text": f"Another question?{SHORT}"}, "line 1: no annotation of image"),
        ({"question_id": "none"}, "line 1: no annotation of image 'none'"),
    ],
)
def test_bad_questions(tmp_path, change, said):
    record = json.loads(FILES["questions"].read_text().splitlines()[0]) | change
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=said):
        TEXTVQA().questions({**FILES, "questions": tmp_path / "q.jsonl"})


def test_nine_answers(tmp_path):
    data = load("textvqa/synthetic/TextVQA_0.5.1_val.json")
    data["data"][3]["answers"].pop()
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"a\.json: data\[3\]: 9 answers instead of ten"):
        TEXTVQA().questions({**FILES, "annotations": tmp_path / "a.json"})
