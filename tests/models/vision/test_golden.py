"""Tower features and connector outputs of whole TinyLLaVA Factory models, from their checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models.checkpoints.golden import MODELS, STORED, arrays, folder
from tests.vectors import GOLDEN
from tinyllava_fast.config.load import parse_into
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.vision.base import VISION, VisionTower

# The LLaVA-Bench and LLaVA-1.5 layouts have names of their own; their import tests them.
FACTORY = [name for name in MODELS if not name.startswith(("legacy", "llava15"))]
TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "dinov2": "dinov2"}


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    """One component's weights: of the one file, or of the component's own."""
    prefix = {"vision_tower": "vision_tower._vision_tower.", "connector": "connector._connector."}[part]
    if (folder / "model.safetensors").exists():
        state = load_file(folder / "model.safetensors")
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = torch.load(folder / part / "pytorch_model.bin", weights_only=True)
    return {k.removeprefix("_connector."): v for k, v in state.items()}


def is_read(name: str, tower: VisionTower) -> bool:
    """Return whether a weight belongs to a layer that the tower has."""
    layer = re.search(r"\.layers?\.(\d+)\.", name)
    return layer is None or int(layer[1]) < tower.num_layers


def build_tower(config: dict[str, object]) -> VisionTower:
    vision = {k: v for k, v in config["vision_config"].items() if not k.startswith("model_name_or_path")}
    mof = config["vision_model_name_or_path"].startswith("mof:")
    kind = VISION.get("mof" if mof else TOWERS[vision["model_type"]])
    options: dict[str, object] = {}
    if mof:
        half = json.loads((GOLDEN / "components" / "tiny-dinov2" / "config.json").read_text())
        options = {"dinov2": {"config": half, "interpolation": "transformers4"}}
    elif kind.name == "dinov2":
        crop = json.loads((GOLDEN / "components" / "tiny-dinov2" / "preprocessor_config.json").read_text())["crop_size"]
        options = {"image_size": crop["height"], "interpolation": "transformers4"}
    return kind.from_config(
        vision,
        feature_layer=config["vision_feature_layer"],
        feature_select=config["vision_feature_select_strategy"],
        options=parse_into(kind.Options, options, "options"),
        seed=None,
        where="vision",
        strict=False,
    ).eval()


def test_every_tower_is_here() -> None:
    kinds = {name.split("-")[1] for name in FACTORY if name in STORED}
    assert kinds == {"clip", "siglip", "dinov2", "mof"}


@pytest.mark.parametrize("name", FACTORY)
def test_equals_the_reference(name: str) -> None:
    checkpoint, record = folder(name), arrays(name)
    config = json.loads((checkpoint / "config.json").read_text())
    tower = build_tower(config)
    state = tower.from_reference_names(weights(checkpoint, "vision_tower"))
    tower.load_state_dict({k: v for k, v in state.items() if is_read(k, tower)})
    with torch.no_grad():
        features = tower(record["infer_pixel_values"])
    halves = [k for k in ("infer_tower_features_clip", "infer_tower_features_dinov2") if k in record]
    want = np.concatenate([record[k] for k in halves or ["infer_tower_features"]], -1)
    np.testing.assert_allclose(features.numpy(), want, rtol=0, atol=1e-4)
    assert features.shape[1:] == (tower.num_tokens, tower.hidden_size)

    kind = CONNECTORS.get(config["connector_type"])
    options = {}
    if kind.name == "resampler":
        options = {"num_queries": config["num_queries"], "num_layers": config["num_resampler_layers"]}
    connector = kind(tower.hidden_size, config["hidden_size"], parse_into(kind.Options, options, "options")).eval()
    connector.load_state_dict(kind.from_reference_names(weights(checkpoint, "connector")))
    with torch.no_grad():
        out = connector(features)
    np.testing.assert_allclose(out.numpy(), record["infer_connector_output"], rtol=0, atol=1e-4)
    assert out.shape[1] == connector.num_tokens(tower.num_tokens)
