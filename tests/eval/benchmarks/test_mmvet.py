"""MM-Vet: the official scores from grades, and a judge on this machine."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.chat_server import chat_server
from tests.eval import golden, layouts
from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.benchmarks.mmvet import MMVet, Options, read_prompt
from tinyllava_fast.eval.mmvet_scores import capabilities, integration, score_csv
from tinyllava_fast.eval.runner import evaluate


def questions_of(metadata, subset=()):
    return [
        Question(
            key=key,
            id=int(key.removeprefix("v1_")),
            images=(golden.GOLDEN / key,),
            prompt="",
            truth="",
            category="+".join(sorted(row["capability"])),
            meta={"capabilities": row["capability"], "bard_set": key in subset, "evaluator": ""},
        )
        for key, row in metadata.items()
    ]


def official(score, title, decimals):
    """One of the evaluator's tables."""
    rows = {m.name: float(np.round(m.value, decimals)) for m in score.tables[title]}
    return rows | {"total": float(np.round(score["total"].value, decimals))}


@pytest.mark.parametrize("runs", [1, 3])
def test_llava_13b(runs):
    real = golden.shared("real_llava15_13b/mm-vet")
    expected = golden.load(real / "expected.json")
    questions = questions_of(golden.load(real / "capabilities.json"), golden.load(real / "bard_set.json"))
    grades = golden.load(real / f"llava-v1.5-13b_gpt-4-grade-{runs}runs.json")
    graded = {key: row["score"] for key, row in grades.items()}
    score = MMVet(Options(runs=runs)).score(questions, {}, graded)
    assert str(score["total"]).split()[0] == {1: "36.1", 3: "36.3"}[runs]
    for decimals, suffix in ((1, ""), (4, "_4_decimals")):
        table = expected[f"{runs}_runs{suffix}"]
        assert official(score, "capability", decimals) == table["capability"]
        assert official(score, "integration", decimals) == table["integration_sorted_names"]
        totals = [m.value for m in score.tables["run"]]
        assert [float(np.round(t, decimals)) for t in totals] == table["runs"]
        assert float(np.round(np.std(totals), decimals)) == table["std"]
    backwards = MMVet(Options(runs=runs)).score(questions[::-1], {}, dict(reversed(graded.items())))
    assert backwards.credit == score.credit and official(backwards, "capability", 4) == official(score, "capability", 4)


def test_synthetic_grades():
    expected = golden.load("mm-vet/synthetic/expected.json")
    questions = questions_of(golden.load("mm-vet/synthetic/mm-vet.json"), golden.load("mm-vet/synthetic/bard_set.json"))
    graded = {key: row["score"] for key, row in golden.load("mm-vet/synthetic/grade.json").items()}
    score = MMVet(Options(runs=3)).score(questions, {}, graded)
    assert {m.name: m.questions for m in score.tables["integration"]} == expected["integration_counts"]
    for decimals, name in ((1, "scores"), (4, "scores_4_decimals")):
        assert official(score, "capability", decimals) == expected[name]["capability"]
        assert official(score, "integration", decimals) == expected[name]["integration_sorted_names"]
    bard = expected["scores_on_bard_set"]
    assert {m.name: float(np.round(m.value, 1)) for m in score.tables["Bard set"]} == bard["capability"]
    subset = [q for q in questions if q.meta["bard_set"]]
    head, row = score_csv("exp", subset, graded, integration).splitlines()
    names = ["+".join(sorted(n.split("_"))) for n in head.split(",")[1:-2]]
    values = dict(zip(names, map(float, row.split(",")[1:]), strict=False))
    assert values == bard["integration_sorted_names"] and row.endswith(f'{bard["std"]},"{bard["runs"]}"')
    head, row = score_csv("exp", questions, graded, capabilities).splitlines()
    assert head.endswith("total,std,runs") and row.endswith('49.8,4.8,"[48.0, 56.3, 45.0]"')


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Files, questions and answers of the small data set; no key in the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    layouts.mmvet(tmp_path / "data")
    files = MMVet().locate(tmp_path / "data")
    questions = MMVet().questions(files)
    return files, questions, {q.key: f"It is {q.id}." for q in questions}


def run(bench, data, folder):
    files, questions, answers = data
    folder.mkdir(exist_ok=True)
    grades = bench.grade(questions, answers, folder, "exp")
    score = bench.score(questions, answers, grades)
    return score, bench.outputs(questions, answers, score, files, folder, "exp")


def test_without_a_judge_the_upload_is_written(data, tmp_path):
    score, paths = run(MMVet(), data, tmp_path / "out")
    assert [p.name for p in paths] == ["exp.json"] and not score.metrics and not score.headline
    assert "not scored" in score.notes[0] and "OPENAI_API_KEY" in score.notes[0]
    upload = json.loads(paths[0].read_text())
    assert upload == data[2] and list(upload)[:2] == ["v1_0", "v1_1"]


