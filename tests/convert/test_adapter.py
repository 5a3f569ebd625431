"""LoRA folders: merged or kept apart, and the adapter alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.checkpoints.golden import GOLDEN, arrays, folder, opened, sources
from tinyllava_fast.convert.convert import export_model, import_checkpoint
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io
from tinyllava_fast.models.checkpoints.load import open_checkpoint

LORA = "tinyllama-siglip-mlp2x_gelu-lora"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return import_checkpoint(folder(LORA), tmp_path / "kept", keep_adapter=True, sources=sources(LORA))


def test_kept_apart_and_merged_when_loaded(kept: Path) -> None:
    base = load_file(folder(LORA) / "adapter_model.safetensors")
    stored = load_file(kept / "adapter" / "adapter_model.safetensors")
    renamed = {k.replace("language_model.", "llm."): v for k, v in base.items()}
    assert renamed.keys() == stored.keys() and all(torch.equal(renamed[k], v) for k, v in stored.items())
    merged, model = io.load_model(kept)[0].state_dict(), opened(LORA).lmm.state_dict()
    for name, tensor in model.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    live = io.load_model(kept, merge_adapter=False)[0]
    assert live.config.adapter and any("lora_A" in name for name, _ in live.named_parameters())


def test_the_adapter_alone(kept: Path, tmp_path: Path) -> None:
    import peft

    for number, source in enumerate((kept, folder(LORA))):
        target = export_model(source, tmp_path / str(number), "adapter")
        assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = peft.LoraConfig.from_pretrained(str(target))
        assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
        assert "llm.model.layers.1.self_attn.v_proj" in config.target_modules
        mine, wanted = (load_file(p / "adapter_model.safetensors") for p in (target, kept / "adapter"))
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[k], wanted[k]) for k in mine)


def test_nothing_to_keep_or_export(tmp_path: Path) -> None:
    plain = "tinyllama-clip-mlp2x_gelu-mono"
    with pytest.raises(UserError, match="holds no adapter to keep"):
        import_checkpoint(folder(plain), tmp_path / "a", keep_adapter=True)
    with pytest.raises(UserError, match="the model has no adapter"):
        export_model(folder(plain), tmp_path / "b", "adapter")
    assert not list(tmp_path.iterdir())


def test_gradients_of_the_adapter(pack: Callable[..., Any]) -> None:
    lmm = open_checkpoint(folder(LORA), sources=sources(LORA), merge=False).lmm
    golden = arrays(LORA)
    samples = []
    for row in range(3):
        mask = golden["batch_attention_mask"][row].bool()
        ids = golden["batch_input_ids"][row][mask].tolist()
        pixels = golden["batch_pixel_values"][row] if IMAGE_INDEX in ids else None
        supervised = (golden["batch_labels"][row][mask] != -100).tolist()
        samples.append(SimpleNamespace(ids=[None if i < 0 else i for i in ids], supervised=supervised, pixels=pixels))
    batch = pack(samples, lmm.tokens_per_image)
    for parameter in lmm.parameters():
        parameter.requires_grad_(True)
    (lmm(**batch.tensors()) / batch.num_supervised).backward()
    norms = json.loads((GOLDEN / "models" / LORA / "grad_norms.json").read_text())
    grads = {name: p.grad for name, p in lmm.named_parameters() if p.grad is not None}
    compared = 0
    for name, norm in norms.items():
        ours = name.removeprefix("base_model.model.").replace("language_model.", "llm.")
        ours = ours.replace("connector._connector.", "connector.layers.")
        assert float(grads[ours].norm()) == pytest.approx(norm, rel=1e-3), name
        compared += 1
    assert compared == 32
