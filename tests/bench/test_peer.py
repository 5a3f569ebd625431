"""The peer is the same mathematics: same weights, same samples, same losses, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.bench.conftest import TINY_MODEL, RecordingGate
from tinyllava_fast.bench import sides
from tinyllava_fast.bench.peer import adapt_peer, build_peer, free_token, run_peer
from tinyllava_fast.bench.samples import unpack
from tinyllava_fast.config.schema import (
    DataConfig,
    EngineConfig,
    LoRAConfig,
    OptimConfig,
    RecipeConfig,
    RunConfig,
    StageConfig,
    TuneConfig,
)
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.train.engine.launch import start_process

OPTIM = OptimConfig(lr=1e-3, schedule="constant", warmup_ratio=0.0)


def run_config(recipe: RecipeConfig) -> RunConfig:
    stage = StageConfig(name="finetune", data=DataConfig(), recipe=recipe, optim=OPTIM)
    return RunConfig(model=TINY_MODEL, stages=[stage], engine=EngineConfig(dtype="float32", device="cpu", threads=1))


def losses_of_both(lmm: LMM, packs: list[PackedBatch], recipe: RecipeConfig) -> tuple[list[float], list[float]]:
    ours, theirs = RecordingGate(), RecordingGate()
    run = run_config(recipe)
    samples = sides.unpack_all(packs, lmm, image_token=96)
    peer = build_peer(lmm, feature_layer=-2, image_token=96)
    adapt_peer(peer, lmm, recipe, seed=0)
    run_peer(
        peer,
        samples,
        theirs,  # type: ignore[arg-type]
        run.stages[0],
        per_step=8,
        precision="float32",
        device="cpu",
        pad_token=0,
    )
    process = start_process(run.engine)
    sides.run_ours(lmm, run, packs, ours, {"a": 1}, process)  # type: ignore[arg-type]
    assert ours.facts["a"] == 1 and ours.facts["state_bytes"]["weights"] > 0  # type: ignore[index]
    return ours.losses, theirs.losses


@pytest.mark.parametrize("llm", ["full", "frozen"])
def test_same_losses_in_fp32(lmm: LMM, packs: list[PackedBatch], llm: str) -> None:
    recipe = RecipeConfig(llm=TuneConfig(tune=llm))  # type: ignore[arg-type]
    ours, theirs = losses_of_both(lmm, packs, recipe)
    assert len(ours) == len(theirs) == 3
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    # later steps depend on gradients, clipping and AdamW of the steps before
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(set(ours)) == 3


ADAPTER = TuneConfig(tune="lora", lora=LoRAConfig(r=8, alpha=64, dropout=0.0))


@pytest.mark.parametrize("recipe", [RecipeConfig(), RecipeConfig(llm=ADAPTER, connector=TuneConfig(tune="frozen"))])
def test_the_optimizer_moves_the_peer_as_it_moves_us(lmm: LMM, packs: list[PackedBatch], recipe: RecipeConfig) -> None:
    """The same pack three times: the loss falls, in both alike; with LoRA too, where nothing else trains."""
    ours, theirs = losses_of_both(lmm, [packs[0]] * 3, recipe)
    assert ours[2] < ours[0] - 0.01
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_untied_head(packs: list[PackedBatch]) -> None:
    llm = replace(TINY_MODEL.llm, config={**TINY_MODEL.llm.config, "tie_word_embeddings": False})
    lmm = build_model(replace(TINY_MODEL, llm=llm), seed=1, dtype=torch.float32)
    ours, theirs = losses_of_both(lmm, packs[:1], RecipeConfig())
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_what_llava_cannot_express_is_refused(lmm: LMM) -> None:
    with pytest.raises(UserError, match="feature_layer"):
        build_peer(lmm, feature_layer=2, image_token=96)


def test_free_token(packs: list[PackedBatch]) -> None:
    samples = unpack(packs[0], 4, 0)
    assert free_token(97, samples) == 96
    samples[0].input_ids[:] = 0
    with pytest.raises(UserError, match="none is left"):
        free_token(1, samples[:1])
