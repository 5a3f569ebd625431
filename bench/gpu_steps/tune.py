"""Launch settings of the attention kernels for this GPU, into launch.json of the results (`tlf-bench ops --tune`).

Nearly all the time of a search is compilation, so processes that share Triton's cache compile all candidates first.
"""

from __future__ import annotations

import contextlib
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from tinyllava_fast import hardware
from tinyllava_fast.bench import tune
from tinyllava_fast.bench.case import TINY, Pack
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.timing import interleave
from tinyllava_fast.kernels._common import TABLE, Launch, bucket_of, device_arch

BUCKETS = ((64, "bfloat16"), (128, "bfloat16"), (64, "float32"), (256, "bfloat16"))
"""Largest head sizes and dtypes, in order of worth: with three kernels each, the shapes that matter."""
PROCESSES = 12
ITEM_S = 60
Task = tuple[str, Launch]


@STEPS.register("tune")
def run(job: Job) -> None:
    """Search one bucket after another; the table is written after each."""
    path = job.folder / TABLE.name
    if not path.exists():
        shutil.copyfile(TABLE, path)
    names = {f"{size}, {dtype}": (size, getattr(torch, dtype)) for size, dtype in BUCKETS}
    job.each(list(names)[:1] if job.tiny else names, ITEM_S, lambda name: _bucket(job, path, *names[name]))


def _bucket(job: Job, path: Path, size: int, dtype: torch.dtype) -> None:
    bucket = bucket_of(size, dtype)
    if job.tiny:
        problem, limit, race = tune.Problem(TINY, torch.float32, "cpu"), 2**12, _quick_race
    else:
        limit, race = tune.shared_limit(), tune.race
        compile_ahead(size, dtype, limit, min(PROCESSES, hardware.cores()))
        problem = tune.Problem(Pack(head_dim=size), dtype, job.device)
    winners, changes = tune.search(problem, limit, race)
    tune.rewrite(path, device_arch(), {bucket: winners})
    job.tell(bucket, changes=changes, arch=device_arch())


def _quick_race(runs: tune.Runs) -> tune.Times:
    return interleave(runs, rounds=1, warmup=0)


def compile_ahead(size: int, dtype: torch.dtype, limit: int, processes: int) -> None:
    """Compile every candidate of every part into Triton's cache. A process that dies leaves its share to the search."""
    tasks = [(part, one) for part in tune.PARTS for one in tune.candidates(part, size, dtype.itemsize, limit)]
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        list(pool.map(_compile, [(size, dtype, tasks[at::processes]) for at in range(processes)]))


def _compile(share: tuple[int, torch.dtype, list[Task]]) -> None:
    size, dtype, tasks = share
    problem = tune.Problem(Pack(head_dim=size), dtype, "cuda")
    for part, launch in tasks:
        with contextlib.suppress(Exception):  # whatever the compiler refuses; the search meets it again
            problem.run(part, launch)
