"""MME: the official numbers for invented questions, and for the official answers where they lie."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.eval import golden, layouts
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Question, line_key
from tinyllava_fast.eval.benchmarks.mme import GROUPS, MME, SUBTASKS, parse_yes_no

REAL = "real_llava15_13b/mme"


def numbers(score):
    parts = {m.name: m.value for table in score.tables.values() for m in table}
    return {"subtask": parts, "perception": score["Perception"].value, "cognition": score["Cognition"].value}


def official(expected):
    return {name: expected[name] for name in ("subtask", "perception", "cognition")}


def texts_below(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}


@pytest.fixture(scope="module", params=["stored", "shared"])
def synthetic(request, tmp_path_factory):
    """Invented questions with the truths of MME's first rows, as stored, and these rows as MME has them."""
    root, at = tmp_path_factory.mktemp("mme"), golden.source(request.param, "mme/synthetic")
    if request.param == "stored":  # one file stands for a folder
        truths, written = (
            golden.load(at / f"{name}.json") for name in ("ground_truth_files", "expected_eval_tool_txt")
        )
    else:
        truths = texts_below(at / "MME_Benchmark_release_version")
        written = texts_below(at / "expected_eval_tool_txt")
    for name, content in truths.items():
        path = root / "MME_Benchmark_release_version" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    golden.unpack(at / "llava_mme.jsonl", root / "llava_mme.jsonl")
    bench = MME()
    files = bench.locate(root)
    questions = bench.questions(files)
    lines = golden.load(at / "answers.jsonl")
    answers = {q.key: line["text"] for q, line in zip(questions, lines, strict=True)}
    assert all(bench.is_asked_by(q, line["prompt"]) for q, line in zip(questions, lines, strict=True))
    expected = golden.load(at / "expected.json") | {"written": written}
    return bench, files, questions, answers, expected


@pytest.mark.parametrize("row", golden.load("mme/parse.jsonl"), ids=lambda r: repr(r["answer"]))
def test_parse(row):
    assert parse_yes_no(row["answer"]) == row["parsed"]


def test_synthetic_files(synthetic, tmp_path):
    bench, files, questions, answers, expected = synthetic
    score = bench.score(questions, answers)
    assert numbers(score) == official(expected)
    for subtask, counts in expected["counts"].items():
        asked = [q for q in questions if q.category == subtask]
        assert len(asked) == counts["questions"] and sum(score.credit[q.key] for q in asked) == counts["correct"]
    assert score.counts["neither yes nor no"] == sum(c["other"] for c in expected["counts"].values())
    paths = bench.outputs(questions, answers, score, files, tmp_path, "model")
    texts = {p.name: p.read_text() for p in paths}
    assert texts == expected["written"]


def test_defects(synthetic):
    bench, _, questions, answers, expected = synthetic
    first = [q for q in questions if q.category == "existence"]
    for missing in (first[1:2], first[1:3]):  # the official tool stops at one, and pairs wrongly after two
        rest = {key: text for key, text in answers.items() if key not in {q.key for q in missing}}
        with pytest.raises(DataError, match=rf"mme: {len(missing)} of \d+ questions have no answer"):
            bench.score(questions, rest)
    whole = bench.score(questions, answers).credit
    for end in ("\t", "\nmore", "\n"):  # each stops the official tool
        changed = {**answers, first[0].key: answers[first[0].key] + end}
        assert bench.score(questions, changed).credit == whole
    cases = {c["case"]: c["result"] for c in expected["defect_cases"]}
    older = "with scikit-learn 1.3.2"
    empty = bench.score(questions, dict.fromkeys(answers, ""))
    assert numbers(empty) == official(cases["all empty"][older])
    one = bench.score(questions, {**answers, **{q.key: "" for q in first}})
    assert numbers(one) == official(cases["one subtask all empty"][older])
    assert numbers(bench.score(questions, dict.fromkeys(answers, "Yes"))) == official(cases["all yes"])


