"""ScienceQA: the official numbers."""

from __future__ import annotations

import json
import random

import pytest

from tests.eval import golden, layouts
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.benchmarks.sqa import LETTERS, Options, ScienceQA, option_index, parse_letter

G, REAL = "scienceqa", "real_llava15_13b/scienceqa"


@pytest.fixture
def files(tmp_path):
    layouts.sqa(tmp_path)
    return ScienceQA().locate(tmp_path)


@pytest.mark.parametrize("row", golden.load(f"{G}/parse.jsonl"), ids=lambda r: repr(r["text"])[:30])
def test_letters(row):
    letter = parse_letter(row["text"])
    assert (letter, option_index(letter, row["n_choices"])) == (row["parsed"], row["index"])


@pytest.fixture(scope="module")
def real():
    """LLaVA-1.5-13B's questions and answers."""
    at = golden.shared(REAL)
    questions = [
        Question(
            key=p["id"],
            id=p["id"],
            images=(golden.GOLDEN / p["id"],) if p["has_image"] else (),
            prompt="",
            truth=LETTERS[p["answer"]],
            choices=("",) * p["n_choices"],
        )
        for p in golden.load(at / "problems_trimmed.jsonl")
    ]
    return questions, {a["question_id"]: a["text"] for a in golden.load(at / "answers.jsonl")}


def test_llava_13b(real, tmp_path):
    questions, answers = real
    expected = golden.load(golden.shared(REAL) / "expected.json")
    bench = ScienceQA()
    score = bench.score(questions, answers)
    assert f"{score['Accuracy'].value:.2f}" == "74.39" and f"{score['IMG-Accuracy'].value:.2f}" == "71.64"
    assert score["Accuracy"].value == pytest.approx(expected["acc_percent"], abs=1e-12)
    assert sum(score.credit.values()) == expected["correct"]
    assert sum(score.credit[q.key] for q in questions if q.images) == expected["img_correct"]
    assert score["IMG-Accuracy"].questions == expected["img_count"]
    assert score.counts["letters not found"] == expected["failed_to_parse"]
    paths = bench.outputs(questions, answers, score, {}, tmp_path, "x")
    assert [p.name for p in paths] == ["x_output.jsonl", "x_result.json"]
    result = json.loads(paths[1].read_text())
    assert result["results"] == golden.load(golden.shared(REAL) / "official_result_indices.json")
    assert (result["correct"], result["count"]) == (3155, 4241)


def test_order_means_nothing(real):
    questions, answers = real
    shuffled = random.Random(0).sample(questions, len(questions))
    turned = dict(reversed(answers.items()))
    assert ScienceQA().score(shuffled, turned).credit == ScienceQA().score(questions, answers).credit


def test_synthetic_files(tmp_path):
    """Read from the official layout; two questions have no answer."""
    expected = golden.load(f"{G}/synthetic/expected.json")
    for name in ("llava_test_CQM-A.json", "problems.json", "pid_splits.json"):
        (tmp_path / name).write_text(golden.text(f"{G}/synthetic/{name}"))
    (tmp_path / "images").mkdir()
    bench = ScienceQA()
    files = bench.locate(tmp_path)
    questions = bench.questions(files)
    lines = golden.load(f"{G}/synthetic/answers.jsonl")
    answers = {line["question_id"]: line["text"] for line in lines}
    score = bench.score(questions, answers)
    assert f"{score['Accuracy'].value:.2f}%" == "50.00%" and f"{score['IMG-Accuracy'].value:.2f}%" == "57.89%"
    assert score["IMG-Accuracy"].questions == expected["img_count"] and score.counts["unanswered"] == 2
    assert "not comparable" in score.notes[0]
    for id, row in expected["per_question"].items():
        assert score.credit[id] == row["correct"] and parse_letter(answers.get(id, "FAILED")) == row["parsed"]
    analysis = json.loads(bench.outputs(questions, answers, score, files, tmp_path, "x")[0].read_text())
    assert {e["question_id"]: e["is_multimodal"] for e in analysis["correct"] + analysis["incorrect"]} == {
        id: row["is_multimodal"] for id, row in expected["per_question"].items()
    }


def test_prompts(files):
    questions = ScienceQA().questions(files)
    assert questions[0].prompt == (
        "Question 0?\nA. option 0\nB. option 1\nAnswer with the option's letter from the given choices directly."
    )
    assert all(path.exists() for q in questions for path in q.images)
    recorded = [ScienceQA().recorded_prompt(q) for q in questions]
    assert all(ScienceQA().is_asked_by(q, said) for q, said in zip(questions, recorded, strict=True))
    assert " USER: <image>\nQuestion 0?" in recorded[0] and "<image>" not in recorded[2]
    assert recorded[2].endswith("choices directly. ASSISTANT:")
    assert str(ScienceQA().counts(files, questions)[0]) == "questions: 9 found, 4,241 expected (-4,232)"


def test_images_only(files):
    bench = ScienceQA(Options(images_only=True))
    questions = bench.questions(files)
    assert len(questions) == 6 and all(q.images for q in questions)
    assert "with an image only" in bench.score(questions, {q.key: "A" for q in questions}).notes[0]


def test_bad_files(files, tmp_path):
    with pytest.raises(DataError, match=r"sqa: llava_test_CQM-A.json is missing(.|\n)*eval.zip"):
        ScienceQA().locate(tmp_path / "scienceqa" / "images")
    records = json.loads(files["questions"].read_text())
    files["questions"].write_text(json.dumps([*records, records[0]]))
    with pytest.raises(DataError, match=r"CQM-A.json, line 10: '10' stands in line 1 already"):
        ScienceQA().questions(files)
    files["questions"].write_text(json.dumps([{**records[0], "id": "nope"}]))
    with pytest.raises(DataError, match=r"problems.json: no problem 'nope'"):
        ScienceQA().questions(files)
    problems = json.loads(files["problems"].read_text())
    problems["10"]["answer"] = 2
    files["problems"].write_text(json.dumps(problems))
    files["questions"].write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"10: answer: expected the index of one of its 2 choices, got 2"):
        ScienceQA().questions(files)
