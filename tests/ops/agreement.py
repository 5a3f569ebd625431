"""Every backend against the float64 reference. Run as a script it checks all C++ kernels under the present TLF_ISA."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tinyllava_fast.ops as package
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._op import OPS, Op, Sample, force_backend

for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")

DTYPES = (torch.float32, torch.bfloat16)
# relative to the largest value: room for another order of sums; float16 is for Triton, C++ has no kernel for it
TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2.5e-4}


def cases(*, differentiable: bool = False) -> list[tuple[Op, Sample]]:
    """Every op with every one of its samples."""
    found = [(op, sample) for op in OPS.values() if op.samples is not None for sample in op.samples()]
    return [(op, sample) for op, sample in found if sample.differentiable or not differentiable]


def name(value: Any) -> str:
    """pytest id of a case, an op or a dtype."""
    if isinstance(value, tuple):
        return f"{value[0].name}-{value[1].label}".replace(" ", "_")
    return str(value).removeprefix("torch.")


def cast(sample: Sample, dtype: torch.dtype, *, grad: bool = False) -> tuple[Any, ...]:
    """The arguments with every float tensor that is not ``kept`` in dtype, as leaves; strides are kept."""

    def one(at: int, arg: Any) -> Any:
        if not isinstance(arg, Tensor) or not arg.is_floating_point() or at in sample.kept:
            return arg
        return arg.detach().to(dtype).requires_grad_(grad)

    return tuple(one(at, arg) for at, arg in enumerate(sample.args))


def on_device(sample: Sample, backend: str) -> Sample:
    """The case where the backend wants its arguments: on the GPU for Triton, unless its kernels are interpreted."""
    if backend != "triton" or not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return sample
    return replace(sample, args=tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in sample.args))


def outputs(op: Op, args: tuple[Any, ...], *, grad: bool) -> list[Tensor]:
    """The op's outputs, what it wrote to, and with grad the gradients of its float arguments for a seeded gradient."""
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
    """Largest absolute difference; equal infinities are no difference, a NaN on one side is infinite."""
    a, b = got.detach().double().cpu(), truth.detach().double().cpu()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(gap.nan_to_num(nan=torch.inf).max()) if gap.numel() else 0.0


def disagreements(op: Op, sample: Sample, dtype: torch.dtype, backend: str) -> Iterator[str]:
    """Outputs and gradients whose error exceeds twice what torch loses at that dtype."""
    grad = sample.differentiable
    rounded = replace(sample, args=cast(sample, dtype))
    truth = outputs(op, cast(rounded, torch.float64, grad=grad), grad=grad)
    with force_backend("reference"):
        torchs = outputs(op, cast(rounded, dtype, grad=grad), grad=grad)
    with force_backend(backend):
        ours = outputs(op, cast(on_device(rounded, backend), dtype, grad=grad), grad=grad)
    for i, (exact, theirs, mine) in enumerate(zip(truth, torchs, ours, strict=True)):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            yield f"output {i}: {mine.shape} {mine.dtype}, expected {theirs.shape} {theirs.dtype}"
            continue
        finite = exact.detach()[exact.isfinite()]
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        allowed = 2 * distance(theirs, exact) + TINY[dtype] * scale
        lost = distance(mine, exact)
        if lost > allowed:
            yield f"output {i} of {op.name} ({sample.label}, {dtype}): error {lost:.3g} > {allowed:.3g}"


def saved_bytes(run: Callable[[], Any]) -> int:
    """Distinct memory that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return sum(kept.values())


def runnable(op: Op, sample: Sample, dtype: torch.dtype, backend: str) -> str | None:
    """None if the backend takes this case, else the reason."""
    return op.why_not(backend, cast(on_device(sample, backend), dtype))


def check_isa() -> int:
    """The number of cases that ran in C++; raises AssertionError with the disagreements."""
    ran, wrong = 0, []
    for op, sample in cases():
        for dtype in DTYPES:
            if runnable(op, sample, dtype, "cpp") is None:
                ran += 1
                wrong += disagreements(op, sample, dtype, "cpp")
    assert not wrong, "\n".join(wrong)
    return ran


if __name__ == "__main__":
    count = check_isa()
    print(_cpp.extension().isa(), count)  # noqa: T201 read by the test that runs this script
