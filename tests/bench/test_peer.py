"""The peer is the same mathematics: same weights, same samples, same losses, step by step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.bench.conftest import TINY_MODEL, RecordingGate
from tinyllava_fast.bench import sides
from tinyllava_fast.bench.peer import adapt_peer, build_peer, free_token, run_peer
from tinyllava_fast.bench.samples import pad, unpack
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


def test_unpack_gives_back_every_label_and_image(lmm: LMM, packs: list[PackedBatch]) -> None:
    pack = packs[0]
    samples = unpack(pack, 4, 96)
    assert [len(s.input_ids) for s in samples] == pack.cu_seqlens.diff().tolist()
    assert all(int((s.input_ids == 96).sum()) == 4 for s in samples)
    assert sum(int((s.labels != -100).sum()) for s in samples) == pack.num_supervised
    for i, s in enumerate(samples):
        named = s.labels != -100
        assert torch.equal(s.labels[named], s.input_ids[named])
        assert torch.equal(s.pixel_values, pack.pixel_values[i])


def test_pad_is_right_padding_to_the_longest(packs: list[PackedBatch]) -> None:
    batch = pad(unpack(packs[0], 4, 96)[:3], pad_token=7)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 31)
    assert batch["attention_mask"].sum(1).tolist() == [20, 31, 9]
    assert (batch["input_ids"][0, 20:] == 7).all() and (batch["labels"][0, 20:] == -100).all()
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_a_sample_without_image_is_refused(packs: list[PackedBatch]) -> None:
    pack = copy.deepcopy(packs[0])
    pack.image_slots[:4] = len(pack.input_ids)
    with pytest.raises(UserError, match="sample 0 has 0"):
        unpack(pack, 4, 96)


def test_what_llava_cannot_express_is_refused(lmm: LMM) -> None:
    with pytest.raises(UserError, match="feature_layer"):
        build_peer(lmm, feature_layer=2, image_token=96)


def test_free_token(packs: list[PackedBatch]) -> None:
    samples = unpack(packs[0], 4, 0)
    assert free_token(97, samples) == 96
    samples[0].input_ids[:] = 0
    with pytest.raises(UserError, match="none is left"):
        free_token(1, samples[:1])
