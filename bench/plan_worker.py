"""A process of `tlf-bench plan-check`: it trains a few steps under an engine, and says what they took."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllava_fast.bench import netns
from tinyllava_fast.config.schema import EngineConfig, RunConfig
from tinyllava_fast.data.types import IGNORE_INDEX, PackedBatch
from tinyllava_fast.hardware import gemm_flops_per_s, peak_rss_bytes, reset_peak_rss, rss_bytes
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train import cpu_pool
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.engine.launch import Process, build_engine, start_process

SMALL, LARGE = 2**12, 2**22  # elements of float32 whose times give a collective's latency and rate


class Answer(TypedDict):
    """The measurements of one process; seconds of each timed step."""

    passes: list[float]
    updates: list[float]
    peak_rss_bytes: int
    process_bytes: int  # before the model is built
    sent_bytes: float  # of a step, on a limited link
    collectives: dict[str, dict[str, float]]
    gemm_flops_per_s: float


@dataclass(frozen=True)
class Task:
    """The task of one process. alone: it trains by itself beside the others, and measures the collectives."""

    run: RunConfig
    engine: EngineConfig
    lengths: tuple[int, ...]
    steps: int
    environment: Mapping[str, str]
    alone: bool = False
    namespace: str = ""
    sizes: tuple[int, int] = field(default=(SMALL, LARGE))


def work(task: Task, answers: Connection) -> None:
    """Carry the task out and send the Answer; an error is sent as its text."""
    try:
        answers.send(_measure(task))
    except Exception as error:
        answers.send(f"{type(error).__name__}: {error}")
        raise


def _measure(task: Task) -> Answer:
    os.environ.update(task.environment)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that fsdp calls
    if task.namespace:
        netns.enter(task.namespace)
    torch.set_num_threads(1)
    cpu_pool.install()
    # Also for one process and for plain torch: all join, so that they can begin together.
    process = start_process(EngineConfig(type="ddp", device="cpu", threads=1))
    gemm = 0.0
    if task.alone and process.world_size == 1:
        gemm = gemm_flops_per_s(torch.bfloat16)
        cpu_pool.trim()
    base = rss_bytes()
    own = Process(process.rank, 1, process.device) if task.alone else process
    lmm = build_model(task.run.model, seed=0)
    stage = task.run.stages[0]
    groups = [group.copy() for group in apply_recipe(lmm, stage.recipe, stage.optim, seed=0)]
    engine = build_engine(own, task.engine, stage.optim, lmm, groups, micro_batches=1)
    lrs = {group["name"]: group["lr"] for group in groups}
    del groups  # fsdp's whole weights before they were sharded
    pack = synthetic_pack(lmm, task.lengths, seed=process.rank)
    cpu_pool.trim()
    reset_peak_rss()
    _step(engine, pack, lrs)
    sent = netns.sent_bytes()
    times = [_step(engine, pack, lrs) for _ in range(task.steps)]
    sent = netns.sent_bytes() - sent
    peak = peak_rss_bytes()
    dist.barrier()
    return {
        "passes": [passes for passes, _ in times],
        "updates": [updates for _, updates in times],
        "peak_rss_bytes": peak,
        "process_bytes": base,
        "sent_bytes": sent / task.steps,
        "collectives": collectives(task.sizes) if task.alone and process.world_size > 1 else {},
        "gemm_flops_per_s": gemm,
    }


def _step(engine: TrainingEngine, pack: PackedBatch, lrs: Mapping[str, float]) -> tuple[float, float]:
    """Return the seconds of the passes, and of all that follows in a step."""
    dist.barrier()
    began = time.perf_counter()
    engine.forward_backward(pack, 1.0 / pack.num_supervised)
    middle = time.perf_counter()
    engine.step(lrs)
    return middle - began, time.perf_counter() - middle


def collectives(sizes: tuple[int, int], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Return {kind: {seconds, bytes_per_s}} (bench.cluster.Measured) from two sizes of each collective."""
    count = dist.get_world_size()
    found = {}
    for kind, times in (("all_reduce", 2), ("gather", 1), ("reduce_scatter", 1)):
        took = []
        for size in sizes:
            whole, part = torch.ones(size), torch.ones(size // count)
            calls: dict[str, Callable[[Tensor, Tensor], object]] = {
                "all_reduce": lambda whole, part: dist.all_reduce(whole),
                "gather": lambda whole, part: dist.all_gather_into_tensor(whole, part),
                "reduce_scatter": lambda whole, part: dist.reduce_scatter_tensor(part, whole),
            }
            each = []
            for _ in range(rounds + 1):
                dist.barrier()
                began = time.perf_counter()
                calls[kind](whole, part)
                each.append(time.perf_counter() - began)
            took.append(statistics.median(each[1:]))
        sent = [times * 4 * size * (count - 1) / count for size in sizes]
        rate = (sent[1] - sent[0]) / max(took[1] - took[0], 1e-9)
        found[kind] = {"seconds": max(took[0] - sent[0] / rate, 0.0), "bytes_per_s": rate}
    return found


def synthetic_pack(lmm: LMM, lengths: tuple[int, ...], seed: int) -> PackedBatch:
    """Return a pack of samples of those lengths, each with one image in front; a fifth of the tokens is supervised."""
    g = torch.Generator().manual_seed(seed)
    tokens, k = sum(lengths), lmm.tokens_per_image
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.full((tokens,), IGNORE_INDEX)
    rows = torch.arange(tokens).view(-1)[torch.arange(tokens) % 5 == 4]
    labels[rows] = torch.randint(3, lmm.vocab_size, (len(rows),), generator=g)
    return PackedBatch(
        input_ids=torch.randint(3, lmm.vocab_size, (tokens,), generator=g),
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=bounds.to(torch.int32),
        prefix=torch.zeros(len(lengths), 2, dtype=torch.int32),
        image_slots=torch.cat([start + 1 + torch.arange(k) for start in bounds[:-1]]),
        supervised=torch.cat([rows, torch.full((tokens - len(rows),), tokens)]),
        pixel_values=torch.randn(len(lengths), 3, lmm.image_size, lmm.image_size, generator=g),
        num_supervised=len(rows),
        num_tokens=tokens,
        num_samples=len(lengths),
    )
