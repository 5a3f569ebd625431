from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from tinyllava_fast.infer.fast_model.tower_layer import TowerLayer, prepare_tower, takes
from tinyllava_fast.models.attention import FULL

SIZES = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}


def built(kind: str, **extra: Any) -> Any:
    config_class, model_class = {
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
    }[kind]
    torch.manual_seed(0)
    config = config_class(image_size=32, patch_size=8, **SIZES, **extra)
    model = model_class._from_config(config, attn_implementation=FULL).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.inference_mode()
def test_equals_the_stock_tower(kind: str) -> None:
    stock = built(kind)
    fused = copy.deepcopy(stock)
    prepare_tower(fused)
    assert sum(isinstance(m, TowerLayer) for m in fused.modules()) == 2
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = stock(pixels).last_hidden_state
    assert torch.allclose(fused(pixels).last_hidden_state, wanted, atol=2e-5)

    exact = copy.deepcopy(stock).bfloat16().double()(pixels.bfloat16().double()).last_hidden_state
    rough = stock.bfloat16()(pixels.bfloat16()).last_hidden_state
    fused = copy.deepcopy(stock)
    prepare_tower(fused)
    got = fused(pixels.bfloat16()).last_hidden_state
    assert float((got - exact).pow(2).mean()) <= 1.2 * float((rough - exact).pow(2).mean())


def test_takes_only_what_it_knows() -> None:
    layer = built("siglip").encoder.layers[0]
    assert takes(layer)
    assert not takes(built("siglip", hidden_act="relu").encoder.layers[0])

    class Own(SiglipEncoderLayer):
        pass

    assert not takes(Own(built("siglip").config))
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)  # as LoRA wraps it
    assert not takes(layer)
