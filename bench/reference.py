"""The plainest training loop there is: transformers' Llava in float32, one sample at a time, torch's AdamW.

No packing, no kernel, no compilation and no optimizer of ours; what `tlf-bench parity` compares with.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from tinyllava_fast.bench.gate import Gate
from tinyllava_fast.bench.peer import parts
from tinyllava_fast.bench.samples import PlainSample
from tinyllava_fast.config.schema import StageConfig
from tinyllava_fast.data.types import IGNORE_INDEX


def run_reference(
    model: LlavaForConditionalGeneration,
    samples: list[PlainSample],
    gate: Gate,
    stage: StageConfig,
    *,
    per_step: int,
    device: str,
) -> None:
    """Train on the samples in order, ``per_step`` a step, each step when the gate opens.

    A step's gradient is that of the mean loss over the supervised tokens of all its samples; learning rates are
    constant.
    """
    model.to(device).train()  # type: ignore[arg-type]
    optim = stage.optim
    groups = _groups(model, stage)
    adamw = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    learnt = [p for group in adamw.param_groups for p in group["params"]]
    for start in range(0, len(samples), per_step):
        gate.begin()
        step = samples[start : start + per_step]
        counts = [int((s.labels[1:] != IGNORE_INDEX).sum()) for s in step]
        summed = 0.0
        for sample, count in zip(step, counts, strict=True):
            if count:
                batch = {k: v[None].to(device) for k, v in vars(sample).items()}
                loss = model(**batch).loss
                (loss * (count / sum(counts))).backward()
                summed += float(loss.detach()) * count
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(learnt, optim.clip_norm)
        adamw.step()
        adamw.zero_grad()
        gate.end(summed / sum(counts))


def _groups(model: LlavaForConditionalGeneration, stage: StageConfig) -> list[dict[str, object]]:
    """Return what trains, with the learning rates of the recipe; matrices other than embeddings decay."""
    tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: list[dict[str, object]] = []
    seen: set[nn.Parameter] = set()
    for module, tune in parts(model, stage.recipe):
        module.requires_grad_(tune.tune == "full")
        own = [p for p in module.parameters() if p.requires_grad and p not in seen]
        seen.update(own)
        lr = stage.optim.lr if tune.lr is None else tune.lr
        matrices = [p for p in own if p.dim() >= 2 and p not in tables]
        others = [p for p in own if p.dim() < 2 or p in tables]
        groups.append({"params": matrices, "lr": lr, "weight_decay": stage.optim.weight_decay})
        groups.append({"params": others, "lr": lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
