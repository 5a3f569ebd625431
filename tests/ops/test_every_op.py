"""Properties of every registered op, its samples and its backends. A new op is covered by being registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import DTYPES, cases, cast, disagreements, distance, name, outputs, runnable
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._op import OPS, Op, Sample, force_backend

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
BACKENDS = ("cpp", "triton") if torch.cuda.is_available() else ("cpp",)
FORWARDS = [op for op in OPS.values() if op.samples is not None and any(s.differentiable for s in op.samples())]


def first(op: Op) -> Sample:
    assert op.samples is not None
    return next(s for s in op.samples() if s.differentiable)


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def test_found_ops_and_samples() -> None:
    assert {"splice_fwd", "splice_bwd", "linear_cross_entropy_fwd", "pack_plan"} <= set(OPS)
    assert len(cases()) >= 30 and len(FORWARDS) >= 2
    unsampled = [op.name for op in OPS.values() if op.samples is None]
    assert all(n.endswith("_bwd") for n in unsampled), "only a backward op may rely on its forward op's samples"


@pytest.mark.parametrize("case", cases(), ids=name)
def test_opcheck(case: tuple[Op, Sample]) -> None:
    op, sample = case
    torch.library.opcheck(op.op, cast(sample, torch.float32, grad=sample.differentiable))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", cases(), ids=name)
def test_backends_agree(case: tuple[Op, Sample], dtype: torch.dtype, backend: str) -> None:
    reason = runnable(*case, dtype, backend)
    if reason is not None:
        assert backend == "triton", f"{case[0].name} does not run in C++: {reason}"
        pytest.skip(reason)
    assert not list(disagreements(*case, dtype, backend))


@pytest.mark.parametrize("case", cases(differentiable=True), ids=name)
def test_gradcheck(case: tuple[Op, Sample]) -> None:
    """The gradient formula against finite differences, in float64 (which runs on the reference)."""
    op, sample = case
    args = cast(sample, torch.float64, grad=True)
    floats = leaves(args)
    if any(f.numel() == 0 for f in floats):
        pytest.skip("nothing to differentiate")

    def run(*values: Tensor) -> list[Tensor]:
        given = iter(values)
        full = [next(given) if isinstance(a, Tensor) and a.requires_grad else a for a in args]
        result = op.op(*full)
        result = result if isinstance(result, tuple) else (result,)
        # -inf (the log-sum-exp of a row that sees nothing) has no slope
        return [r.masked_fill(r.isinf(), 0) for r in result if r.requires_grad]

    assert torch.autograd.gradcheck(run, floats, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("op", FORWARDS, ids=lambda op: op.name)
def test_fullgraph_forward_and_backward(op: Op) -> None:
    args = cast(first(op), torch.float32, grad=True)
    compiled = torch.compile(op.op, fullgraph=True, backend="aot_eager")

    def run(fn: Any) -> list[Tensor]:
        result = fn(*args)
        result = result if isinstance(result, tuple) else (result,)
        heads = [r for r in result if r.requires_grad]
        total = sum((r * r).masked_fill(r.isinf(), 0).sum() for r in heads)
        result = [r.detach().clone() for r in result]  # an op may hand out buffers that its backward consumes
        return [*result, *torch.autograd.grad(total, leaves(args), allow_unused=True)]

    for got, expected in zip(run(compiled), run(op.op), strict=True):
        assert (got is None and expected is None) or distance(got, expected) < 1e-5


@pytest.mark.parametrize("op", FORWARDS, ids=lambda op: op.name)
def test_forcing_a_backend_does_not_recompile(op: Op) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda *args: op.op(*args), fullgraph=True, backend=counter)
    args = cast(first(op), torch.float32)
    compiled(*args)
    with force_backend("reference"):
        compiled(*args)
    with force_backend("cpp"):
        compiled(*args)
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", FORWARDS, ids=lambda op: op.name)
def test_a_wrong_shape_is_refused_alike_in_eager_and_compiled_code(op: Op) -> None:
    args = list(cast(first(op), torch.float32))
    at = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
    args[at] = args[at][None]
    with pytest.raises(ValueError, match=rf"^{op.module}: ") as eager:
        op.op(*args)
    with pytest.raises(Exception) as compiled:
        torch.compile(lambda *a: op.op(*a), fullgraph=True, backend="eager")(*args)
    assert str(eager.value) in str(compiled.value)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_right(isa: str) -> None:
    """All samples in C++ under this ISA; the choice is made at load, hence a process of its own."""
    best = ISAS.index(_cpp.extension().isa())
    script = Path(__file__).with_name("agreement.py")
    env = {**os.environ, "TLF_ISA": isa, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(script.parents[2]), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    if ISAS.index(isa) > best and "TLF_ISA" not in os.environ:
        assert run.returncode != 0 and f"this CPU supports up to {ISAS[best]}" in run.stderr
        return
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[0] == isa and int(run.stdout.split()[1]) >= 30


def test_outputs_do_not_alias_inputs() -> None:
    for op, sample in cases():
        given = {a.untyped_storage().data_ptr() for a in sample.args if isinstance(a, Tensor) and a.numel()}
        got = {r.untyped_storage().data_ptr() for r in outputs(op, sample.args, grad=False) if r.numel()}
        assert not given & got, op.name
