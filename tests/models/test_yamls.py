"""configs/model/{vision,connector}: every component has a file. tests/config/test_yamls.py loads them."""

from __future__ import annotations

from pathlib import Path

import yaml

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


def test_a_tower_names_its_weights_and_its_tokens() -> None:
    sections = [yaml.safe_load(path.read_text()) for path in FILES if path.parent.name == "vision"]
    assert sections and all(section["path"] and section["feature_select"] for section in sections)
