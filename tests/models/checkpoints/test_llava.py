"""Folders that transformers' LlavaForConditionalGeneration wrote, opened with its logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.vectors import GOLDEN
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models import io
from tinyllava_fast.models.lmm import LMM

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 648,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
IMAGE = 639


def make(
    target: Path, text: str, vision: str, tokenizer: str, **options: object
) -> tuple[LlavaForConditionalGeneration, Path]:
    extra = {"head_dim": 16} if text in ("gemma", "qwen3") else {}
    config = LlavaConfig(
        text_config={"model_type": text, **TEXT, **extra},
        vision_config={"model_type": vision, **VISION},
        image_token_index=IMAGE,
        **options,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(target)
    for file in (GOLDEN / "tokenizers" / tokenizer).iterdir():
        shutil.copy(file, target)
    return model, target


def logits_of_both(model: LlavaForConditionalGeneration, lmm: LMM) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    count = lmm.tokens_per_image
    ids = torch.tensor([1, 5, 6, *[IMAGE] * count, 7, 8, 9])
    with torch.inference_mode():
        theirs = model(input_ids=ids[None], pixel_values=pixels, attention_mask=torch.ones(1, len(ids)).long()).logits
        rows = lmm.encode_images(pixels).flatten(0, 1)
        embeds = lmm.embed(ids, rows, torch.arange(3, 3 + count))
        bounds, prefix = torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
        ours = lmm.logits(lmm.decode(embeds, torch.arange(len(ids)), cu_seqlens=bounds, prefix=prefix))
    return theirs[0], ours


@pytest.mark.parametrize(
    ("text", "vision", "tokenizer", "options", "connector"),
    [
        ("llama", "clip_vision_model", "llama_spm", {}, "mlp"),
        ("gemma", "siglip_vision_model", "gemma_spm", {"vision_feature_select_strategy": "full"}, "mlp"),
        ("qwen3", "clip_vision_model", "qwen2_instruct_bytebpe", {"vision_feature_layer": [-2]}, "mlp"),
        (
            "phi",
            "siglip_vision_model",
            "phi_bytebpe",
            {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
            "mlp",
        ),
        ("qwen2", "siglip_vision_model", "qwen2_base_bytebpe", {"projector_hidden_act": "linear"}, "linear"),
    ],
)
def test_logits(text: str, vision: str, tokenizer: str, options: dict, connector: str, tmp_path: Path) -> None:
    model, path = make(tmp_path / "llava", text, vision, tokenizer, **options)
    lmm = io.load_model(path)[0]
    theirs, ours = logits_of_both(model, lmm)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert theirs.abs().max() > 0.1 and lmm.connector.name == connector


def old_name(key: str) -> str:
    """A key as transformers 4.37 to 4.51 wrote it."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    name = key.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head.")):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and "vision_model" not in name:
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def test_names_of_every_release(tmp_path: Path) -> None:
    model, path = make(tmp_path / "llava", "llama", "clip_vision_model", "llama_spm")
    as_saved = io.load_model(path)[0].state_dict()
    for rename in (old_name, lambda key: key):  # saved under old names by transformers itself, too
        state = {rename(k): v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, path / "model.safetensors")
        found = io.load_model(path)[0].state_dict()
        assert all(torch.equal(found[k], v) for k, v in as_saved.items())
    assert any(k.startswith("language_model.model.") for k in map(old_name, model.state_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer \[-2, -3\]: features of several layers"),
        ({"projector_hidden_act": "tanh"}, "projector_hidden_act 'tanh'"),
        ({"vision_feature_select_strategy": "cls"}, "transformers refuses this llava config"),
        ({"vision_config": {"model_type": "pixtral"}}, "no vision tower for model_type 'pixtral'"),
    ],
)
def test_what_cannot_be_met(changes: dict, message: str, tmp_path: Path) -> None:
    _, path = make(tmp_path / "llava", "llama", "clip_vision_model", "llama_spm")
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        io.load_model(path)


def test_a_lacking_projector_is_named(tmp_path: Path) -> None:
    _, path = make(tmp_path / "llava", "llama", "clip_vision_model", "llama_spm")
    weights = load_file(path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "linear_2.weight" not in k}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: connector.layers.2.weight \[64, 64\]"):
        io.load_model(path)
