"""Every op on real shapes against what else computes the same, timed by the GPU's events (`tlf-bench ops`)."""

from __future__ import annotations

import torch

from tinyllava_fast.bench import ops, predict
from tinyllava_fast.bench.case import SUITE
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.bench.gpu_steps.machine import roof
from tinyllava_fast.bench.settings import OpsSettings

COMPILED = ("packed_attention", "linear_cross_entropy")
"""Ops whose rivals under Inductor are worth their compilation: flex_attention is one."""
HURRY = 0.1
ITEM_S = 40


@STEPS.register("ops")
def run(job: Job) -> None:
    """Tell a row for each shape and pass: seconds and share of the roof of every candidate."""
    found, gpu = roof(job), None if job.tiny else predict.gpu_named(torch.cuda.get_device_name())
    predicted = predict.kernel_rows(gpu) if gpu else {}

    def one(name: str) -> None:
        settings = OpsSettings(
            ops=(name,),
            device=job.device,
            dtype="float32" if job.tiny else "bfloat16",
            rounds=1 if job.tiny else 5,
            quick=job.tiny,
            compile=not job.tiny and name in COMPILED,
            hurry=HURRY,
        )
        result = ops.benchmark(settings, found)
        for row in result["rows"]:
            told = {k: row[k] for k in ("medians", "spread", "roofline", "peak_bytes")}
            label = f"{name} {row['shape']}, {row['pass']}"
            job.tell(label, **told, predicted_s=predicted.get(label))
        for candidate, reason in result["absent"].get(name, {}).items():
            job.tell(f"{name}, {candidate}", absent=reason)

    job.each([n for n in SUITE.names() if not job.tiny or n in ("splice", "adamw")], ITEM_S, one)
