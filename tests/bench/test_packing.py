"""`tlf-bench packing`: the lengths are those that are stated, and the plan holds them all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinyllava_fast.bench import cli, packing
from tinyllava_fast.bench.settings import PackingSettings


def test_lengths_are_as_stated() -> None:
    settings = PackingSettings(records=20_000)
    lengths, images = packing.draw_lengths(settings, 576)
    assert abs(1 - images.mean() - 0.06) < 0.005
    text = lengths - 576 * images
    assert 300 < text.mean() < 350 and lengths.max() == 2048 and lengths.min() >= 1
    assert 700 < np.median(lengths[images == 0]) < 1100
    again, _ = packing.draw_lengths(settings, 576)
    assert np.array_equal(lengths, again)


def test_the_budget_of_the_papers_configurations_is_used_to_97_percent() -> None:
    result = packing.benchmark(PackingSettings(records=50_000, budgets=(8448,)))
    assert [row["image_tokens"] for row in result["rows"]] == [196, 576, 729]
    assert all(row["efficiency"] >= 0.97 for row in result["rows"])


def test_efficiency_is_counted_by_hand() -> None:
    lengths, images = np.array([6, 4, 5, 5, 3]), np.array([1, 1, 1, 0, 0])
    row = packing.plan(lengths, images, 10, PackingSettings(longest=800))
    assert (row["packs"], row["efficiency"], row["most_samples"]) == (3, 23 / 30, 2)
    assert row["padded_efficiency"] == pytest.approx(23 / 30)  # five samples of six positions each


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "packing.json"
    flags = ["--quick", "--tokens", "4096", "--image-tokens", "196", "--json", str(target)]
    assert cli.main(["packing", *flags]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert 0.9 < row["efficiency"] <= 1 and row["seconds"] > 0
    assert "Packing 2,000 records, 6 % text only" in capsys.readouterr().out
