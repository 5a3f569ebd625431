"""Triton kernel of adamw: the op's samples, and the same bits in the weights as the reference's dither gives."""

from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import OPS, disagreements, name
from tinyllava_fast.kernels import adamw as kernels
from tinyllava_fast.ops._op import Sample, force_backend
from tinyllava_fast.ops.adamw import adamw, dither, step_scalars

SAMPLES = [s for s in OPS["adamw"].samples() if s.label != "several chunks"]


@pytest.mark.parametrize("sample", SAMPLES, ids=[s.label for s in SAMPLES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_agrees_with_float64(sample: Sample, dtype: torch.dtype) -> None:
    wrong = list(disagreements(OPS["adamw"], sample, dtype, "triton"))
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_weights_are_rounded_masters(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    p, grad = torch.randn(2, 2500, generator=g)
    m, v, weight = torch.zeros_like(p), torch.zeros_like(p), p.to(dtype)
    with force_backend("triton"):
        for step in (1, 2):
            adamw.infer(p, m, v, weight, grad, step_scalars(0.5, (0.9, 0.95), step), 1e-2, 0.1, 0.9, 0.95, 1e-8)
    dither(p, rounded := torch.empty_like(weight))
    assert torch.equal(weight, rounded) and not torch.equal(p, p.to(dtype).float())


def test_weights_and_gradients_of_training_are_declared() -> None:
    assert {c.shape for c in kernels.compile_cases()} == {
        "bf16 weight, bf16 gradient", "bf16 weight, fp32 gradient", "fp16 weight, fp32 gradient",
        "no weight, fp32 gradient",
    }  # fmt: skip
