"""torch.library.opcheck of every op on the device: schema, autograd, fake tensors, and tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.ops import _agreement as agreement
from tinyllava_fast.ops._op import OPS

ITEM_S = 30
SAMPLES = 4
"""Of each op; the tests check all of them on a CPU."""


@STEPS.register("opcheck")
def run(job: Job) -> None:
    """Check the first samples of every op."""
    names = [op.name for op in OPS.values() if op.samples is not None]
    job.each(names[:2] if job.tiny else names, ITEM_S, lambda name: _check(job, name))


def _check(job: Job, name: str) -> None:
    own = [(op, sample) for op, sample in agreement.cases() if op.name == name][: 1 if job.tiny else SAMPLES]
    for op, sample in own:
        args = agreement.cast(sample, torch.float32)
        args = tuple(arg.to(job.device) if isinstance(arg, Tensor) else arg for arg in args)
        if sample.differentiable:
            args = tuple(_leaf(arg, at in sample.kept) for at, arg in enumerate(args))
        torch.library.opcheck(op.op, args)
    job.tell(name, ok=True, cases=len(own))


def _leaf(arg: object, kept: bool) -> object:
    floating = isinstance(arg, Tensor) and arg.is_floating_point() and not kept
    return arg.detach().requires_grad_() if isinstance(arg, Tensor) and floating else arg
