"""`tlf-doctor --fit LLM TOWER`: what of a model's training fits this machine, and what a step will take.

It is `tlf-bench plan` for a device that is measured here: the peak of products and the speed of copies by bench/, the
memory by what the system says. The share of the peak that a step reaches is the one of plan.yaml's "cpu" on a CPU, and
of its H100 on a GPU: measured on another machine, and so about right at best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tinyllava_fast import hardware
from tinyllava_fast.bench import cluster, machine, plan, report
from tinyllava_fast.bench.cluster import Device
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import PlanSettings
from tinyllava_fast.doctor import cgroup
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.train.dry_run import ROOM

_SHAPE = (1024, 1024, 1024)


@dataclass(frozen=True)
class Question:
    """What is asked: names of configs/model/, a recipe of `tlf-bench plan`, and the size of a pack."""

    llm: str
    tower: str
    recipe: str = "full"
    lora_rank: int = 128
    tokens: int = 8448
    samples: int = 8


def full_name(kind: str, name: str) -> str:
    """Return the name in plan.yaml, of which the last parts may be left out if one alone begins so.

    kind: "llm" or "vision". UserError for a name that is unknown, or could be several.
    """
    known = list(cluster.table()[kind])
    begun = [one for one in known if one == name or one.startswith(f"{name}_")]
    if name in known or len(begun) == 1:
        return name if name in known else begun[0]
    hint = f"several begin so: {', '.join(begun)}" if begun else nearest(name, known)
    raise UserError(
        f"--fit: {name!r} is no {'tower' if kind == 'vision' else 'language model'} whose sizes are known; {hint}"
    )


def measured_device() -> Device:
    """Return this machine's GPU, or its CPU, as `tlf-bench plan` knows devices. Takes about two seconds."""
    device = machine.pick_device("auto")
    flops = max(hardware.gemm_rates(torch.bfloat16, device, shapes=(_SHAPE,), rounds=3, min_seconds=0.05).values())
    copies = machine.copy_bandwidth(device)
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        base = cluster.read_device("h100")
        return replace(base, name="gpu", title=facts.name, memory=facts.total_memory, flops=flops, update_bytes=copies)
    memory = min(hardware.available_memory_bytes(), cgroup.memory_limit() or hardware.total_memory_bytes())
    base = cluster.read_device("cpu", per_node=1)
    title = f"{hardware.processor()}, {torch.get_num_threads()} threads"
    return replace(base, title=title, memory=memory, flops=flops, update_bytes=copies, slowdown=None)


def fit(question: Question, device: Device) -> Report:
    """Return {device, memory, flops_per_s, parameters, learnt, rows}; a row each without and with recomputed layers.

    A row has what plan.predict says of one process, and most_tokens: of a pack, in what the rest leaves.
    """
    settings = PlanSettings(
        gpus=1,
        llm=full_name("llm", question.llm),
        vision=full_name("vision", question.tower),
        recipe=question.recipe,
        lora_rank=question.lora_rank,
        tokens=question.tokens,
        samples=question.samples,
        engine="torch",
    )
    work = plan.work_of(settings)
    rows = []
    for recompute in (False, True):
        engine = replace(plan.ENGINES["torch"], gradient_checkpointing=recompute)
        row = plan.predict(work, device, engine, 1, 1)
        activations = row["memory"]["activations"]
        room = ROOM * device.memory - (row["need"] - activations)
        rows.append(row | {"most_tokens": max(0, int(room / (activations / work.tokens)))})
    return {
        "llm": settings.llm, "tower": settings.vision, "recipe": settings.recipe, "tokens": work.tokens,
        "device": device.title, "memory_bytes": device.memory, "flops_per_s": device.flops, "mfu": device.mfu,
        "parameters": sum(p.numel() for p in work.skeleton.parameters()), "learnt": work.learnt, "rows": rows,
    }  # fmt: skip


def sentences(found: Report) -> Iterator[str]:
    """Yield the report as lines for people."""
    yield report.fill(
        "{llm} + {tower}, {recipe}: {billions:.2f} B parameters, {learnt:,} of them learn. Reckoned, nothing ran",
        found | {"billions": found["parameters"] / 1e9},
    )
    yield report.fill(
        "{device}: {memory_bytes:GiB} to be had, bfloat16 products at {flops_per_s:FLOP/s}, of which a step is taken "
        "to reach {mfu:.0 %}",
        found,
    )
    for row in found["rows"]:
        how = "layers recomputed" if row["checkpointing"] else "nothing recomputed"
        verdict = "fits" if row["fits"] else "DOES NOT FIT"
        yield report.fill(
            "  {how}: {need:GiB} for a pack of {tokens:,} tokens, {verdict} (at most {most_tokens:,} tokens); a step "
            "{step_s:time}, {tokens_per_s:,.0f} tokens/s",
            row | {"how": how, "verdict": verdict, "tokens": found["tokens"]},
        )
    if not any(row["most_tokens"] for row in found["rows"]):
        yield "  it does not fit in any size: take a smaller language model, or --recipe lora or pretrain"
    elif not any(row["fits"] for row in found["rows"]):
        yield "  take a smaller batch.tokens, or --recipe lora; packs_per_step keeps the samples of a step"
