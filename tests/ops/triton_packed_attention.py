"""Random ragged attention in Triton's interpreter. A script: TRITON_INTERPRET must be set before triton loads."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.agreement import OPS, TINY, cast, disagreements
from tinyllava_fast.ops._op import Op, Sample, force_backend
from tinyllava_fast.ops.packed_attention import packed_attention_bwd, packed_attention_fwd

# one unit in the last place: the interpreter truncates to bfloat16, a GPU rounds to nearest
TINY[torch.bfloat16] = 2**-7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the interpreter is slow: one narrow dtype for most of the samples
NARROW = {torch.bfloat16: ("ragged", "shared prefixes", "decode from a pool", "softcap"), torch.float16: ("window",)}


def check_samples(op: Op, dtype: torch.dtype) -> int:
    """The number of the op's samples that ran, forward and backward; AssertionError with the disagreements."""
    ran = 0
    assert op.samples is not None
    for sample in op.samples():
        if op.name == "packed_attention_fwd" and sample.label not in NARROW.get(dtype, (sample.label,)):
            continue
        reason = op.why_not("triton", cast(sample, dtype))
        assert reason is None, f"{sample.label}: {reason}"
        wrong = list(disagreements(op, sample, dtype, "triton"))
        assert not wrong, wrong
        ran += 1
    return ran


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def check_ragged(data: st.DataObject) -> None:
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


def check_only_lse_and_equal_bits() -> None:
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


def main() -> int:
    """The number of samples that ran."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    ran = sum(check_samples(OPS["packed_attention_fwd"], dtype) for dtype in DTYPES)
    ran += sum(check_samples(OPS["merge_states_fwd"], dtype) for dtype in DTYPES)
    check_ragged()
    check_only_lse_and_equal_bits()
    return ran


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
