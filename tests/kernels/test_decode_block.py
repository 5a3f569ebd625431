"""Triton kernels of a decoding layer's small steps and quantized products: the ops' samples."""

from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import OPS, disagreements, name, runnable
from tinyllava_fast.kernels import decode_block, decode_linear, nf4
from tinyllava_fast.ops._op import Op, Sample

NAMES = ("rms_norm", "rotate", "silu_gate", "decode_linear_fwd", "linear_nf4_fwd")


def cases() -> list[tuple[Op, Sample]]:
    """Every sample that the kernels take: dense products of a few rows are torch's."""
    every = [(OPS[op], sample) for op in NAMES for sample in OPS[op].samples()]
    return [(op, sample) for op, sample in every if op.name != "decode_linear_fwd" or sample.args[2] is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", cases(), ids=name)
def test_agrees_with_float64(case: tuple[Op, Sample], dtype: torch.dtype) -> None:
    assert runnable(*case, dtype, "triton") is None
    wrong = list(disagreements(*case, dtype, "triton"))
    assert not wrong, wrong


def test_every_dtype_is_declared() -> None:
    for module, count in ((decode_block, 9), (decode_linear, 4), (nf4, 6)):
        shapes = {(c.name, c.shape) for c in module.compile_cases()}
        assert len(shapes) == count
