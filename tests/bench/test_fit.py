"""`tlf-bench fit`: what is counted, what is computed from it, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli, fit

SHAPES = [f"model.llm.config.{k}" for k in ("hidden_size=64", "intermediate_size=128", "num_attention_heads=4")]


def test_what_fits_is_computed() -> None:
    fits = fit._fits(10 * 2**30, 2**20)
    assert fits == {str(g): int((0.95 * g - 11) * 1024) for g in (24, 40, 80)}
    assert fit._fits(30 * 2**30, 2**20) == {"24": 0, "40": 7168, "80": 46080}
    assert fit._fits(1.0, None) is None


def test_the_steepest_slope_counts_for_every_recipe() -> None:
    state = {"weights": 2**30, "masters": 0, "moments": 0, "gradients": 0}
    recipes = {
        n: {"state_bytes": dict(state), "slope": slope} for n, slope in (("lora", 2.0**20), ("full, AdamW", None))
    }
    result = fit.reckon(recipes | {"full, 8-bit AdamW": {"state_bytes": dict(state), "slope": 2.0**10}})
    assert result["bytes_per_token"] == 2**20
    assert {one["fits"]["24"] for one in result["recipes"].values()} == {int((0.95 * 24 - 2) * 1024)}
    assert result["recipes"]["full, AdamW"]["fits_offloaded"]["24"] == int((0.95 * 24 - 2) * 1024)


@pytest.mark.slow
def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One recipe is measured; the other's state is beyond the limit, so that it is reckoned only."""
    pytest.importorskip("easy_vqa")
    target, page = tmp_path / "fit.json", tmp_path / "memory.md"
    flags = ["--config", str(config), "--quick", "--recipe", "lora", "--samples", "1", "--samples", "2"]
    flags += ["--lora-rank", "2", "--table", str(page), "--json", str(target)]
    assert cli.main(["fit", *flags]) == 0
    (one,) = json.loads(target.read_text())["recipes"].values()
    assert [s["samples"] for s in one["sizes"]] == [1, 2] and one["sizes"][0]["peak_rss_bytes"] > 2**28
    assert "| lora | " in page.read_text() and "what fits" in capsys.readouterr().out
    assert cli.main(["fit", *flags[:-2], "--limit", "1e-9", "--json", str(target)]) == 0
    (one,) = json.loads(target.read_text())["recipes"].values()
    assert one["sizes"] == [] and one["fits"] is None and "too large here" in page.read_text()
