"""`tlf-bench ranks`: the command on a tiny model, and what its settings refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli
from tinyllava_fast.bench.settings import RanksSettings
from tinyllava_fast.errors import UserError


@pytest.mark.slow
def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "ranks.json"
    assert cli.main(["ranks", "--config", str(config), "--quick", "--engine", "ddp", "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert [(row["engine"], row["processes"]) for row in report["rows"]] == [("torch", 1), ("ddp", 2)]
    assert all(row["step"]["median_s"] > 0 and row["tokens_per_s"] > 0 for row in report["rows"])
    assert report["rows"][0]["efficiency"]["ratio"] == 1 and 0 <= report["rows"][1]["idle"]["median"] < 1
    work = report["work"]
    assert work["steps"] > 1 and 0 <= work["shared_out"] <= work["in_turn"] < 1
    assert "processes are idle for" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"processes": 1}, {"packs": 3}, {"processes": 4, "packs": 2}])
def test_packs_that_the_processes_cannot_share(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be a multiple of --processes"):
        RanksSettings(**wrong)
