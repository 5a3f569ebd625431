"""Every YAML of the project loads into the dataclass of its folder, and every path in it is one the project makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tinyllava_fast.config.load import dump, load_run, parse_into, to_dict
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, RunConfig, VisionConfig
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.vision.base import VISION

CONFIGS = Path(__file__).parents[2] / "configs"
# Folder: what its files hold, and how many there are at least.
KINDS: dict[str, tuple[type, int]] = {
    ".": (RunConfig, 3),
    "paper/base": (RunConfig, 16),
    "paper/lora": (RunConfig, 16),
    "paper/share": (RunConfig, 16),
    "model": (ModelConfig, 1),
    "model/llm": (LLMConfig, 16),
    "model/vision": (VisionConfig, 1),
    "model/connector": (ConnectorConfig, 1),
}
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("_"))  # _: a part that others build on
PAPER = [p for p in FILES if p.parent.parent.name == "paper"]
TEMPLATES = {
    "gemma_2b": "gemma",
    "openelm_450m": "llama",
    "phi_2": "phi",
    "qwen1_5_0_5b": "phi",
    "qwen2_0_5b": "qwen2_base",
    "qwen2_5_3b": "qwen2_base",
    "stablelm_2_1_6b": "phi",
    "tinyllama_1_1b": "llama",
}


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CONFIGS).as_posix()


def load(path: Path) -> Any:
    cls = KINDS[folder_of(path)][0]
    if cls is RunConfig:
        return load_run(path)
    return parse_into(cls, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def sections(value: Any) -> list[Any]:
    """The component sections of a config, itself included."""
    if isinstance(value, RunConfig):
        return sections(value.model)
    return [value.llm, value.vision, value.connector] if isinstance(value, ModelConfig) else [value]


def test_there_are_configs() -> None:
    found = [folder_of(path) for path in FILES]
    assert set(found) <= set(KINDS), "a new folder of configs: say above what it holds"
    for folder, (_, least) in KINDS.items():
        if (CONFIGS / folder).is_dir():
            assert found.count(folder) >= least, folder
    assert {".", "model", "model/llm"} <= set(found)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_config_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    value = load(path)
    if isinstance(value, RunConfig):
        assert value.output_dir.startswith("runs/")
        copy = tmp_path / "copy.yaml"
        copy.write_text(dump(value))
        assert load_run(copy) == value
    else:
        assert parse_into(type(value), to_dict(value), str(path)) == value


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_components_and_their_options_exist(path: Path) -> None:
    registries = {LLMConfig: LLMS, VisionConfig: VISION, ConnectorConfig: CONNECTORS}
    for section in sections(load(path)):
        component: Any = registries[type(section)].get(section.type, str(path))
        assert parse_into(component.Options, section.options, f"{path}: options") is not None


def test_a_language_model_section_names_its_family() -> None:
    files = [path for path in FILES if folder_of(path) == "model/llm"]
    named = {path.stem: load(path) for path in files}
    assert all(section.path is not None and section.type != "auto" for section in named.values())
    assert {section.type for section in named.values()} == set(LLMS.names()) - {"auto"}
    assert all((section.tokenizer is not None) == (section.type == "openelm") for section in named.values())


def test_every_pair_of_the_paper_has_a_file() -> None:
    names = [
        f"{recipe}/{llm}_{tower}"
        for recipe in ("base", "lora", "share")
        for llm in TEMPLATES
        for tower in ("clip", "siglip")
    ]
    assert [f"{p.parent.name}/{p.stem}" for p in PAPER] == names


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
        assert stage.data.template == ("pretrain" if captions else TEMPLATES[llm])
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
