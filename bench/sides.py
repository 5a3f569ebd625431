"""The sides of `tlf-bench train` and its kin, each inside its worker process.

All build the same model from the same seed and read the same packs; the peer and the reference then copy the weights
into transformers' model and take the packs apart into their own batches.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tinyllava_fast.bench.gate import Facts, Gate
from tinyllava_fast.bench.samples import PlainSample, build_packs, unpack
from tinyllava_fast.config.schema import RecipeConfig, RunConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.models.build import build_image_processor, build_model, build_tokenizer
from tinyllava_fast.models.flops import costs_of, pack_flops
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes import lora
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train import cpu_pool
from tinyllava_fast.train.compile import compile_forward
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.engine.launch import Process, build_engine, start_process
from tinyllava_fast.train.features import FeatureCache
from tinyllava_fast.train.profile import trains


def serve(
    side: str,
    run: RunConfig,
    gate: Gate,
    *,
    per_step: int,
    precision: str,
    checkpointing: bool = False,
    attention: str = "sdpa",
    liger: bool = False,
) -> None:
    """Build the model and the packs, report readiness, and train one side through the gate.

    precision, checkpointing, attention (as transformers names it), liger (its kernels): of the peer.
    """
    began = time.perf_counter()
    process = start_process(run.engine)  # threads and device, for both sides alike
    lmm = build_model(run.model, seed=run.seed, dtype=torch.float32)
    tokenizer = build_tokenizer(run.model)
    processor = build_image_processor(run.model)
    packs = build_packs(run, tokenizer, processor, lmm.tokens_per_image, per_step=per_step)
    setup_seconds = time.perf_counter() - began
    facts = facts_of(lmm, run, packs, per_step)
    facts["setup_seconds"] = setup_seconds
    if side == "ours":
        run_ours(lmm, run, packs, gate, facts, process)
        return
    # Trainer brings accelerate and more with it: neither time nor memory of ours
    from tinyllava_fast.bench.peer import adapt_peer, build_peer, free_token, run_peer
    from tinyllava_fast.bench.reference import run_reference

    image_token = free_token(lmm.vocab_size, unpack_all(packs, lmm, image_token=0))
    samples = unpack_all(packs, lmm, image_token=image_token)
    layer = run.model.vision.feature_layer
    peer = build_peer(lmm, feature_layer=layer, image_token=image_token, attention=attention)
    stage = run.stages[0]
    adapt_peer(peer, lmm, stage.recipe, seed=run.seed)
    del lmm, packs
    gate.ready(facts)
    device = process.device.type
    if side == "reference":
        run_reference(peer, samples, gate, stage, per_step=per_step, device=device)
        return
    run_peer(
        peer,
        samples,
        gate,
        stage,
        per_step=per_step,
        precision=precision,
        checkpointing=checkpointing,
        liger=liger,
        device=device,
        pad_token=tokenizer.pad_token_id or 0,
    )


def run_ours(lmm: LMM, run: RunConfig, packs: list[PackedBatch], gate: Gate, facts: Facts, process: Process) -> None:
    """Run the pieces of our training loop on the packs, each step when the gate opens."""
    stage = run.stages[0]
    lmm.to(process.device)
    groups = [group.copy() for group in apply_recipe(lmm, stage.recipe, stage.optim, seed=run.seed)]
    lmm.set_gradient_checkpointing(run.engine.gradient_checkpointing)
    if run.engine.compile:
        compile_forward(lmm, run.engine)
    engine = build_engine(process, run.engine, stage.optim, lmm, groups, micro_batches=1)
    lrs = {group["name"]: group["lr"] for group in groups}
    with tempfile.TemporaryDirectory() as folder:
        features = None
        if stage.data.feature_cache:  # as a second epoch finds it
            features = FeatureCache(Path(folder), lmm.vision, limit=int(stage.data.feature_cache * 2**30))
            for pack in packs:
                features.attach(pack)
        cpu_pool.trim()
        facts["state_bytes"] = state_bytes(lmm, engine)
        gate.ready(facts)
        for pack in packs:
            gate.begin()
            batch = features.attach(pack) if features else pack
            loss = engine.forward_backward(batch, 1.0 / pack.num_supervised)
            engine.step(lrs)
            gate.end(float(loss) / pack.num_supervised)


def state_bytes(lmm: LMM, engine: TrainingEngine) -> dict[str, int]:
    """Return the bytes that training keeps: weights as stored, masters, moments, and gradients at their peak.

    Gradients: of the weights' dtype and, below float32, their sums in float32.
    """
    own = [t.to_local() if isinstance(t, DTensor) else t for t in lmm.state_dict().values()]  # fsdp's share
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    learnt = [p for p in lmm.parameters() if p.requires_grad]
    low = [p for p in learnt if p.dtype != torch.float32]
    sizes = {"masters": 0, "moments": 0}
    for item in engine.optimizer_state():
        kind = item.name.partition("/")[0]
        if kind != "step":
            sizes["masters" if kind == "master" else "moments"] += math.prod(item.shape) * item.dtype.itemsize
    gradients = sum(p.numel() * p.element_size() for p in learnt) + sum(4 * p.numel() for p in low)
    return {"weights": sum(stored.values()), **sizes, "gradients": gradients}


def unpack_all(packs: list[PackedBatch], lmm: LMM, image_token: int) -> list[PlainSample]:
    """Return every pack's samples, in order, as transformers takes them."""
    return [sample for pack in packs for sample in unpack(pack, lmm.tokens_per_image, image_token)]


def facts_of(lmm: LMM, run: RunConfig, packs: list[PackedBatch], per_step: int) -> Facts:
    """Return the facts of a step, means over all packs; setup_seconds and state_bytes are left to the caller."""
    recipe = run.stages[0].recipe
    learns = trains(recipe)
    costs = costs_of(lmm)
    flops: dict[str, float] = {}
    padded = 0
    for pack in packs:
        lengths = [n for n in pack.cu_seqlens.diff().tolist() if n]
        padded += per_step * max(lengths)
        parts = pack_flops(costs, pack, learns, cached=bool(run.stages[0].data.feature_cache))
        for name, value in parts.items():
            flops[name] = flops.get(name, 0.0) + value / len(packs)
    tokens = sum(p.num_tokens for p in packs) / len(packs)
    if weights := _adapter_weights(lmm, recipe):
        flops["adapters"] = 2 * 3 * tokens * weights  # forward, and gradients of inputs and weights
    return {
        "setup_seconds": 0.0,
        "flops": flops,
        "budget": len(packs[0].input_ids),
        "tokens_per_step": tokens,
        "supervised_per_step": sum(p.num_supervised for p in packs) / len(packs),
        "padded_tokens_per_step": padded / len(packs),
        "parameters": sum(p.numel() for p in lmm.parameters()),
        "state_bytes": {},
    }


def _adapter_weights(lmm: LMM, recipe: RecipeConfig) -> int:
    """Return the number of elements of the decoder's LoRA matrices that the recipe will add."""
    plan = lora.plan(lmm, recipe)
    ranks = {name: layer.r for name, layer in plan.layers.items() if name.startswith("llm.")} if plan else {}
    return sum(rank * sum(lmm.get_parameter(f"{name}.weight").shape) for name, rank in ranks.items())
