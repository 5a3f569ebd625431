"""`tlf-bench plan`: memory, bytes over the wire and step time of every engine on a cluster, predicted.

Nothing runs. Memory is what train/memory.py reckons; bytes follow from what each engine sends (``traffic``); seconds
of computation are useful FLOPs over the device's rate times an MFU, of collectives as bench/cluster.py has them. A
step is

    packs x (forward + backward + what its collectives take beyond `overlap` of them) + collectives at its end + update

and the efficiency is the share of it that computes, nothing twice. Not in it: the wait for the
slowest process, for data, and for checkpoints. `tlf-bench plan-check` holds the same code against measurement on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from tinyllava_fast.bench import cluster
from tinyllava_fast.bench.cluster import Collective, Device
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import MOST_GPUS, PlanSettings
from tinyllava_fast.config.schema import (
    BatchConfig,
    DataConfig,
    EngineConfig,
    LoRAConfig,
    OptimConfig,
    RecipeConfig,
    StageConfig,
    TuneConfig,
)
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.models.architecture import ConnectorPart, LLMPart, LMMConfig, VisionPart
from tinyllava_fast.models.construct import build
from tinyllava_fast.models.flops import Trains, costs_of, step_flops
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import check_engine
from tinyllava_fast.train import memory
from tinyllava_fast.train.dry_run import ROOM
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, check_optimizer
from tinyllava_fast.train.profile import trains

# From the simplest on: of two that are equally fast, the earlier is recommended.
ENGINES: dict[str, EngineConfig] = {
    "torch": EngineConfig(),
    "ddp": EngineConfig(type="ddp"),
    "fsdp": EngineConfig(type="fsdp"),
    "zero1": EngineConfig(type="deepspeed", zero_stage=1),
    "zero2": EngineConfig(type="deepspeed", zero_stage=2),
    "zero3": EngineConfig(type="deepspeed", zero_stage=3),
    "zero2-offload": EngineConfig(type="deepspeed", zero_stage=2, offload=True),
    "zero3-offload": EngineConfig(type="deepspeed", zero_stage=3, offload=True),
}
EQUAL = 1.03  # a step so much longer is as good as the fastest
FRACTION = 0.8  # of a step in computation: then nothing else bounds it


@dataclass(frozen=True)
class Work:
    """The work of one pack: the model as it learns, without values, and the FLOPs.

    tokens and images: in a pack. forward: FLOPs of its forward pass, layers: of them in the decoder's layers, which may
    be recomputed. flops: of both passes.
    """

    skeleton: LMM
    stage: StageConfig
    tokens: int
    images: int
    forward: float
    layers: float
    flops: float

    @property
    def learnt(self) -> int:
        """Return the number of weights that learn."""
        return sum(p.numel() for p in self.skeleton.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Traffic:
    """The collectives of a pass over one pack, forward and backward, and those at the end of a step."""

    forward: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    end: tuple[Collective, ...] = ()


def benchmark(settings: PlanSettings) -> Report:
    """Return {device, work, rows, refused, best, curve}.

    rows: of each engine, with and without recomputed layers (see ``predict``); best: the index of the recommended one,
    None if none fits. curve: for 1 to 1,024 devices the best row of each engine.
    """
    device = cluster.read_device(settings.gpu, node_gbps=settings.node_gbps, per_node=settings.per_node)
    work = work_of(settings)
    rows, refused = _rows(work, device, settings, settings.gpus)
    counts = [2**power for power in range(MOST_GPUS.bit_length())]
    curve = [row for count in counts for row in _best_of_each(_rows(work, device, settings, count)[0])]
    return {
        "device": {k: v for k, v in asdict(device).items() if not isinstance(v, float) or v != float("inf")},
        "work": {
            "parameters": sum(p.numel() for p in work.skeleton.parameters()),
            "learnt": work.learnt,
            "tokens": work.tokens,
            "images": work.images,
            "flops": work.flops,
        },
        "rows": rows,
        "refused": refused,
        "best": best(rows),
        "curve": curve,
        "settings": asdict(settings),
    }


def work_of(settings: PlanSettings) -> Work:
    """Return the work of a pack of the named model and recipe. UserError for an unknown name."""
    known, parts = cluster.table(), {}
    for kind in ("llm", "vision"):
        name = getattr(settings, kind)
        if name not in known[kind]:
            raise UserError(f"--{kind} {name!r}; {nearest(name, known[kind])}")
        parts[kind] = known[kind][name]
    architecture = LMMConfig(
        llm=LLMPart(**parts["llm"], options={}),
        vision=VisionPart(**parts["vision"], feature_select="patch", options={}),
        connector=ConnectorPart(type="mlp", options={}),
    )
    with torch.device("meta"):
        model = build(architecture, dtype=torch.float32, feature_layer=-2)
    lora = LoRAConfig(r=settings.lora_rank, alpha=2 * settings.lora_rank)
    llm = {"lora": TuneConfig(tune="lora", lora=lora), "pretrain": TuneConfig(tune="frozen")}
    tower = TuneConfig(tune="full" if settings.recipe == "full+tower" else "frozen")
    stage = StageConfig(
        name="plan",
        data=DataConfig(),
        recipe=RecipeConfig(llm=llm.get(settings.recipe, TuneConfig()), vision=tower),
        optim=OptimConfig(),
        batch=BatchConfig(tokens=settings.tokens),
    )
    if settings.tokens < settings.samples * (model.tokens_per_image + 1):
        raise UserError(
            f"--tokens {settings.tokens}: --samples {settings.samples} samples with {model.tokens_per_image} image "
            f"tokens each need more than {settings.samples * model.tokens_per_image}"
        )
    lengths = [settings.tokens // settings.samples] * settings.samples
    supervised = int(known["tokens_supervised"] * settings.tokens)
    return pack_work(model, stage, lengths, settings.samples, supervised, dtype="bfloat16")


def pack_work(
    model: LMM,
    stage: StageConfig,
    lengths: Sequence[int],
    images: int,
    supervised: int,
    *,
    dtype: Literal["bfloat16", "float32"],
) -> Work:
    """Return the work of a pack of samples of those lengths. model: no recipe applied, its values aren't read."""
    skeleton = memory.learning_skeleton(model, stage, EngineConfig(dtype=dtype))
    costs, learns = costs_of(model), trains(stage.recipe)
    parts = step_flops(costs, lengths, images, supervised, learns)
    flops = float(sum(parts.values()))
    tokens = sum(lengths)
    adapters = 0
    if stage.recipe.llm.tune == "lora":
        adapters = sum(p.numel() for p in skeleton.llm.parameters() if p.requires_grad)
    ahead = step_flops(costs, lengths, images, supervised, Trains(llm=False, connector=False, vision=False))
    layers = ahead["decoder"] + ahead["attention"] + 2 * tokens * adapters
    return Work(
        *(skeleton, stage, tokens, images),
        forward=float(sum(ahead.values()) + 2 * tokens * adapters),
        layers=float(layers),
        flops=flops + 6.0 * tokens * adapters,
    )


