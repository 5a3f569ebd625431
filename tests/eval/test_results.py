"""The files of a results folder: what is damaged in them is a sentence, and costs no more than it must."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.eval.layouts import write_jsonl
from tests.eval.own import ROWS, answers
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.eval import cli, pictures, runner
from tinyllava_fast.eval.answers import line_of
from tinyllava_fast.eval.report import write_scores
from tinyllava_fast.eval.results import read_results, read_verdicts
from tinyllava_fast.infer.assistant import Assistant


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Data and output of a finished evaluation."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run" / "data", tmp_path / "run" / "out"


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.1.jsonl"])
def test_a_folder_in_the_place_of_answers(evaluate, copied, name):
    data, out = copied
    (out / "custom" / name).unlink(missing_ok=True)
    (out / "custom" / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: cannot be read: Is a directory"):
        evaluate(data, out)


def test_what_could_not_be_replaced_is_named(evaluate, copied):
    data, out = copied
    (out / "custom/results.json").unlink()
    (out / "custom/results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json: cannot be written: Is a directory"):
        evaluate(data, out)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nonsense", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "no field 'questions'; evaluate this benchmark again"),
        (b"{}", ""),
    ],
)
def test_another_benchmarks_results_do_not_cost_these(evaluate, copied, content, said, caplog, monkeypatch):
    """Damaged, of an older version, or of another program: left out of the summary, with a warning."""
    monkeypatch.setattr("tinyllava_fast.eval.results.log.propagate", True)
    data, out = copied
    digest = read_results(out / "custom")["model_digest"]
    old = json.dumps({"benchmark": "old", "model_digest": digest, "headline": "", "metrics": []}).encode()
    (out / "old").mkdir()
    (out / "old/results.json").write_bytes(old if content is None else content)
    evaluate(data, out)
    assert list(json.loads((out / "results.json").read_text())["benchmarks"]) == ["custom"]
    assert (said in caplog.text) if said else ("left out" not in caplog.text)


def test_a_damaged_run_file_may_be_removed(evaluate, copied):
    data, out = copied
    (out / "custom/run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: not JSON .*; mend or remove it"):
        evaluate(data, out)
    (out / "custom/run.json").unlink()
    assert evaluate(data, out)["run"]["answered_now"] == 0


LINE_ENDS = "a\u2028b\u2029c\x85d\x1ce"


def test_line_ends_of_unicode_are_part_of_a_text(evaluate, tmp_path):
    """JSON leaves them as they are; only a newline ends a line of JSONL."""
    rows = [{"id": LINE_ENDS, "question": LINE_ENDS, "answer": LINE_ENDS, "category": LINE_ENDS}]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    evaluate(tmp_path, tmp_path / "out")
    (verdict,) = read_verdicts(tmp_path / "out/custom")
    assert {verdict[name] for name in ("id", "prompt", "truth", "category")} == {LINE_ENDS}
    write_scores(tmp_path / "out", ["custom"])
    assert cli.main(["--compare", *[str(tmp_path / "out/custom")] * 2]) == 0


RECORDS = [
    ({"finish": None}, "finish"),
    ({"finish": 3}, "finish"),
    ({"tokens": None}, "tokens"),
    ({"tokens": "a"}, "tokens"),
    ({"latency": "x"}, "latency"),
    ({"latency": [1]}, "latency"),
    ({"latency": -5}, "latency"),
    ({"latency": 1e400}, "latency"),
    ({"why": 3}, "why"),
]


@pytest.mark.parametrize(("change", "field"), RECORDS, ids=[str(c) for c, _ in RECORDS])
def test_an_answer_with_a_field_of_another_kind(evaluate, copied, change, field):
    """Its line may be removed: that question alone is asked again."""
    data, out = copied
    log = out / "custom/answers.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[3] |= change
    if None in change.values():
        del records[3][field]
    log.write_text("".join(map(line_of, records)))
    with pytest.raises(DataError, match=rf"line 4: not a record of an evaluation \(.*{field}.*\); remove the line"):
        evaluate(data, out)
    log.write_text("".join(map(line_of, [*records[:3], *records[4:]])))
    (out / "custom/run.json").unlink()
    assert evaluate(data, out)["run"]["answered_now"] == 1


def test_answers_that_an_editor_has_saved(evaluate, copied):
    """With a byte order mark, other line ends, and empty lines."""
    data, out = copied
    log = out / "custom/answers.jsonl"
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes().replace(b"\n", b"\r\n\r\n"))
    (out / "custom/run.json").unlink()
    assert evaluate(data, out)["run"]["answered_now"] == 0


def test_answers_of_other_settings_stay(evaluate, copied):
    """Another setting, and back: nothing is lost, nothing is mixed, and what was answered is not asked again."""
    data, out = copied
    first = answers(out)
    (folder,) = {read_results(out / "custom")["model"]}
    for tokens, asked_now in ((2, 3), (4, 0), (2, 0)):
        (out / "custom/run.json").unlink()
        options = [f"custom.max_new_tokens={tokens}"]
        run = runner.evaluate(folder, ["custom"], data, out, options=options)["custom"]["run"]
        assert run["answered_now"] == asked_now
        assert tokens == 2 or answers(out) == first


def test_scoring_again_opens_no_model_and_reads_no_picture(evaluate, copied, monkeypatch):
    data, out = copied
    monkeypatch.setattr(pictures, "SETTLED_S", -1e6)
    evaluate(data, out)  # digests of the copy

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished evaluation needs neither")

    monkeypatch.setattr(Assistant, "from_pretrained", never)
    monkeypatch.setattr(pictures, "_digest", never)
    monkeypatch.setattr(runner, "load_image", never)
    write_jsonl(data / "questions.jsonl", [{**row, "answer": "z", "category": "c"} for row in ROWS])
    assert evaluate(data, out, "custom.metric=contains")["tables"]["category"][0]["questions"] == 3


def test_names_that_are_not_utf8(evaluate, finished, folder, tmp_path, assistant, capsys):
    """Of the data folder, the model's and the output."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    shutil.copytree(finished / "data", root / "data")
    shutil.copytree(folder, root / "final")
    run = ["--benchmarks", "custom", "--data", str(root / "data"), "--option", "custom.max_new_tokens=4"]
    assert cli.main([*run, "--dry-run"]) == 0
    assert cli.main([str(root / "final"), *run, "--output", str(root / "out")]) == 0
    assert answers(root / "out") == answers(finished / "out")
    (name,) = {json.loads(line)["model_id"] for line in (root / "out/custom/official/answers.jsonl").open()}
    assert name == "d\ufffd-final" and (root / "out/report.html").is_file()
