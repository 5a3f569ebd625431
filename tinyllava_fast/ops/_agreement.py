"""Every backend of every op against the float64 reference, on the ops' own samples: for tests and for commands."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyllava_fast.ops._op import OPS, Op, Sample, force_backend

DTYPES = (torch.float32, torch.bfloat16)
# relative to the largest value: room for another order of sums; float16 is for Triton, C++ has no kernel for it
TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2.5e-4}


def load_ops() -> dict[str, Op[..., Any]]:
    """Return all ops by name, once every module of ops/ is imported."""
    package = importlib.import_module("tinyllava_fast.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return OPS


def cases(*, differentiable: bool = False) -> list[tuple[Op, Sample]]:
    """Return every op with every one of its samples. differentiable: only those that have a gradient."""
    found = [(op, sample) for op in load_ops().values() if op.samples is not None for sample in op.samples()]
    return [(op, sample) for op, sample in found if sample.differentiable or not differentiable]


def cast(sample: Sample, dtype: torch.dtype, *, grad: bool = False) -> tuple[Any, ...]:
    """Return the arguments with every float tensor that is not ``kept`` in dtype, as leaves; strides are kept."""

    def one(at: int, arg: Any) -> Any:
        if not isinstance(arg, Tensor) or not arg.is_floating_point() or at in sample.kept:
            return arg
        return arg.detach().to(dtype).requires_grad_(grad)

    return tuple(one(at, arg) for at, arg in enumerate(sample.args))


def on_device(sample: Sample, backend: str) -> Sample:
    """Return the case where the backend wants it: on the GPU for Triton, unless its kernels are interpreted."""
    if backend != "triton" or not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return sample
    return replace(sample, args=tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in sample.args))


def outputs(op: Op, args: tuple[Any, ...], *, grad: bool) -> list[Tensor]:
    """Return the outputs, what was written to, and with grad the gradients of float arguments for a seeded gradient."""
    own = [arg.clone() if at in op.mutates and arg is not None else arg for at, arg in enumerate(args)]
    result = op.op(*own)
    result = list(result) if isinstance(result, tuple | list) else [] if result is None else [result]
    result += [own[at] for at in op.mutates if own[at] is not None]
    if not grad:
        return result
    heads = [r for r in result if r.requires_grad]
    g = torch.Generator().manual_seed(7)
    incoming = [torch.randn(h.shape, generator=g).to(h) for h in heads]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    grads = torch.autograd.grad(heads, leaves, incoming, allow_unused=True)
    return result + [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(leaves, grads, strict=True)]


def distance(got: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference; equal infinities are no difference, a NaN on one side is infinite."""
    a, b = got.detach().double().cpu(), truth.detach().double().cpu()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(gap.nan_to_num(nan=torch.inf).max()) if gap.numel() else 0.0


def disagreements(op: Op, sample: Sample, dtype: torch.dtype, backend: str) -> Iterator[str]:
    """Yield a sentence for each output and gradient whose error exceeds twice what torch loses at that dtype."""
    grad = sample.differentiable
    rounded = replace(sample, args=cast(sample, dtype))
    with force_backend("reference"):
        truth = outputs(op, cast(rounded, torch.float64, grad=grad), grad=grad)
        torchs = outputs(op, cast(rounded, dtype, grad=grad), grad=grad)
    with force_backend(backend):
        ours = outputs(op, cast(on_device(rounded, backend), dtype, grad=grad), grad=grad)
    for i, (exact, theirs, mine) in enumerate(zip(truth, torchs, ours, strict=True)):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            yield f"output {i}: {mine.shape} {mine.dtype}, expected {theirs.shape} {theirs.dtype}"
        elif (lost := errors(exact, theirs, mine, dtype)).ours > lost.allowed:
            yield f"output {i} of {op.name} ({sample.label}, {dtype}): error {lost.ours:.3g} > {lost.allowed:.3g}"


class Errors(NamedTuple):
    """Largest errors against the exact result: ours, and the most that it may be."""

    ours: float
    allowed: float


def errors(exact: Tensor, theirs: Tensor, mine: Tensor, dtype: torch.dtype) -> Errors:
    """Return our error and twice torch's, with room for another order of sums; exact is in float64."""
    finite = exact.detach()[exact.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return Errors(distance(mine, exact), 2 * distance(theirs, exact) + TINY[dtype] * scale)


def runnable(op: Op, sample: Sample, dtype: torch.dtype, backend: str) -> str | None:
    """Return None if the backend takes this case, else the reason."""
    return op.why_not(backend, cast(on_device(sample, backend), dtype))