def traffic(work: Work, engine: EngineConfig) -> Traffic:
    """Return what an engine of several processes sends; what it sends again and again is in train/engine/."""
    size = getattr(torch, engine.dtype).itemsize
    learnt = [p for p in work.skeleton.parameters() if p.requires_grad]
    count = sum(p.numel() for p in learnt)
    if engine.sharding == 0:
        return Traffic(end=(Collective("all_reduce", 4 * count, len(learnt)),))
    if engine.sharding == 1:  # BF16_Optimizer: float32 gradients in buckets, then every process's weights
        buckets = -(-count // memory.BUCKET)
        return Traffic(end=(Collective("all_reduce", 4 * count, buckets), Collective("gather", size * count, buckets)))
    if engine.sharding == 2:  # use_multi_rank_bucket_allreduce: whole gradients travel, of every pack
        buckets = -(-count // memory.BUCKET)
        reduce = Collective("all_reduce", 4 * count, buckets)
        return Traffic(backward=(reduce,), end=(Collective("gather", size * count, buckets),))
    return _sharded(work, engine, size)


def _sharded(work: Work, engine: EngineConfig, size: int) -> Traffic:
    """Return what fsdp and ZeRO-3 send: each gathers weights for both passes and sums gradients of every pack."""
    parts = memory.sharded_parts(work.skeleton)
    tower = len(work.skeleton.vision.layers)
    back = parts if trains(work.stage.recipe).vision else parts[tower:]  # a frozen tower has no backward pass
    if engine.type == "fsdp":
        back = back[:-1]  # the rest stays gathered until the step ends
    each = engine.type != "fsdp"

    def gathered(chosen: Sequence[Sequence[torch.Tensor]]) -> Collective:
        bytes_ = size * sum(p.numel() for part in chosen for p in part)
        # ZeRO-3 fetches ahead in buckets, and a layer at least by itself.
        buckets = sum(max(1, sum(p.numel() for p in part) // memory.AHEAD) for part in chosen)
        return Collective("gather", bytes_, buckets if each else len(chosen))

    learnt = [[p for p in part if p.requires_grad] for part in parts]
    learnt = [part for part in learnt if part]
    count = sum(p.numel() for part in learnt for p in part)
    reduced = Collective("reduce_scatter", 4 * count, -(-count // memory.BUCKET) if each else len(learnt))
    return Traffic(
        forward=(gathered(parts),), backward=(gathered(back), reduced), end=(Collective("all_reduce", 4, 1),)
    )


def predict(work: Work, device: Device, engine: EngineConfig, count: int, packs: int) -> Report:
    """Return one row: what a process of ``count`` needs, sends and takes for a step of ``packs`` packs of its own.

    memory: bytes by what they are; need: their sum. wire_bytes: that leave a process in a step. seconds: by cause:
    compute, recompute, links, latency, update; only what nothing hides. step_s: their sum. bound: what to mend first.
    """
    kept = memory_bytes(work, device, engine, count, packs)
    forward = work.forward / (device.flops * device.mfu) * device.slowdowns(count)[0]
    compute = forward * work.flops / work.forward
    again = (
        forward * work.layers / work.forward * {True: 1.0, "selective": 0.5, False: 0.0}[engine.gradient_checkpointing]
    )
    sent = traffic(work, engine) if count > 1 else Traffic()
    hidden = device.overlap
    exposed = [
        _exposed(device, sent.forward, count, packs, hidden * forward),
        _exposed(device, sent.backward, count, packs, hidden * (compute - forward + again)),
        _exposed(device, sent.end, count, 1, 0.0),
    ]
    update = _update_seconds(work, device, engine, count)
    seconds = {
        "compute": packs * compute,
        "recompute": packs * again,
        "links": sum(links for links, _ in exposed),
        "latency": sum(latency for _, latency in exposed),
        "update": update,
    }
    step = sum(seconds.values())
    need = sum(kept.values())
    fits = need <= ROOM * device.memory / (min(count, device.per_node) if device.is_cpu else 1)
    wire = packs * sum(device.sent(one, count) for one in (*sent.forward, *sent.backward))
    wire += sum(device.sent(one, count) for one in sent.end)
    slowed = {name: part for name, part in seconds.items() if name != "compute"}
    bound = "compute" if seconds["compute"] >= FRACTION * step else max(slowed, key=lambda name: slowed[name])
    return {
        "gpus": count,
        "checkpointing": engine.gradient_checkpointing,
        "memory": kept,
        "need": need,
        "fits": fits,
        "wire_bytes": wire if count > 1 else 0.0,
        "seconds": seconds,
        "step_s": step,
        "efficiency": packs * compute / step,
        "mfu": packs * work.flops / step / device.flops,
        "tokens_per_s": count * packs * work.tokens / step,
        "bound": bound if fits else "memory",
    }


def memory_bytes(work: Work, device: Device, engine: EngineConfig, count: int, packs: int) -> dict[str, float]:
    """Return the bytes that a process of ``count`` needs at its largest, by what they are. packs: of its own a step."""
    process = Process(0, count, torch.device("cpu" if device.is_cpu else "cuda"))
    stage = replace(work.stage, batch=replace(work.stage.batch, packs_per_step=packs * count))
    kept: dict[str, float] = dict(memory.kept_bytes(work.skeleton, stage, engine, process))
    kept["activations"] = work.tokens * memory.token_bytes(work.skeleton, work.stage, engine)
    kept["activations"] += work.images * memory.image_bytes(work.skeleton, work.stage, engine)
    # An update's copies come when the activations are gone: what they take beyond those.
    kept["update"] = max(memory.update_bytes(work.skeleton, engine, process) - kept["activations"], 0)
    return {**kept, "process": device.context}


def _exposed(
    device: Device, sent: Sequence[Collective], count: int, times: int, hidden_s: float
) -> tuple[float, float]:
    """Return the seconds of links and of latency that computation does not hide, over all times."""
    whole = sum(device.seconds(one, count) for one in sent)
    if not whole:
        return 0.0, 0.0
    latency = sum(device.seconds(Collective(one.kind, 0, one.count), count) for one in sent)
    left = times * max(whole - hidden_s, 0.0)
    return left * (1 - latency / whole), left * latency / whole


def _update_seconds(work: Work, device: Device, engine: EngineConfig, count: int) -> float:
    """Return the seconds of an update: every value that is read or written once, over the memory's speed."""
    own = work.learnt / (count if engine.sharding else 1)
    moved = own * update_bytes(work)
    if not engine.offload or device.is_cpu:
        return moved / device.update_bytes * device.slowdowns(count)[1]
    travel = own * (4 + getattr(torch, engine.dtype).itemsize) / device.host_bytes
    return moved / float(cluster.table()["host_update_bytes_per_s"]) + travel


def update_bytes(work: Work) -> float:
    """Return the bytes of memory that the update of a weight reads and writes."""
    size = next(p.dtype.itemsize for p in work.skeleton.parameters() if p.requires_grad)
    # moments and master both ways; the gradient for its norm and again; the weight
    return 2 * OPTIMIZERS.get(work.stage.optim.type).moment_bytes + 8 + 8 + (size if size < 4 else 0)


def _rows(work: Work, device: Device, settings: PlanSettings, count: int) -> tuple[list[Report], dict[str, str]]:
    """Return the rows of all engines, and why others can't run: {engine: reason}."""
    rows: list[Report] = []
    refused: dict[str, str] = {}
    if settings.engine != "all" and settings.engine not in ENGINES:
        raise UserError(f"--engine {settings.engine!r}; {nearest(settings.engine, ['all', *ENGINES])}")
    chosen = list(ENGINES) if settings.engine == "all" else [settings.engine]
    for name in chosen:
        if (name == "torch") != (count == 1) and not ENGINES[name].offload:
            if settings.engine != "all" and count == settings.gpus:
                reason = "runs one process" if name == "torch" else "needs several processes"
                raise UserError(f"--engine {name} {reason}; --gpus {count} asks for {count}")
            continue
        try:
            check_engine(work.stage.recipe, ENGINES[name], "stages.plan")
            check_optimizer(work.stage.optim, ENGINES[name], torch.device("cpu"), "stages.plan")
        except UserError as error:
            refused[name] = str(error)
            continue
        for recompute in (False, True):
            engine = _with_checkpointing(ENGINES[name], recompute)
            rows.append({"engine": name, **predict(work, device, engine, count, settings.packs)})
    return rows, refused


def _with_checkpointing(engine: EngineConfig, recompute: bool) -> EngineConfig:
    return EngineConfig(
        type=engine.type, zero_stage=engine.zero_stage, offload=engine.offload, gradient_checkpointing=recompute
    )


def best(rows: Sequence[Report]) -> int | None:
    """Return the index of the row to take: of those that fit, the simplest that is as good as the fastest."""
    fitting = [index for index, row in enumerate(rows) if row["fits"]]
    if not fitting:
        return None
    least = min(rows[index]["step_s"] for index in fitting)
    return next(index for index in fitting if rows[index]["step_s"] <= EQUAL * least)


def _best_of_each(rows: Sequence[Report]) -> Iterator[Report]:
    """Yield the faster row of each engine that fits."""
    for name in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == name]
        if (index := best(own)) is not None:
            yield own[index]
