"""Filling modules from files of safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllava_fast.config.schema import ConnectorConfig
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.weights_file import WEIGHTS, load_component, load_weights

Saved = tuple[LMM, Path]


@pytest.fixture
def saved(tiny: Callable, tmp_path: Path) -> Saved:
    """A model and a folder with its weights alone."""
    lmm = build_model(tiny(), seed=1)
    tied = lmm.tied_names()
    save_file({k: v for k, v in lmm.state_dict().items() if k not in tied}, tmp_path / WEIGHTS)
    return lmm, tmp_path


def test_another_architecture(saved: Saved, tiny: Callable) -> None:
    _, folder = saved
    deeper = build_model(tiny(llm={"num_hidden_layers": 3, "intermediate_size": 40}, vision={"num_hidden_layers": 2}))
    before = deeper.connector.layers[0].weight.clone()
    with pytest.raises(CheckpointError) as caught:
        load_weights(deeper, folder)
    text = str(caught.value)
    assert "another architecture" in text and str(folder) in text
    assert text.count("missing: llm.model.layers.2.") == 9
    assert "unexpected: vision.encoder.layers.1.mlp.fc1.weight [40, 24]" in text
    assert "llm: model.layers.0.mlp.up_proj.weight has shape [48, 32], this model needs [40, 32]" in text
    assert torch.equal(deeper.connector.layers[0].weight, before), "nothing was copied"


def test_connector_file(saved: Saved, tiny: Callable, tmp_path: Path) -> None:
    lmm, folder = saved
    weights = load_file(folder / "model.safetensors")
    file = tmp_path / "connector.safetensors"
    for strip in ("", "connector."):
        kept = {k.removeprefix(strip): v + 1 for k, v in weights.items() if k.startswith("connector.")}
        save_file(kept, file)
        again = build_model(dataclasses.replace(tiny(), connector=ConnectorConfig(path=str(file))))
        assert torch.equal(again.connector.layers[2].weight, lmm.connector.layers[2].weight + 1)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_component(lmm.connector, tmp_path / "none.safetensors", "connector")
