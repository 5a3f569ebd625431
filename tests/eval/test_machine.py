"""The digest of a model whose parts lie in other folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.eval.machine import model_digest

PLACES: list[dict[str, Any]] = [
    {"mm_vision_tower": "{0}"},
    {"vision_model_name_or_path2": "{0}"},
    {"vision_model_name_or_path": "mof:{0}"},
    {"vision_config": {"model_name_or_path": "{0}"}},
    {"parts": [{"llm_config": {"llm_model_name_or_path": "{0}"}}]},
]


@pytest.mark.parametrize("config", PLACES, ids=json.dumps)
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_part_that_lies_elsewhere_is_part_of_the_model(tmp_path, config, name):
    model, part = tmp_path / "m", tmp_path / "part"
    (part / "language_model").mkdir(parents=True)
    model.mkdir()
    (model / name).write_text(json.dumps(config).replace("{0}", str(part)))
    seen = [model_digest(model)]
    for path in (part / "model.safetensors", part / "language_model/pytorch_model.bin"):
        path.write_bytes(b"x")
        seen.append(model_digest(model))
        assert seen[-1] == model_digest(model)
    assert len(set(seen)) == 3


def test_the_parts_of_a_part(tmp_path):
    """An adapter's base model whose tower is a third folder; they may name each other."""
    for folder, names in (("m", {"base_model_name_or_path": "base"}), ("base", {"mm_vision_tower": "tower"})):
        (tmp_path / folder).mkdir()
        values = {key: str(tmp_path / value) for key, value in names.items()}
        (tmp_path / folder / "config.json").write_text(json.dumps(values))
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower/config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "m")}))
    first = model_digest(tmp_path / "m")
    (tmp_path / "tower/model.safetensors").write_bytes(b"x")
    assert model_digest(tmp_path / "m") != first


def test_where_a_model_came_from_is_no_part_of_it(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "old"), "template": "old"}))
    first = model_digest(tmp_path / "m")
    Path(tmp_path / "old/model.safetensors").write_bytes(b"x")
    assert model_digest(tmp_path / "m") == first
