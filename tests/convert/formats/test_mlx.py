"""MLX folders: names, shapes and settings here; logits in mlx-vlm, where it is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.convert.formats.exported import export, family
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io


@pytest.mark.parametrize("name", ["tinyllama", "qwen2"])
def test_names_and_settings(name, tmp_path) -> None:
    exported = export(family(name, "clip"), tmp_path, "mlx")
    weights = load_file(exported.theirs / "model.safetensors")
    config = json.loads((exported.theirs / "config.json").read_text())
    tops = {"vision_tower.vision_model", "multi_modal_projector", "language_model.model", "language_model.lm_head"}
    assert all(key.startswith(tuple(tops)) for key in weights)
    assert '"USER: "' in (exported.theirs / "chat_template.jinja").read_text()
    # Weights as torch has them: mlx-vlm turns the convolution's itself.
    assert weights["vision_tower.vision_model.embeddings.patch_embedding.weight"].shape == (32, 3, 8, 8)
    assert config["text_config"]["rope_theta"] == 10000.0 and config["text_config"]["model_type"] in ("llama", "qwen2")


@pytest.mark.exports
@pytest.mark.parametrize("name", ["tinyllama", "qwen2"])
def test_logits_are_the_models_own(name, tmp_path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    exported = export(family(name, "clip"), tmp_path, "mlx")
    theirs = utils.load_model(exported.theirs)
    lmm = io.load_model(exported.ours)[0]
    rows, token = lmm.tokens_per_image, theirs.config.image_token_index
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([5, 6, *[token] * rows, 9, *[token] * rows, 10, 11])
    with torch.no_grad():
        slots = torch.nonzero(ids == token).flatten()
        embeds = lmm.embed(ids.where(ids != token, 0), lmm.encode_images(pixels).flatten(0, 1), slots)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        expected = lmm.logits(lmm.decode(embeds, torch.arange(len(ids)), cu_seqlens=bounds))
    found = theirs(mx.array(ids[None].numpy()), mx.array(pixels.numpy()), None).logits
    np.testing.assert_allclose(np.array(found)[0, :, : lmm.vocab_size], expected, atol=1e-4)


def test_a_tower_with_another_activation_is_warned_of(tmp_path, caplog) -> None:
    export(family("tinyllama", "siglip"), tmp_path, "mlx")
    assert "quick_gelu in every tower" in caplog.text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (family("gemma"), "llm: mlx-vlm's llava does not know gemma"),
        (family("tinyllama", attention_bias=True), "llm.config.attention_bias: True"),
        (family("tinyllama", "dinov2"), "vision.type: dinov2"),
        (family("tinyllama", "clip", "linear"), "connector: linear"),
    ],
)
def test_what_mlx_vlm_lacks_is_refused_by_name(config, reason, tmp_path) -> None:
    with pytest.raises(UserError, match=reason):
        export(config, tmp_path, "mlx")
    assert not (tmp_path / "theirs").exists()
