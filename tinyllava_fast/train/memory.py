"""The memory of a training step, reckoned: what `tlf-train --dry-run` and `tlf-bench plan` say.

Weights, masters, moments and gradients are counted on a copy of the model without values, to which the recipe is
applied; what a token of a pack keeps for the backward pass is estimated from the widths (within 10 % of what
`tlf-bench fit` measures of a 1.1 B model, docs/memory.md). What an engine holds beside that for a moment, gathered
weights and buckets of gradients, follows from how it gathers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyllava_fast.config.schema import EngineConfig, StageConfig
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.optimizers.base import OPTIMIZERS
from tinyllava_fast.train.profile import state_bytes, trains

BUCKET = 500_000_000
"""Elements that DeepSpeed reduces or gathers at a time (reduce_bucket_size, allgather_bucket_size): its defaults."""
AHEAD = 50_000_000
"""Elements that ZeRO-3 gathers ahead at a time (stage3_prefetch_bucket_size): its default."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (stage3_max_live_parameters): its default."""


def learning_skeleton(model: LMM, stage: StageConfig, engine: EngineConfig, *, seed: int = 0) -> LMM:
    """Return a copy of a model without values, its recipe applied, of the engine's dtype.

    Raises NotImplementedError or RuntimeError for a recipe that needs values (qlora).
    """
    skeleton = without_values(model)
    apply_recipe(skeleton, stage.recipe, stage.optim, seed=seed)
    return skeleton.to(getattr(torch, engine.dtype))


def kept_bytes(skeleton: LMM, stage: StageConfig, engine: EngineConfig, process: Process) -> dict[str, int]:
    """Return what stays between steps, the gradients at the end of a backward pass, and buffers, in one process.

    skeleton: see ``learning_skeleton``. process: one of ``world_size``, on its device.
    """
    count = process.world_size
    dtype = getattr(torch, engine.dtype)
    sizes = state_bytes(skeleton, OPTIMIZERS.get(stage.optim.type).moment_bytes)
    weights = sum(size for name, size in sizes.items() if not name.endswith("optimizer"))
    learnt = _learnt(skeleton)
    optimizer = sum(size for name, size in sizes.items() if name.endswith("optimizer"))
    optimizer += 4 * learnt if stage.optim.ema else 0
    shards = [count if engine.sharding >= level else 1 for level in (1, 2, 3)]
    host = engine.type == "deepspeed" and engine.offload and process.device.type != "cpu"
    return {
        "weights": weights // shards[2],
        "masters and moments": 0 if host else optimizer // shards[0],
        "gradients": learnt * _gradient_bytes(stage, engine, process, dtype) // shards[1],
        "buffers": _buffer_bytes(skeleton, engine, process) if count > 1 else 0,
    }


def update_bytes(skeleton: LMM, engine: EngineConfig, process: Process) -> int:
    """Return what an update holds for a moment, when the activations of a pass are gone: the peak has the larger.

    DeepSpeed's masters make room for what the dither gives them, so a copy of each stays until the step ends
    (DeepSpeedEngine._dither). Offloaded, they are in the host's memory.
    """
    if not engine.sharding or engine.type != "deepspeed" or engine.dtype != "bfloat16":
        return 0
    if engine.offload and process.device.type != "cpu":
        return 0
    learnt = _learnt(skeleton)
    return 4 * learnt // process.world_size


def copied_bytes(skeleton: LMM, stage: StageConfig, process: Process) -> int:
    """Return what a process copies into the host's memory for a checkpoint in the background: its share of all."""
    sizes = state_bytes(skeleton, OPTIMIZERS.get(stage.optim.type).moment_bytes)
    ema = 4 * _learnt(skeleton) if stage.optim.ema else 0
    return (sum(sizes.values()) + ema) // process.world_size


def _learnt(skeleton: LMM) -> int:
    """Return the number of weights that train."""
    return sum(p.numel() for p in skeleton.parameters() if p.requires_grad)


def _gradient_bytes(stage: StageConfig, engine: EngineConfig, process: Process, dtype: torch.dtype) -> int:
    """Return the bytes of a gradient at its largest: float32 where gradients are summed, over packs or processes.

    A GPU's optimizer takes float32 alone (train/optimizers/adamw.py).
    """
    summed = stage.batch.packs_per_step > process.world_size
    if engine.sharding < 3:
        summed |= process.world_size > 1 or process.device.type != "cpu"
    return 4 if summed or engine.type == "deepspeed" else dtype.itemsize


def _buffer_bytes(skeleton: LMM, engine: EngineConfig, process: Process) -> int:
    """Return what an engine of several processes holds for a moment beside weights and gradients."""
    size = getattr(torch, engine.dtype).itemsize
    parts = sharded_parts(skeleton)
    whole = [sum(p.numel() for p in part) for part in parts]
    learnt = [sum(p.numel() for p in part if p.requires_grad) for part in parts]
    overlap = 2 if process.device.type == "cuda" else 1  # one bucket fills while the other travels
    if engine.type == "fsdp":
        # The rest stays gathered for the whole step, a layer runs while the next arrives; then its gradient leaves.
        layers = sorted(whole[:-1])[-overlap:]
        return size * (whole[-1] + sum(layers)) + (size + 4) * max(learnt)
    # DeepSpeed's bucket of gradients, and on its way the same in float32, twice: cast, and copied together.
    bucket = (overlap * size + 8) * min(BUCKET, sum(learnt))
    if engine.sharding == 3:  # gradients stay until their bucket is full
        return size * min(LIVE, sum(whole)) + bucket + size * min(BUCKET, sum(learnt))
    return bucket if engine.sharding else 0


def sharded_parts(model: LMM) -> list[list[nn.Parameter]]:
    """Return the weights that fsdp gathers together: those of each layer in the order they run, then the rest."""
    parts = [list(layer.parameters()) for layer in model.layers]
    known = {p for part in parts for p in part}
    return [*parts, [p for p in model.parameters() if p not in known]]


def without_values(model: LMM) -> LMM:
    """Return a copy of a model whose tensors have shapes and no memory."""
    tensors: Sequence[Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
    return copy.deepcopy(model, memo)


def token_bytes(model: LMM, stage: StageConfig, engine: EngineConfig) -> int:
    """Return about what a token keeps in the decoder for the backward pass: of each layer the inputs of its products.

    A layer that is recomputed keeps its input alone; one such layer at a time has all.
    """
    recipe = trains(stage.recipe)
    if not (recipe.llm or recipe.connector or recipe.vision) and stage.recipe.llm.tune not in ("lora", "qlora"):
        return 0
    text = model.llm.config.get_text_config()
    width, inner = model.hidden_size, getattr(text, "intermediate_size", None) or 4 * model.hidden_size
    layer = 9 * width + 4 * inner + 3 * max(model.num_kv_heads) * model.head_dim
    whole = {True: 1.0, "selective": model.num_layers / 2 + 1, False: float(model.num_layers)}
    kept = (
        whole[engine.gradient_checkpointing] * layer + (model.num_layers + 13) * width
    )  # 13: embeddings, last norm, loss
    return int(kept * getattr(torch, engine.dtype).itemsize)


def image_bytes(model: LMM, stage: StageConfig, engine: EngineConfig) -> int:
    """Return about what an image keeps in a tower that trains; next to nothing in a frozen one."""
    if not trains(stage.recipe).vision:
        return 0
    width = model.vision.hidden_size
    layer = 9 * width + 4 * 4 * width + 3 * width
    return int(model.vision.num_tokens * model.vision.num_layers * layer * getattr(torch, engine.dtype).itemsize)
