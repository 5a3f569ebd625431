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
    "paper": (RunConfig, 1),
    "model": (ModelConfig, 1),
    "model/llm": (LLMConfig, 16),
    "model/vision": (VisionConfig, 1),
    "model/connector": (ConnectorConfig, 1),
}
FILES = sorted(CONFIGS.rglob("*.yaml"))


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CONFIGS).as_posix()


def load(path: Path) -> Any:
    cls = KINDS[folder_of(path)][0]
    if cls is RunConfig:
        return load_run(path)
    return parse_into(cls, yaml.safe_load(path.read_text(encoding="utf-8")), str(path), folder=path.parent)


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
