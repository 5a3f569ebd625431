"""`tlf-bench scaling`: the lines through the measurements, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli, scaling


def test_the_line_and_how_far_the_measurements_lie_from_it() -> None:
    assert scaling.line([100, 200, 400], [3.0, 5.0, 9.0]) == pytest.approx(
        {"per_token": 0.02, "fixed": 1.0, "off": 0.0}, abs=1e-12
    )
    assert scaling.line([1, 2, 3], [1.0, 3.0, 3.0])["off"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa")
    target = tmp_path / "scaling.json"
    flags = ["--config", str(config), "--quick", "--factor", "2", "--factor", "1", "--plot", str(tmp_path / "plots")]
    assert cli.main(["scaling", *flags, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    one, two = report["rows"]
    assert (one["factor"], two["factor"], one["samples"], two["samples"]) == (1, 2, 1, 2)
    assert 1.5 < two["tokens"] / one["tokens"] < 2.5 and one["peak_rss_bytes"] > 0
    assert report["relative_cost"] == pytest.approx(one["tokens_per_s"] / two["tokens_per_s"])
    assert (tmp_path / "plots" / "scaling.png").stat().st_size > 10_000
    assert "A token costs" in capsys.readouterr().out
