"""Triton kernel of draw_tokens: the op's samples, and draws that have the frequencies of the softmax."""

from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import OPS, disagreements, name
from tinyllava_fast.kernels import draw_tokens as kernels
from tinyllava_fast.ops._op import Sample, force_backend
from tinyllava_fast.ops.draw_tokens import draw_tokens

SAMPLES = list(OPS["draw_tokens"].samples())


@pytest.mark.parametrize("sample", SAMPLES, ids=[s.label for s in SAMPLES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_agrees_with_float64(sample: Sample, dtype: torch.dtype) -> None:
    wrong = list(disagreements(OPS["draw_tokens"], sample, dtype, "triton"))
    assert not wrong, wrong


def test_points_share_out_the_tokens_as_the_softmax_does() -> None:
    logits, rows = torch.tensor([2.0, -1.0, 0.5, 2.5]), 200
    numbers = torch.full((rows,), 0.7).double(), torch.zeros(rows).double(), (torch.arange(rows) + 0.5).double() / rows
    with force_backend("triton"):
        found = draw_tokens.infer(logits.expand(rows, 4).contiguous(), *numbers)
    shares = found.bincount(minlength=4) / rows
    assert (shares - (logits / 0.7).softmax(0)).abs().max() < 0.01 and found.diff().min() >= 0


def test_every_dtype_is_declared() -> None:
    assert [c.shape for c in kernels.compile_cases()] == [f"V=49152 {kind}" for kind in ("fp32", "bf16", "fp16")]
