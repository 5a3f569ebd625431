"""configs/model/{vision,connector}: every file is a section of a run, and its component takes its options."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tinyllava_fast.config.load import load_run, parse_into
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.vision.base import VISION

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
FILES = sorted([*CONFIGS.glob("vision/*.yaml"), *CONFIGS.glob("connector/*.yaml")])


def test_every_tower_and_connector_has_one() -> None:
    types = {path.parent.name: set() for path in FILES}
    for path in FILES:
        types[path.parent.name].add(yaml.safe_load(path.read_text())["type"])
    assert types["vision"] == set(VISION)
    aliases = {name for name in CONNECTORS if name.startswith("mlp") and name != "mlp2x_gelu"} | {"mof"}
    assert types["connector"] == set(CONNECTORS) - aliases


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_is_a_section_of_a_run(path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{{path.parent.name}: {path}}}\nstages: [{{name: a, data: {{records: x.json}}}}]\n")
    section = getattr(load_run(run).model, path.parent.name)
    registry = VISION if path.parent.name == "vision" else CONNECTORS
    assert parse_into(registry.get(section.type).Options, section.options, str(path)) is not None  # type: ignore[attr-defined]
    if path.parent.name == "vision":
        assert section.path and section.feature_select is not None
