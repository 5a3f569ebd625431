"""The numerator of MFU, against a count by hand and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.vision.families import images, random_tower
from tinyllava_fast.bench.peer import build_peer
from tinyllava_fast.bench.samples import pad, unpack
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.models.flops import Costs, Trains, costs_of, step_flops, tower_flops
from tinyllava_fast.models.lmm import LMM

COSTS = Costs(
    decoder_weights=10,
    attention_width=6,
    head_weights=100,
    connector_weights=(8, 4),
    connector_rows=2,
    tower_flops=1000,
)


def test_by_hand() -> None:
    flops = step_flops(COSTS, [3, 5], images=2, supervised=4, trains=Trains())
    assert flops == {
        "tower": 2 * 1000,
        "connector": 2 * (2 * 2) * (8 * 2 + 4 * 3),  # the first matrix passes no gradient down to a frozen tower
        "decoder": 2 * 8 * 10 * 3,
        "attention": 4 * (6 + 15) * 6 * 3,
        "head": 2 * 4 * 100 * 3,
    }


def test_frozen_weights_need_no_weight_gradients() -> None:
    pretrain = step_flops(COSTS, [3, 5], images=2, supervised=4, trains=Trains(llm=False))
    assert pretrain["decoder"] == 2 * 8 * 10 * 2 and pretrain["head"] == 2 * 4 * 100 * 2
    forward = step_flops(COSTS, [3], images=1, supervised=1, trains=Trains(llm=False, connector=False))
    assert forward["attention"] == 4 * 6 * 6 and forward["connector"] == 2 * 2 * 12
    assert step_flops(COSTS, [3], 1, 1, Trains(vision=True))["tower"] == 3000


def test_costs_of_a_tiny_model(lmm: LMM) -> None:
    costs = costs_of(lmm)
    assert costs.decoder_weights == 2 * (48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 96)
    assert costs.attention_width == 2 * 48
    assert costs.head_weights == 97 * 48
    assert costs.connector_weights == (32 * 48, 48 * 48)
    assert costs.connector_rows == 4
    layer = 4 * 32 * 32 + 2 * 32 * 64
    assert costs.tower_flops == 2 * 4 * 32 * 3 * 64 + 2 * 4 * 2 * layer + 4 * 4 * 4 * 32 * 2


def test_against_torch_on_one_unpadded_sample(lmm: LMM, packs: list[PackedBatch]) -> None:
    """torch counts the peer's forward of one sample: its attention square and the labels' rows are all that differ."""
    sample = unpack(packs[0], 4, 96)[1]
    n = len(sample.input_ids)
    peer = build_peer(lmm, feature_layer=-1, image_token=96)
    peer.set_attn_implementation("eager")  # torch does not count its fused CPU attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer(**pad([sample], 0))
    costs = costs_of(lmm)
    ours = step_flops(costs, [n], images=1, supervised=n, trains=Trains(llm=False, connector=False))
    square_minus_triangle = 4 * (n * n - n * (n + 1) // 2) * costs.attention_width
    assert counter.get_total_flops() == pytest.approx(sum(ours.values()) + square_minus_triangle, rel=1e-3)


@pytest.mark.parametrize("name", ["clip", "siglip2_naflex", "dinov2", "dinov2_with_registers", "mof"])
def test_towers_against_torch(name: str) -> None:
    tower = random_tower(name)
    for encoder in tower.modules():
        if hasattr(encoder, "config"):
            encoder.config._attn_implementation = "eager"  # torch counts neither its fused attention nor ours
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(images(1))
    assert tower_flops(tower) == counter.get_total_flops()
