"""Truncated towers against transformers' own hidden_states, from random and from pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.vision.base import VISION

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
STOCK: dict[str, Any] = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, SiglipModel, SiglipConfig),
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIPModel, CLIPConfig),
}


def open_tower(name: str, path: Path | str, layer: int = -2, select: str = "cls_patch", **overrides: Any) -> Any:
    return VISION.get(name).from_pretrained(
        str(path),
        overrides=overrides,
        feature_layer=layer,
        feature_select=select,
        dtype=torch.float32,
        where="model.vision",
    )


def random_tower(name: str, layer: int = -2, select: str = "cls_patch", seed: int = 0, **config: Any) -> Any:
    return VISION.get(name).from_config(
        SIZES | config, feature_layer=layer, feature_select=select, seed=seed, where="model.vision"
    )


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("layer", [-2, -1, 1, 0, -4])
def test_equals_hidden_states(name: str, layer: int, tmp_path: Path) -> None:
    model_class, config_class = STOCK[name][:2]
    torch.manual_seed(0)
    stock = model_class(config_class(**SIZES)).eval()
    stock.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = stock(pixels, output_hidden_states=True).hidden_states[layer]
        everything = open_tower(name, tmp_path, layer)
        got = everything(pixels)
        patches = open_tower(name, tmp_path, layer, "patch")
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(patches(pixels), want[:, 1:], atol=1e-6, rtol=1e-5)
    tokens = 16 + (name == "clip")
    assert (everything.num_tokens, patches.num_tokens) == (tokens, tokens - 1) == (got.shape[1], want.shape[1] - 1)
    assert (everything.hidden_size, everything.image_size) == (24, 32)
    kept = layer if layer >= 0 else 4 + layer
    assert everything.num_layers == kept == len(everything.encoder.layers)
    names = {n for n, _ in everything.named_parameters()}
    assert names <= set(stock.state_dict()), "stock names"
    assert not any("post_layernorm" in n or n.startswith("head") for n in names)


@pytest.mark.parametrize("name", STOCK)
def test_reads_the_tower_of_a_whole_image_text_model(name: str, tmp_path: Path) -> None:
    _, _, whole, config_class = STOCK[name]
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = whole(config_class(vision_config=SIZES, text_config=text | {"vocab_size": 40})).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(open_tower(name, tmp_path)(pixels), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", STOCK)
def test_seed_decides_the_weights(name: str) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (random_tower(name, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_layer_parameters() -> None:
    tower = random_tower("siglip")
    assert {id(p) for p in tower.layer_parameters(1)} == {id(p) for p in tower.encoder.layers[1].parameters()}
    assert len(tower.layer_parameters(0)) == 2 * len(tower.layer_parameters(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_tower("siglip", layer=4), r"feature_layer: 4 is outside .* 3 layers; use -4..3"),
        (lambda: random_tower("clip", layer=-5), "feature_layer: -5"),
        (lambda: random_tower("siglip", image_size=30), "image_size 30 is not a multiple of patch_size 8"),
        (lambda: random_tower("siglip", hidden_siz=3), "model.vision.config.hidden_siz: not a key"),
        (lambda: random_tower("siglip", model_type="clip_vision_model"), "use model.vision.type: clip$"),
        (lambda: random_tower("siglip", model_type="vit"), "a vit is not a siglip tower$"),
        (lambda: open_tower("siglip", "no/such/folder"), "cannot load 'no/such/folder' as a siglip tower"),
        (lambda: VISION.get("siglp", "model.vision.type"), "did you mean 'siglip'. Known: clip, siglip"),
    ],
)
def test_errors(call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        call()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    SiglipVisionModel(SiglipVisionConfig(**SIZES)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in weights if k.endswith("layers.0.mlp.fc1.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: .*layers\.0\.mlp\.fc1\.weight"):
        open_tower("siglip", tmp_path)


@pytest.mark.parametrize("name", STOCK)
def test_image_processor_without_files(name: str) -> None:
    from PIL import Image

    processor = VISION.get(name).image_processor(32)
    pixels = processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and "Pil" in type(processor).__name__
