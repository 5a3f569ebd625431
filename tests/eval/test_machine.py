"""The digest of a model whose parts lie in other folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.eval.machine import model_digest, plugins_digest

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


def test_every_file_of_a_model_is_part_of_it(folder, tmp_path):
    """Weights, config (template, image mode), tokenizer, processor, adapter; not what tlf-eval writes there."""
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/adapter").mkdir()
    (tmp_path / "m/adapter/adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "m/adapter/adapter_config.json").write_text("{}")
    first = model_digest(tmp_path / "m")
    assert first == model_digest(tmp_path / "m")
    files = [p for p in (tmp_path / "m").rglob("*") if p.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {p.name for p in files}
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert model_digest(tmp_path / "m") != first, file
        file.write_bytes(before)
    (tmp_path / "m/custom").mkdir()
    for name in ("results.json", "report.html", "custom/answers.jsonl"):
        (tmp_path / "m" / name).write_text("{}")
    assert model_digest(tmp_path / "m", besides=tmp_path / "m") == first != model_digest(tmp_path / "m")


def test_a_tower_elsewhere_and_plugins_are_part_of_a_model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "tower").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"mm_vision_tower": str(tmp_path / "tower")}))
    (tmp_path / "tower/model.safetensors").write_bytes(b"x")
    first = model_digest(tmp_path / "m")
    (tmp_path / "tower/model.safetensors").write_bytes(b"xy")
    assert model_digest(tmp_path / "m") != first
    plugin = tmp_path / "mine.py"
    plugin.write_text("a = 1\n")
    one = plugins_digest([str(plugin), "json"])
    plugin.write_text("a = 2\n")
    assert plugins_digest([str(plugin), "json"]) != one != plugins_digest([str(plugin)])
    with pytest.raises(CheckpointError, match="no such model folder"):
        model_digest(tmp_path / "none")


def test_an_adapter_is_part_of_the_model(tmp_path):
    for name in ("model", "red", "blue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    model, red, blue = (tmp_path / name for name in ("model", "red", "blue"))
    assert len({model_digest(model), *(model_digest(model, adapter=one) for one in (red, blue))}) == 3
    (blue / "adapter_model.safetensors").write_bytes(b"red")
    assert model_digest(model, adapter=red) == model_digest(model, adapter=blue)
