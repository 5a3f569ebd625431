"""--explain: looks inside right and wrong answers, in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval.own import write_data
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.cli import main
from tinyllava_fast.eval.explain import explain
from tinyllava_fast.eval.results import read_verdicts


def test_right_and_wrong_answers_are_explained(folder: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    out = tmp_path / "out"
    command = [str(folder), "--benchmarks", "custom", "--data", str(tmp_path / "data"), "--output", str(out)]
    command += ["--device", "cpu", "--option", "custom.max_new_tokens=3", "--explain", "1"]
    assert main(command) == 0
    looks = json.loads((out / "custom/looks/looks.json").read_text())["looks"]
    by_key = {v["credit"] for v in read_verdicts(out / "custom") if v["images"] and v["answer"]}
    assert {look["kind"] for look in looks} == {
        "right" if credit == 1 else "wrong" for credit in by_key if credit in (0, 1)
    }
    report = (out / "report.html").read_text()
    for look in looks:
        assert f"custom/looks/{look['page']}" in report and (out / "custom/looks" / look["page"]).is_file()
        assert set(look["deletion"]) == set(look["insertion"]) > {"random"}
    assert "A look inside" in report and "random orders" in report


@pytest.mark.parametrize("more", [["m", "--blind"], ["--endpoint", "http://127.0.0.1:1"], ["--dry-run"]], ids=" ".join)
def test_what_cannot_be_explained(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*more, "--benchmarks", "gqa", "--data", "d", "--explain", "2"]) == 2
    assert "--explain" in capsys.readouterr().err


def test_nothing_to_explain(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").write_text('{"key": "a", "images": [], "answer": "b", "credit": 1}\n')
    with pytest.raises(UserError, match="nothing to explain"):
        explain(None, tmp_path, 3, max_new_tokens=4)
