"""Triton kernels of packed_attention: the op's samples, random ragged shapes, and what they share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.agreement import OPS, cast, disagreements, name
from tinyllava_fast.kernels import packed_attention
from tinyllava_fast.kernels._common import attention_launch, bucket_of, launches_of, read_table, trying
from tinyllava_fast.ops._op import Op, Sample, force_backend
from tinyllava_fast.ops.packed_attention import packed_attention_bwd, packed_attention_fwd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the interpreter is slow: one narrow dtype for most of the samples
NARROW = {torch.bfloat16: ("ragged", "shared prefixes", "decode from a pool", "softcap"), torch.float16: ("window",)}


def cases() -> list[tuple[Op, Sample, torch.dtype]]:
    """Every sample in float32, some in the narrow dtypes."""
    op = OPS["packed_attention_fwd"]
    assert op.samples is not None
    samples = list(op.samples())
    return [
        (op, sample, dtype)
        for dtype in DTYPES
        for sample in samples
        if sample.label in NARROW.get(dtype, (sample.label,))
    ]


def test_there_are_cases() -> None:
    assert len(cases()) >= 24


@pytest.mark.parametrize(
    ("op", "sample", "dtype"),
    cases(),
    ids=[f"{name((op, sample))}-{name(dtype)}" for op, sample, dtype in cases()],
)
def test_agrees_with_float64(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    assert op.why_not("triton", cast(sample, dtype)) is None
    wrong = list(disagreements(op, sample, dtype, "triton"))
    assert not wrong, wrong


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_ragged_shapes(data: st.DataObject) -> None:
    """Random segments, heads, sizes, prefixes, key ranges, windows and caps."""
    segments = data.draw(st.integers(0, 4))
    counts = st.lists(st.integers(0, 40), min_size=segments, max_size=segments)
    lengths_q = data.draw(counts)
    lengths_k = data.draw(counts) if data.draw(st.booleans()) else lengths_q
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (1, 4), (1, 7)]))
    size = data.draw(st.sampled_from([1, 7, 16, 24, 72]))
    window = data.draw(st.sampled_from([0, 0, 1, 5, 33]))
    shared = 0 if window else data.draw(st.sampled_from([0, 3, 50]))
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int() + (tail := data.draw(st.integers(0, 3)))  # rows ahead, too
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    prefix, used = None, None
    if shared and segments:
        takes = [data.draw(st.booleans()) for _ in lengths_k]
        prefix = torch.tensor([[int(cu_k[-1]), shared if t else 0] for t in takes], dtype=torch.int32)
    if segments and data.draw(st.booleans()):
        used = torch.tensor([data.draw(st.integers(0, n)) for n in lengths_k], dtype=torch.int32)
    g = torch.Generator().manual_seed(segments)
    q = torch.randn(int(cu_q[-1]) + tail, kv_heads * group, size, generator=g)
    k, v = torch.randn(2, int(cu_k[-1]) + shared + tail, kv_heads, size, generator=g)
    causal, softcap = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 0.0, 3.0]))
    sample = Sample((q, k, v, cu_q, cu_k, prefix, used, causal, size**-0.5, window, softcap), "random")
    wrong = list(disagreements(packed_attention_fwd, sample, torch.float32, "triton"))
    assert not wrong, wrong


def test_only_lse_and_equal_bits() -> None:
    """A gradient of lse alone, none of lse, and twice the same bits; a NaN stays visible."""
    sample = next(s for s in OPS["packed_attention_fwd"].samples() if s.label == "shared prefixes")
    q, k, v, *rest = sample.args
    with force_backend("triton"):
        out, lse = packed_attention_fwd.op(q, k, v, *rest)
        runs = [packed_attention_bwd.op(torch.ones_like(out), None, q, k, v, out, lse, *rest) for _ in range(2)]
        of_lse = packed_attention_bwd.op(torch.zeros_like(out), torch.ones_like(lse), q, k, v, out, lse, *rest)
        q[3] = torch.nan
        poisoned, _ = packed_attention_fwd.op(q, k, v, *rest)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert of_lse[0].abs().max() > 0 and of_lse[2].abs().max() == 0
    assert poisoned[3].isnan().all() and poisoned[[*range(3), *range(4, 20)]].isfinite().all()


def test_every_setting_and_shape_is_declared() -> None:
    cases = list(packed_attention.compile_cases())
    shapes = " ".join(c.shape for c in cases)
    assert all(name in shapes for name in ("TinyLlama", "Phi-2", "Gemma-2B", "SigLIP-so400m", "windowed", "capped"))
    assert {c.name for c in cases} == {"attend", "differentiate_queries", "differentiate_keys"}
    assert len({(c.name, c.shape) for c in cases}) >= 30
    for arch, buckets in read_table()["attention"].items():
        for size, dtype in ((64, torch.bfloat16), (96, torch.float16), (256, torch.float32)):
            with launches_of(arch):
                settings = attention_launch("cuda", size, dtype)
            assert {"fwd", "dq", "dkv", "decode"} == set(settings)
            assert settings["fwd"] == buckets[bucket_of(size, dtype)]["fwd"]


def test_an_architecture_takes_the_nearest_older_entry_and_a_trial_goes_first() -> None:
    oldest = next(iter(read_table()["attention"].values()))["64 half"]
    for arch in ("sm_75", "sm_86", "sm_120"):
        with launches_of(arch):
            assert attention_launch("cuda", 64, torch.bfloat16)["dq"] == oldest["dq"]
            with trying({"fwd": oldest["dkv"]}):
                tried = attention_launch("cuda", 64, torch.bfloat16)
            assert tried["fwd"] == oldest["dkv"] and tried["dq"] == oldest["dq"] and tried["decode"].n == tried["fwd"].n
