"""Every YAML of the project loads, and every path in it is one the project makes."""

from pathlib import Path

import pytest
import yaml

from tinyllava_fast.config.load import dump, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
PAPER = sorted((CONFIGS / "paper").glob("*/*.yaml"))
LLMS = {
    "gemma_2b": "gemma",
    "openelm_450m": "llama",
    "phi_2": "phi",
    "qwen1_5_0_5b": "phi",
    "qwen2_0_5b": "qwen2_base",
    "qwen2_5_3b": "qwen2_base",
    "stablelm_2_1_6b": "phi",
    "tinyllama_1_1b": "llama",
}


def test_there_are_configs() -> None:
    assert len(RUNS) >= 3
    names = [
        f"{recipe}/{llm}_{tower}"
        for recipe in ("base", "lora", "share")
        for llm in LLMS
        for tower in ("clip", "siglip")
    ]
    assert [f"{p.parent.name}/{p.stem}" for p in PAPER] == names


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_config_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    assert run.output_dir.startswith("runs/")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(run))
    assert load_run(copy) == run


@pytest.mark.parametrize("path", PAPER, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_runs_of_the_paper(path: Path) -> None:
    """The published hyper-parameters, in every pair of every recipe; two paths are all that a lab gives."""
    run = load_run(path, ["data_root=/data", "output_dir=/runs/x"])
    recipe, (llm, _, tower) = path.parent.name, path.stem.rpartition("_")
    stages = {
        "base": ["pretrain", "finetune"],
        "lora": ["pretrain", "finetune"],
        "share": ["pretrain", "share_pretrain", "finetune"],
    }
    assert [s.name for s in run.stages] == stages[recipe] and run.output_dir == "/runs/x"
    assert run.model.vision.type == tower and run.model.vision.feature_select == "patch"
    assert run.model.llm.path and run.engine.dtype == "bfloat16"
    longest = {"base": 2048, "lora": 3072, "share": 3072}[recipe]
    for stage in run.stages:
        optim = stage.optim
        assert (optim.schedule, optim.warmup_ratio, optim.weight_decay, optim.betas) == (
            "cosine",
            0.03,
            0,
            (0.9, 0.999),
        )
        assert stage.epochs == 1 and stage.max_steps is None and stage.recipe.vision.tune == "frozen"
        assert stage.recipe.connector.tune == "full" and stage.batch.packs_per_step == 16
        assert stage.data.max_tokens == (2048 if stage.name == "pretrain" else longest) < stage.batch.tokens
        assert stage.data.under(run.data_root).records.startswith("/data/text_files/")
        captions = stage.name != "finetune"
        assert stage.data.template == ("pretrain" if captions else LLMS[llm])
        mean = 728 if tower == "siglip" else 576
        mean = {"pretrain": mean + 25, "share_pretrain": mean + 230, "finetune": 0.94 * mean + 340}[stage.name]
        samples = stage.batch.packs_per_step * min(
            0.98 * stage.batch.tokens / mean, stage.batch.max_images if captions else 99
        )
        assert samples == pytest.approx(256 if captions else 128, rel=0.02)
    first, last = run.stages[0], run.stages[-1]
    assert (first.optim.lr, first.recipe.llm.tune) == (1e-3, "frozen")
    assert (last.optim.lr, last.recipe.llm.tune) == ((2e-4, "lora") if recipe == "lora" else (2e-5, "full"))
    if recipe == "lora":
        lora = last.recipe.llm.lora
        assert (lora.r, lora.alpha, lora.dropout, lora.bias) == (128, 256, 0.05, "none")
    if recipe == "share":
        assert (run.stages[1].optim.lr, run.stages[1].recipe.llm.tune) == (2e-5, "full")
    assert len(yaml.safe_load(path.read_text())) == 4, "a pair's file says only what is its own"
