"""`tlf-bench race`: a worker process answers through its pipes, and the report compares what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli, race
from tinyllava_fast.bench.race_process import Process
from tinyllava_fast.errors import UserError

pytest.importorskip("easy_vqa")


def test_the_command_asks_a_process(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.json"
    words = ["race", "--config", str(config), "--quick", "--peer", "ours", "--precision", "bf16"]
    assert cli.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["problems"] == {"bf16": {}} and found["ratios"] == {"bf16": {}}
    assert set(found["results"]["bf16"]["ours"]) == set(race.ROWS)
    assert found["results"]["bf16"]["ours"]["start_s"][0] > 0
    assert "first token, one picture" in capsys.readouterr().out


def test_a_process_that_cannot_load_says_why(tmp_path: Path) -> None:
    with Process("ours", tmp_path / "absent", "bf16", 1) as process, pytest.raises(UserError, match="absent"):
        process.wait()


def test_ratios_are_against_the_best_peer_and_above_one_where_ours_is_better() -> None:
    base = {key: [2.0] for key in race.ROWS}
    found = race.ratios({"ours": base, "a": base | {"first_s": [3.0]}, "b": base | {"streams_8": [8.0]}})
    assert found["first_s"] == 1.0 and found["streams_8"] == 0.25
    assert race.ratios({"ours": base}) == {}


def test_answers_are_compared_up_to_the_first_difference() -> None:
    assert race.compare([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == {"share": 0.75, "first_difference": [None, 1]}
    assert race.compare([[1, 2]], [[1]]) == {"share": 0.5, "first_difference": [1]}
