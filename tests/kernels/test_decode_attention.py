"""Triton kernels of decode_attention: the op's samples, keys in one part and in several, lengths that tell nothing."""

from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import OPS, cast, disagreements, name
from tinyllava_fast.kernels import decode_attention
from tinyllava_fast.ops._op import Op, Sample, force_backend
from tinyllava_fast.ops.decode_attention import decode_attention as attend

NARROW = {torch.bfloat16: ("ragged", "shared prefix"), torch.float16: ("many heads of one key head",)}


def cases() -> list[tuple[Op, Sample, torch.dtype]]:
    """Every sample in float32, some in the narrow dtypes."""
    op = OPS["decode_attention_fwd"]
    assert op.samples is not None
    samples = list(op.samples())
    return [
        (op, sample, dtype)
        for dtype in (torch.float32, *NARROW)
        for sample in samples
        if sample.label in NARROW.get(dtype, (sample.label,))
    ]


@pytest.mark.parametrize(
    ("op", "sample", "dtype"), cases(), ids=[f"{name((op, sample))}-{name(dtype)}" for op, sample, dtype in cases()]
)
def test_agrees_with_float64(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    assert op.why_not("triton", cast(sample, dtype)) is None
    wrong = list(disagreements(op, sample, dtype, "triton"))
    assert not wrong, wrong


@pytest.mark.parametrize("parts", [1, 7])
def test_parts_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    op = OPS["decode_attention_fwd"]
    sample = next(s for s in op.samples() if s.label == "shared prefix")
    monkeypatch.setattr(decode_attention, "_INTERPRETED_SPLITS", parts)
    assert not list(disagreements(op, sample, torch.float32, "triton"))


def test_a_nan_stays_in_its_sequence() -> None:
    g = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(2, 2, 8, generator=g), torch.randn(2, 40, 1, 8, generator=g)
    k[3] = torch.nan
    start, used = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([9, 20], dtype=torch.int32)
    with force_backend("triton"):
        out = attend(q, k, v, start, used)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_every_decoder_is_declared() -> None:
    cases = list(decode_attention.compile_cases())
    assert {c.name for c in cases} == {"attend_one", "add_parts"}
    shapes = " ".join(c.shape for c in cases)
    assert all(name in shapes for name in ("TinyLlama", "Phi-2", "Gemma-2B", "windowed", "capped", "one part"))