@pytest.fixture(scope="module")
def real():
    """LLaVA-1.5-13B's answers, joined to the truths as the benchmark does."""
    answers = golden.load(golden.shared(REAL) / "answers.jsonl")
    truths = {}
    for row in golden.load(golden.shared(REAL) / "ground_truth.jsonl"):
        truths.setdefault((row["subtask"], row["file"]), {})[" ".join(row["question"].split())] = row["answer"]
    questions = []
    for i, line in enumerate(answers):
        subtask, file = line["question_id"].split("/")[0], line["question_id"].split("/")[-1].split(".")[0] + ".txt"
        asked = line["prompt"].replace("Answer the question using a single word or phrase.", "").strip()
        known = truths[subtask, file]
        spelling = " ".join(asked.split())
        truth = known.get(spelling) or known[f"{spelling} Please answer yes or no."]
        id = line["question_id"]
        questions.append(
            Question(key=line_key(i, id), id=id, images=(golden.GOLDEN / id,), prompt="", truth=truth, category=subtask)
        )
    return questions, {q.key: line["text"] for q, line in zip(questions, answers, strict=True)}


def test_llava_13b(real):
    questions, answers = real
    expected = golden.load(golden.shared(REAL) / "expected.json")
    score = MME().score(questions, answers)
    assert numbers(score) == official(expected)
    assert [str(c) for c in MME().counts({}, questions)] == ["questions: 2,374", "images: 1,187", "subtasks: 14"]
    assert not score.notes
    shuffled = MME().score(random.Random(1).sample(questions, len(questions)), dict(reversed(answers.items())))
    assert shuffled.credit == score.credit and shuffled["Perception"].value == pytest.approx(1531.3187274909965)


def test_errors_are_clustered_by_image(real):
    questions, answers = real
    score = MME().score(questions, answers)
    variance = {}
    for subtask in GROUPS["Perception"]:
        images = {}
        for q in (q for q in questions if q.category == subtask):
            images.setdefault(q.id, []).append(score.credit[q.key])
        values = np.array([100 * sum(marks) / 2 + 100 * min(marks) for marks in images.values()])
        variance[subtask] = values.var() / len(values)  # subtasks share no image
    assert score["Perception"].stderr == pytest.approx(sum(variance.values()) ** 0.5)
    assert score.tables["Perception"][2].stderr == pytest.approx(variance["position"] ** 0.5)


def test_part_of_the_benchmark(real):
    questions, answers = real
    part = [q for q in questions if q.category in ("existence", "OCR")][:-1]
    score = MME().score(part, answers)
    assert [m.name for m in score.tables["Perception"]] == ["existence", "OCR"] and "Cognition" not in score.tables
    assert "2 of 10 subtasks" in score.notes[0] and "one question here" in score.notes[2]


@pytest.mark.parametrize("nested", [False, True])
def test_layouts(tmp_path, nested):
    layouts.mme(tmp_path, nested=nested)
    bench = MME()
    questions = bench.questions(bench.locate(tmp_path))
    assert len(questions) == 4 * len(SUBTASKS) and len({q.key for q in questions}) == len(questions)
    assert all(q.images[0].exists() for q in questions)
    color = next(q for q in questions if q.category == "color")
    assert color.meta["question"] == "Is there a cat in image 0?  Please answer yes or no."
    assert color.prompt == "Is there a cat in image 0?\nAnswer the question using a single word or phrase."


def test_bad_files(tmp_path):
    layouts.mme(tmp_path)
    bench, files = MME(), MME().locate(tmp_path)
    truth = files["images"] / "OCR" / "0000.txt"
    good = truth.read_text()
    truth.write_text("no tab\n")
    with pytest.raises(DataError, match=r"OCR/0000.txt, line 1: a question, a tab and Yes or No"):
        bench.questions(files)
    truth.write_text(good.replace("cat", "cow"))
    with pytest.raises(DataError, match=r"does not ask 'Is there a cat"):
        bench.questions(files)
    truth.unlink()
    with pytest.raises(DataError, match="its truth is missing"):
        bench.questions(files)
    with pytest.raises(DataError, match=r"existence is missing(.|\n)*darkyarding"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "llava_mme.jsonl").write_text("")
        bench.locate(tmp_path / "other")
