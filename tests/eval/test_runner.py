"""Benchmarks run end to end: they resume, score, write official files, refuse bad input."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from tests.eval import layouts
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval import cli, runner
from tinyllava_fast.eval.benchmarks.base import BENCHMARKS, Question
from tinyllava_fast.eval.benchmarks.easy_vqa import question_type
from tinyllava_fast.eval.machine import machine, model_digest, versions
from tinyllava_fast.eval.plan import make_plans
from tinyllava_fast.eval.progress import progress
from tinyllava_fast.eval.ranks import Ranks
from tinyllava_fast.eval.results import read_verdicts
from tinyllava_fast.hardware import peak_rss_bytes

OPTIONS = {"device": "cpu", "batch_tokens": 4096}
SUITE = sorted(layouts.BUILDERS)


def easy(folder, data_dir, out, **options):
    return runner.evaluate(folder, ["easy_vqa"], data_dir, out, **OPTIONS | options)["easy_vqa"]


@pytest.fixture(scope="module")
def results(folder, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return easy(folder, data_dir, out), out


@pytest.fixture(scope="module")
def suite(folder, tmp_path_factory):
    """Every official benchmark in one command, on two unreadable images: (data, output, table)."""
    root = tmp_path_factory.mktemp("suite")
    data, out = layouts.build_all(root / "eval"), root / "out"
    (data / "gqa/data/images/n1.jpg").write_bytes(b"not an image")
    results = runner.evaluate(folder, SUITE, data, out, **OPTIONS)
    return data, out, results


def test_results_hold_what_is_promised(results, folder):
    found, out = results
    found = dict(found)
    run = found.pop("run")
    assert found == json.loads((out / "easy_vqa/results.json").read_text())
    assert found["questions"] == 20 and run["answered_now"] == 20 and found["headline"] == "accuracy"
    accuracy = found["metrics"][0]
    assert 0 <= accuracy["value"] <= 100 and accuracy["stderr"] >= 0
    assert [m["name"] for m in found["tables"]["type"]] == ["color", "shape", "yes/no color", "yes/no shape"]
    assert run["eval_seconds"] > 0 and run["questions_per_s"] > 0 and run["peak_rss_bytes"] > 2**20
    assert run["latency"]["count"] == 20 and run["dtype"] == "float32"
    assert found["model_digest"] == model_digest(folder) and found["versions"]["torch"] and found["config_hash"]
    assert run["engine"]["images_encoded"] == 4
    credit = [v["credit"] for v in read_verdicts(out / "easy_vqa")]
    assert 5 * sum(credit) == accuracy["value"]
    summary = json.loads((out / "results.json").read_text())
    assert summary["benchmarks"]["easy_vqa"]["headline"] == accuracy


def test_a_killed_run_resumes_to_the_same_results(results, folder, data_dir, tmp_path):
    _, out = results
    cut = tmp_path / "easy_vqa" / "answers.jsonl"
    cut.parent.mkdir()
    lines = (out / "easy_vqa/answers.jsonl").read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:9]) + lines[9][:7])  # two head lines, seven answers, half of the eighth
    resumed = easy(folder, data_dir, tmp_path)
    assert resumed["run"]["answered_now"] == 13
    for name in ("results.json", "verdicts.jsonl", "official/answers.jsonl"):
        assert (tmp_path / "easy_vqa" / name).read_bytes() == (out / "easy_vqa" / name).read_bytes(), name


def test_a_finished_run_is_not_repeated(results, folder, data_dir, monkeypatch):
    found, out = results
    monkeypatch.setattr("tinyllava_fast.infer.assistant.Assistant.from_pretrained", None)  # no model is loaded
    assert easy(folder, data_dir, out) == found
    fewer = easy(folder, data_dir, out, limit=5)
    assert fewer["questions"] == 5 and fewer["run"] == found["run"]
    assert easy(folder, data_dir, out) == found


def test_blind_sees_one_blank_image(folder, data_dir, tmp_path):
    blind = easy(folder, data_dir, tmp_path, blind=True)
    assert blind["blind"] and blind["run"]["engine"]["images_encoded"] == 1
    assert blind["run"]["engine"]["requests"] == 5  # of 20: the same questions about one blank image
    answers = {v["key"]: v["answer"] for v in read_verdicts(tmp_path / "easy_vqa")}
    assert answers["test-0"] == answers["test-5"] == answers["test-10"]
    assert runner.default_output(tmp_path / "final", False) == tmp_path / "eval"
    assert runner.default_output(tmp_path / "final", True) == tmp_path / "eval-blind"


def test_the_suite_in_one_command(suite):
    data, out, results = suite
    assert list(results) == SUITE
    for name, found in results.items():
        (plan,) = make_plans([BENCHMARKS.get(name)()], data)
        assert found["questions"] == len(plan.everything) == found["counts"]["answered"]
        official = [json.loads(line) for line in (out / name / "official/answers.jsonl").read_text().splitlines()]
        assert [(r["question_id"], r["prompt"]) for r in official] == [
            (q.id, plan.benchmark.recorded_prompt(q)) for q in plan.questions
        ]
        assert found["count_differences"] and (found["metrics"] or found["notes"])
    (upload,) = (json.loads(path.read_text()) for path in (out / "vqav2/official").glob("*.json"))
    assert len(upload) == 9 and [r["answer"] == "" for r in upload].count(True) >= 3
    names = {p.relative_to(out).as_posix() for p in out.glob("*/official/**/*") if p.is_file()}
    experiment = json.loads((out / "gqa/official/answers.jsonl").read_text().splitlines()[0])["model_id"]
    for name in (
        "gqa/official/testdev_balanced_predictions.json",
        "sqa/official/{}_result.json",
        "sqa/official/{}_output.jsonl",
        "mme/official/{}/OCR.txt",
        "mmvet/official/{}.json",
        "mmmu/official/{}_output.json",
    ):
        assert name.format(experiment) in names, (name, names)
    assert results["mmmu"]["counts"]["not asked"] == 2 and "not scored" in results["mmvet"]["notes"][0]


def test_identical_questions_are_asked_once(suite):
    _, out, _ = suite
    lines = (out / "pope/answers.jsonl").read_text().splitlines()
    asked = [r for r in map(json.loads, lines) if r.get("latency") is not None]
    rows = read_verdicts(out / "pope")
    assert len(rows) == 12 and len(asked) == len({(*r["images"], r["prompt"]) for r in rows}) == 10
    first = [r["answer"] for r in rows if "a dog" in r["prompt"]]
    assert len(first) == 3 and len(set(first)) == 1


def test_unreadable_images_are_counted_and_empty(suite):
    _, out, results = suite
    gqa = results["gqa"]
    assert gqa["counts"]["unreadable"] == 2 and [p.endswith("n1.jpg") for p in gqa["unreadable_images"]] == [True]
    assert [r["answer"] for r in read_verdicts(out / "gqa") if r["finish"] == "unreadable image"] == ["", ""]


def test_missing_images_are_empty_if_wanted(folder, tmp_path):
    layouts.textvqa(tmp_path / "eval")
    (tmp_path / "eval/textvqa/train_images/aa.jpg").unlink()
    found = runner.evaluate(folder, ["textvqa"], tmp_path / "eval", tmp_path, missing_images="empty", **OPTIONS)
    assert found["textvqa"]["counts"]["unreadable"] == 2 and found["textvqa"]["counts"]["answered"] == 4


def test_canned_answers_and_text_questions(folder, tmp_path, monkeypatch):
    layouts.write_jsonl(tmp_path / "questions.jsonl", [{"question": q, "answer": "b"} for q in ("one?", "two?")])
    custom = BENCHMARKS.get("custom")
    plain = custom.questions

    def canned(self, files):
        first, *rest = plain(self, files)
        return [Question(**{**first.__dict__, "canned": "b"}), *rest]

    monkeypatch.setattr(custom, "questions", canned)
    found = runner.evaluate(
        folder, ["custom"], tmp_path, tmp_path / "out", options=["custom.max_new_tokens=3"], **OPTIONS
    )
    assert found["custom"]["run"]["engine"]["requests"] == 1 and found["custom"]["metrics"][0]["value"] >= 50


COMMAND = [sys.executable, "-m", "tinyllava_fast.eval.cli"]


def test_kill_and_rerun_give_the_same_files(suite, folder, tmp_path):
    data, whole, _ = suite
    out = tmp_path / "out"
    flags = ["--benchmarks", ",".join(SUITE), "--data", str(data), "--output", str(out), "--device", "cpu"]
    command = [*COMMAND, str(folder), *flags, "--batch-tokens", "4096", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    answers, deadline = out / "pope" / "answers.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if answers.exists() and answers.read_bytes().count(b"\n") >= 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    assert not (out / "results.json").exists()
    assert cli.main(command[3:]) == 0
    for name in SUITE:
        for file in ("results.json", "verdicts.jsonl", "official/answers.jsonl"):
            assert (out / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    page = (out / "report.html").read_text()
    assert "<script" not in page and "http" not in page and "POPE" in page and 'class="show-wrong"' in page


def test_ranks_share_by_image_and_merge(folder, tmp_path, monkeypatch):
    """Two ranks, one after the other; what torchrun adds is the environment and the barrier."""
    layouts.pope(tmp_path / "eval")
    alone = runner.evaluate(folder, ["pope"], tmp_path / "eval", tmp_path / "alone", **OPTIONS)["pope"]
    monkeypatch.setattr(Ranks, "together", lambda self: nullcontext())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "1")
    assert runner.evaluate(folder, ["pope"], tmp_path / "eval", tmp_path / "two", **OPTIONS) == {}
    mine = [json.loads(x) for x in (tmp_path / "two/pope/answers.1.jsonl").read_text().splitlines()[2:]]
    rows = {v["key"]: v["images"] for v in read_verdicts(tmp_path / "alone/pope")}
    assert len({tuple(rows[r["key"]]) for r in mine}) == 1 and len(mine) == 6
    monkeypatch.setenv("RANK", "0")
    merged = runner.evaluate(folder, ["pope"], tmp_path / "eval", tmp_path / "two", **OPTIONS)["pope"]
    assert merged.pop("run")["processes"] == 2 and alone.pop("run") and merged == alone


@pytest.mark.slow
def test_torchrun(folder, suite, tmp_path):
    data, whole, _ = suite
    flags = ["--benchmarks", "pope,gqa", "--data", str(data), "--output", str(tmp_path), "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "tinyllava_fast.eval.cli", str(folder), *flags, "--threads", "1"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    for name in ("pope", "gqa"):
        assert (tmp_path / name / "results.json").read_bytes() == (whole / name / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what is the blue shape?", "circle", "shape"),
        ("what color is the circle?", "blue", "color"),
        ("is there not a teal shape in the image?", "no", "yes/no color"),
        ("does the image contain a rectangle?", "yes", "yes/no shape"),
    ],
)
def test_question_types(question, answer, expected):
    assert question_type(question, answer) == expected


def test_easy_vqa_is_exact_match_and_unanswered_is_wrong(data_dir):
    bench = BENCHMARKS.get("easy_vqa")()
    questions = bench.questions(bench.locate(data_dir))
    truth = {q.key: q.truth for q in questions}
    assert bench.score(questions, truth)["accuracy"].value == 100
    assert bench.score(questions, {})["accuracy"].value == 0
    off = {**truth, "test-0": " circle\n", "test-1": "redd", "test-2": "Yes"}
    credit = bench.score(list(reversed(questions)), off).credit
    assert [key for key, points in credit.items() if not points] == ["test-2", "test-1"]


@pytest.fixture
def run_cli(caplog):
    caplog.set_level(logging.ERROR, logger="tinyllava_fast")
    return lambda *words: cli.main([str(w) for w in words])


def test_cli(run_cli, folder, data_dir, tmp_path, capsys):
    arguments = [folder, "--data", data_dir, "--output", tmp_path / "o", "--limit", "10", "--threads", "1"]
    easy = ["--benchmarks", "easy_vqa"]
    assert run_cli(*arguments, *easy, "--batch-tokens", "2048", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "accuracy *" in out and "clustered by image" in out and (tmp_path / "o/report.html").is_file()
    assert run_cli(*arguments, "--benchmarks", "easy_vqq") == 2
    assert run_cli(*arguments) == run_cli(*easy, "--data", data_dir) == run_cli(folder, *easy) == 2
    assert run_cli(tmp_path / "none", "--data", data_dir, *easy) == 2
    assert run_cli(folder, "--data", tmp_path / "none", *easy) == 2
    for bad in (["--limit", "0"], ["--threads", "-1"], ["--limit", "x"], ["--dry-run", "--score-only", "x"]):
        with pytest.raises(SystemExit) as stop:
            run_cli(*arguments, *easy, *bad)
        assert stop.value.code == 2


def test_commands_without_a_model(run_cli, suite, tmp_path, capsys):
    data, out, results = suite
    assert run_cli("--benchmarks", ",".join(SUITE), "--data", data, "--dry-run") == 0
    said = capsys.readouterr().out
    for part in (
        "POPE (pope)",
        "adversarial questions: 4 found, 3,000 expected",
        "12 questions, 10 different",
    ):
        assert part in said
    pope = ["--benchmarks", "pope", "--data", data]
    assert run_cli(*pope, "--score-only", out / "pope/official/answers.jsonl", "--output", tmp_path) == 0
    scored = json.loads((tmp_path / "pope/results.json").read_text())
    assert scored["metrics"] == results["pope"]["metrics"]
    assert run_cli(*pope, "--score-only", out / "pope/answers.jsonl") == 0  # our own log
    assert "LLaVA-1.5-7B" in capsys.readouterr().out
    assert run_cli("--benchmarks", "pope,gqa", "--data", data, "--score-only", "x") == 2
    assert run_cli("--score-only", "x") == 2

    assert run_cli("--compare", out / "pope", tmp_path / "pope") == 0
    assert "pope: 12 common questions" in (said := capsys.readouterr().out) and "McNemar" in said and "+0.00" in said
    assert run_cli(*pope, "--compare", out / "pope/official/answers.jsonl", tmp_path) == 0
    for bad in ([out / "pope", out / "gqa"], [out, out / "pope"], [out / "pope/answers.jsonl", out / "pope"]):
        assert run_cli("--compare", *bad) == 2
    assert run_cli("--compare", out / "vqav2", out / "vqav2") == 2  # no labels, no credit


def test_no_questions(folder, data_dir, tmp_path):
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(UserError, match="no question to ask"):
        easy(folder, tmp_path, tmp_path)


def test_progress_lines_and_bar(monkeypatch, caplog):
    monkeypatch.setattr("tinyllava_fast.eval.progress.log.propagate", True)
    with caplog.at_level(logging.INFO, logger="tinyllava_fast"):
        assert list(progress(range(3), total=5, done=2)) == [0, 1, 2]
    assert "5/5 questions" in caplog.text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress(range(3), total=3)) == [0, 1, 2]


def test_machine_facts():
    facts = machine()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**28 and facts["processor"]
    assert peak_rss_bytes() > 2**20 and "tinyllava-fast" in versions()
