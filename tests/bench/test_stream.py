"""`tlf-bench stream`: the whole measurement on a small set, in both forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli


@pytest.mark.parametrize("form", ["jsonl", "tar"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    target = tmp_path / "stream.json"
    assert cli.main(["stream", "--quick", "--form", form, "--tokens", "1024", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["rows"][-1]["records"] >= 1900 and found["rows"][-1]["processes"] >= 3
    assert 1900 <= found["resumed_at"] <= 2000 and found["records_per_s"] > 0 and found["resume_s"] > 0
    assert f"2,000 records in 4 shards of {form}" in capsys.readouterr().out
