"""`tlf-bench fit`: what is counted, what is computed from it, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.conftest import RecordingGate
from tinyllava_fast.bench import cli, fit, sides, train
from tinyllava_fast.bench.settings import RECIPES, FitSettings, TrainSettings
from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError

SHAPES = [f"model.llm.config.{k}" for k in ("hidden_size=64", "intermediate_size=128", "num_attention_heads=4")]


def test_state_is_counted_from_the_tensors(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    states = {}
    for name, (mode, added) in RECIPES.items():
        settings = TrainSettings(rounds=1, warmup=1, samples=1, mode=mode, lora_rank=4)
        run = load_run(train.compose(config, [*SHAPES, "engine.dtype=bfloat16", *added], tmp_path, settings))
        gate = RecordingGate()
        sides.serve("ours", run, gate, per_step=1, precision="bf16")  # type: ignore[arg-type]
        states[name] = gate.facts["state_bytes"]
        parameters = gate.facts["parameters"]
    full, eight = states["full, AdamW"], states["full, 8-bit AdamW"]  # type: ignore[index]
    assert full["weights"] == 2 * parameters and full["moments"] == 2 * full["masters"]  # type: ignore[index]
    assert full["gradients"] == 1.5 * full["masters"]  # type: ignore[index]
    assert eight["moments"] < 0.8 * full["moments"] and eight["weights"] == full["weights"]  # type: ignore[index]
    lora, qlora = states["lora"], states["qlora"]
    assert qlora["weights"] < lora["weights"] and qlora["moments"] == lora["moments"]  # type: ignore[index]
    assert lora["masters"] < 0.5 * full["masters"]  # type: ignore[index]


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


@pytest.mark.parametrize("wrong", [{"recipes": ("qlra",)}, {"samples": (2, 2)}, {"lora_rank": 0}, {"samples": (0, 1)}])
def test_what_measures_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"--(recipe|samples|lora-rank)"):
        FitSettings(**wrong)
