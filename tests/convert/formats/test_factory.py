"""Import -> export in the reference's own format: its keys, its shapes, its tensors bit by bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.checkpoints.golden import MODELS, folder, opened, sources
from tinyllava_fast.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.convert.convert import export_model, import_checkpoint
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.checkpoints._load import open_checkpoint
from tinyllava_fast.models.hf import legacy_text_config
from tinyllava_fast.models.vision.base import VISION

MONO = [name for name in MODELS if name.endswith("-mono")]
NAMES = {"llm": "me/llm", "vision": "me/tower"}
# Above the layer that is read: the export fills these.
UNREAD = re.compile(r".*(encoder\.layers?\.2\.|post_layernorm|\.layernorm\.|vision_model\.head\.|mask_token).*")
# Keys of config.json that say how a model came to be, not what it is.
HISTORY = {"resampler_hidden_size", "tune_vision_tower_from_layer", "num_queries", "num_resampler_layers"}


def export(name: str, tmp_path: Path, **names: str) -> Path:
    import_checkpoint(folder(name), tmp_path / "ours", sources=sources(name))
    return export_model(tmp_path / "ours", tmp_path / "factory", "factory", names=names)


@pytest.mark.parametrize("name", MONO)
def test_the_same_file(name: str, tmp_path: Path) -> None:
    path = export(name, tmp_path)
    mine, golden = load_file(path / "model.safetensors"), load_file(folder(name) / "model.safetensors")
    assert mine.keys() == golden.keys()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in golden.items()}
    read = [k for k in golden if not UNREAD.fullmatch(k)]
    assert all(torch.equal(mine[k], golden[k]) for k in read) and len(read) > 0.5 * len(golden)
    written = json.loads((path / "config.json").read_text())
    config = json.loads((folder(name) / "config.json").read_text())
    assert set(config) - set(written) <= HISTORY
    nested = ("text_config", "vision_config")
    same = [k for k in config if k in written and k not in (*nested, *HISTORY)]
    assert {k: written[k] for k in same} == {k: config[k] for k in same}
    if written["connector_type"] == "resampler":
        assert (written["num_queries"], written["num_resampler_layers"]) == (5, 1)
    if config["text_config"]["model_type"] == "openelm":
        kept = {k: v for k, v in config["text_config"].items() if k in written["text_config"]}
        assert {k: written["text_config"][k] for k in kept} == kept
    else:
        assert legacy_text_config(written["text_config"]) == legacy_text_config(config["text_config"])
    stored = {k: v for k, v in config["vision_config"].items() if k not in ("_name_or_path", "architectures")}
    stored = {k: v for k, v in stored.items() if k not in ("torch_dtype", "out_features", "out_indices", "stage_names")}
    assert {k: written["vision_config"][k] for k in stored} == stored


@pytest.mark.parametrize(
    "name", ["phi-mof-mof_mlp-split", "tinyllama-siglip-mlp2x_gelu-lora", "legacy-tinyllama-siglip"]
)
def test_back_again(name: str, tmp_path: Path) -> None:
    """Whatever it came from; a LoRA adapter is merged."""
    path = export(name, tmp_path, **({"llm": "microsoft/phi-2"} if "legacy" in name else {}))
    again, model = open_checkpoint(path, sources=sources(name)).lmm, opened(name).lmm
    mine, other = again.state_dict(), model.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    assert (again.config.template, again.config.image_mode) == (model.config.template, model.config.image_mode)
    assert again.config.vision.feature_select == model.config.vision.feature_select


@pytest.mark.parametrize(
    ("connector", "options"),
    [
        pytest.param("qformer", {"num_queries": 3}, marks=pytest.mark.slow),
        ("mlp", {"depth": 3}),
        ("linear", {}),
        ("mlp", {"depth": 1}),
    ],
)
def test_models_of_our_own(connector: str, options: dict, tmp_path: Path) -> None:
    """And DINOv2 resized as transformers 5 does it: its table is stored at the size that is used."""
    source = opened("qwen2-dinov2-mlp2x_gelu-mono")
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 42, "patch_size": 14}
    text = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 640}
    config = ModelConfig(
        llm=LLMConfig(type="qwen2", config=text),
        vision=VisionConfig(type="dinov2", config=vision, feature_layer=-1, options={"image_size": 56}),
        connector=ConnectorConfig(type=connector, options=options),
    )
    model = build_model(config).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.vision.embeddings.position_embeddings)
    model.config = replace(model.config, template="qwen2_base")
    io.save_model(model, source.tokenizer, VISION.get("dinov2").image_processor(56), tmp_path / "ours")
    with pytest.raises(UserError, match="give --llm-name, --vision-name ID"):
        export_model(tmp_path / "ours", tmp_path / "none", "factory")
    path = export_model(tmp_path / "ours", tmp_path / "factory", "factory", names=NAMES)
    again = io.load_model(path)[0]
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        torch.testing.assert_close(again.encode_images(pixels), model.encode_images(pixels), atol=1e-5, rtol=0)
    assert again.config.origin["llm"] == "me/llm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm": LLMConfig(config={"model_type": "qwen3", "head_dim": 16})}, "llm: the reference has no qwen3"),
        ({"connector": ConnectorConfig(options={"activation": "silu"})}, "connector.options.activation: silu"),
        ({"connector": ConnectorConfig(type="resampler", options={"num_heads": 4})}, "num_heads: 4; the reference's"),
        ({"connector": ConnectorConfig(type="pixel_shuffle")}, "connector.type: the reference has no pixel_shuffle"),
        ({"vision": VisionConfig(type="dinov2_with_registers")}, "vision.type: the reference has no dinov2_with_reg"),
    ],
)
def test_what_the_reference_lacks(changes: dict, message: str, tmp_path: Path) -> None:
    source = opened("tinyllama-clip-mlp2x_gelu-mono")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    llm = changes.get("llm", LLMConfig(config={"model_type": "llama"}))
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    vision = changes.get("vision", VisionConfig(type="clip"))
    model = build_model(
        ModelConfig(
            llm=LLMConfig(config={**llm.config, **text, "intermediate_size": 96, "vocab_size": 640}),
            vision=VisionConfig(type=vision.type, config=sizes),
            connector=changes.get("connector", ConnectorConfig()),
        )
    )
    io.save_model(model, source.tokenizer, source.processor, tmp_path / "ours")
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / "ours", tmp_path / "factory", "factory", names=NAMES)
    assert not (tmp_path / "factory").exists()