def test_the_form_of_the_upload():
    real = golden.shared("real_llava15_13b/mm-vet")
    said = {f"v1_{r['question_id']}": r["text"] for r in golden.load(real / "answers.jsonl")}
    assert said == golden.load(real / "results_official_format.json")


def test_graded_by_a_judge(data, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    with chat_server(lambda number, body: {"say": "0.5" if "It is 1." in str(body) else "1.0"}) as server:
        bench = MMVet(Options(base_url=server.url, judge="org/j", key_env="JUDGE_KEY", runs=2))
        score, paths = run(bench, data, tmp_path / "out")
        assert len(server.seen) == 12 and set(server.keys) == {"Bearer k"}
        run(bench, data, tmp_path / "out")
        assert len(server.seen) == 12
    said = next(b["messages"][0]["content"] for b in server.seen if "It is 1." in str(b))
    assert said.endswith("\n\nWhat is thing 1? | red <AND> round | It is 1. | ")
    assert score["total"].value == pytest.approx(100 * 5.5 / 6) and score.credit["v1_1"] == 0.5
    assert "UNOFFICIAL" in score.notes[0] and "standard deviation 0.0" in score.notes[1]
    assert sorted(p.name for p in paths) == sorted(
        [
            "exp.json",
            "exp_org_j-grade-2runs.json",
            "exp_org_j-cap-score-2runs.csv",
            "exp_org_j-cap-int-score-2runs.csv",
            "exp_bardset_org_j-cap-score-2runs.csv",
            "exp_bardset_org_j-cap-int-score-2runs.csv",
        ]
    )
    record = json.loads((tmp_path / "out" / "exp_org_j-grade-2runs.json").read_text())
    assert record["v1_1"] == {"model": ["judge-1"] * 2, "content": ["0.5"] * 2, "score": [0.5] * 2}


def test_a_judge_that_goes_away_costs_nothing(data, tmp_path):
    with chat_server(lambda number, body: {"say": "1"} if number < 8 else {"status": 403}) as server:
        bench = MMVet(Options(base_url=server.url, runs=2, parallel=1))
        score, paths = run(bench, data, tmp_path / "out")
    assert score["total"].value == 100 and "1 of 2 runs are complete" in score.notes
    assert "exp_gpt-4-0613-grade-1runs.json" in [p.name for p in paths]
    with chat_server(lambda number, body: {"status": 403}) as server:
        score, paths = run(MMVet(Options(base_url=server.url)), data, tmp_path / "other")
    assert "the judge graded 0 of 6" in score.notes[0] and [p.name for p in paths] == ["exp.json"]


def test_the_evaluators_prompt_is_read_and_not_run(data, tmp_path):
    files, _, answers = data
    path = files["metadata"].parent / "mm-vet_evaluator.py"
    path.write_text('import nothing_of_the_kind\nprompt = """Compare.\n"""\n')
    assert read_prompt(path) == "Compare.\n"
    bench = MMVet()
    found = bench.questions(bench.locate(tmp_path / "data"))
    assert (
        bench.score(found, answers, {q.key: [1.0] for q in found})
        .notes[0]
        .startswith("judge gpt-4-0613, prompt of mm-vet_evaluator.py, sha256 ")
    )
    path.write_text("x = 1")
    with pytest.raises(DataError, match="assigns no text to `prompt`"):
        read_prompt(path)


def test_bad_files(data):
    files, questions, _ = data
    assert [len(q.meta["capabilities"]) for q in questions[:3]] == [1, 2, 3] and questions[0].meta["bard_set"]
    assert MMVet().is_asked_by(questions[0], MMVet().recorded_prompt(questions[0]))
    lines = files["questions"].read_text()
    files["questions"].write_text(lines + lines.splitlines()[0])
    with pytest.raises(DataError, match=r"line 7: 0 stands in line 1 already"):
        MMVet().questions(files)
    files["questions"].write_text(lines.replace('"question_id": 2,', '"question_id": 99,'))
    with pytest.raises(DataError, match=r"mm-vet.json: no entry 'v1_99'"):
        MMVet().questions(files)


def test_a_judge_that_is_named_later_costs_no_answer(data, folder, tmp_path):
    """tlf-eval without a judge, then with one: the answers of the first run are graded."""
    options = {"device": "cpu", "batch_tokens": 4096}
    where = (folder, ["mmvet"], tmp_path / "data", tmp_path / "out")
    first = evaluate(*where, **options)["mmvet"]
    assert first["headline"] == "" and first["run"]["answered_now"] == 6
    with chat_server(lambda number, body: {"say": "0.7"}) as server:
        said = [f"mmvet.base_url={server.url}", "mmvet.judge=local"]
        second = evaluate(*where, options=said, **options)["mmvet"]
        assert len(server.seen) == 6
        assert evaluate(*where, options=said, **options)["mmvet"] == second and len(server.seen) == 6
    assert second["metrics"][0]["value"] == pytest.approx(70) and second["run"] == first["run"]
    grades = list((tmp_path / "out/mmvet/official").glob("*_local-grade-1runs.json"))
    assert len(grades) == 1 and second["options"]["judge"] == "local"
