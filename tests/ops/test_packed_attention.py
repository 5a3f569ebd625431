"""Packed attention beyond what test_every_op.py asks of every op: packing, merging, order of sums, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.agreement import TINY, distance
from tinyllava_fast.ops import _cpp, packed_attention
from tinyllava_fast.ops._attention_samples import samples
from tinyllava_fast.ops._op import force_backend
from tinyllava_fast.ops.packed_attention import packed_attention_bwd, packed_attention_fwd

DTYPES = (torch.float32, torch.bfloat16)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def everything(args: tuple[Any, ...], *, dlse: bool = True) -> list[Tensor]:
    """out, lse, dq, dk, dv for seeded gradients of out and lse."""
    dout = rand(*args[0].shape, seed=5).to(args[0].dtype)
    out, lse = packed_attention_fwd.op(*args)
    given = rand(*lse.shape, seed=6).to(lse.dtype) if dlse else None
    return [out, lse, *packed_attention_bwd.op(dout, given, *args[:3], out, lse, *args[3:])]


def assert_right(args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """C++ against float64, allowed twice the error of the torch reference at that dtype."""

    def cast(to: torch.dtype) -> tuple[Any, ...]:
        return tuple(a.to(dtype).to(to) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    assert packed_attention_fwd.why_not("cpp", cast(dtype)) is None
    truth = everything(cast(torch.float64))
    with force_backend("reference"):
        theirs = everything(cast(dtype))
    with force_backend("cpp"):
        ours = everything(cast(dtype))
    for name, exact, their, our in zip(("out", "lse", "dq", "dk", "dv"), truth, theirs, ours, strict=True):
        finite = exact[exact.isfinite()]
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        # the kernel also rounds probabilities to bf16, which the float32 inside of the reference does not
        allowed = 2 * distance(their, exact) + 4 * TINY[dtype] * scale
        assert distance(our, exact) <= allowed, f"{name}: {distance(our, exact):.3g} > {allowed:.3g}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    """Random segments, heads, sizes, prefixes, key ranges, windows, caps."""
    segments = data.draw(st.integers(0, 5), label="segments")
    count = st.integers(0, 90)
    lengths_q = data.draw(st.lists(count, min_size=segments, max_size=segments), label="queries")
    separate = data.draw(st.booleans(), label="keys of their own")
    lengths_k = (
        data.draw(st.lists(count, min_size=segments, max_size=segments), label="keys") if separate else lengths_q
    )
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 7)]), label="heads")
    size = data.draw(st.sampled_from([1, 7, 8, 16, 24, 64, 96, 130]), label="size")
    window = data.draw(st.sampled_from([0, 0, 1, 5, 33]), label="window")
    tail = data.draw(st.integers(0, 3), label="tail")
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    shared = 0 if window else data.draw(st.integers(0, 70), label="prefix")
    rows, keys = int(cu_q[-1]) + tail, int(cu_k[-1]) + shared + tail
    prefix, used = None, None
    if shared and segments:  # the rows behind everybody's own keys, for some of the segments
        takes = data.draw(st.lists(st.booleans(), min_size=segments, max_size=segments), label="takers")
        prefix = torch.tensor([[int(cu_k[-1]), shared if t else 0] for t in takes], dtype=torch.int32)
    if separate and data.draw(st.booleans(), label="partly used") and segments:
        used = torch.tensor([data.draw(st.integers(0, n)) for n in lengths_k], dtype=torch.int32)
    causal, cap = data.draw(st.booleans(), label="causal"), data.draw(st.sampled_from([0.0, 0.0, 3.0]), label="cap")
    q = rand(rows, kv_heads * group, size)
    k, v = rand(max(keys, rows), kv_heads, size, seed=1), rand(max(keys, rows), kv_heads, size, seed=2)
    args = (q, k, v, cu_q, cu_k if separate or shared else None, prefix, used, causal, size**-0.5, window, cap)
    for dtype in DTYPES:
        assert_right(args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_segments_cross_chunks_and_tasks(dtype: torch.dtype) -> None:
    q, k, v = rand(700, 4, 32), rand(700, 2, 32, seed=1), rand(700, 2, 32, seed=2)
    for causal, window in ((True, 0), (False, 0), (True, 150)):
        assert_right((q, k, v, bounds([611, 85]), None, None, None, causal, 0.2, window, 0.0), dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(3, 3, 32), (3, 1, 64), (4, 2, 72), (4, 1, 80), (8, 1, 96), (4, 1, 128), (3, 1, 256)],
)
def test_segments_that_end_inside_tiles(heads: int, kv_heads: int, size: int) -> None:
    """Lengths around 16 and 32, as views of one projection, where bfloat16 is multiplied in tiles of 16 and 32."""
    lengths = [1, 15, 16, 17, 33, 0, 50]
    q, k, v = rand(sum(lengths) + 3, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], dim=1)
    for causal, window, cap in ((True, 0, 0.0), (False, 0, 2.0), (True, 20, 0.0)):
        assert_right((q, k, v, bounds(lengths), None, None, None, causal, size**-0.5, window, cap), torch.bfloat16)


def test_the_backward_is_deterministic_over_many_runs_of_rows() -> None:
    """Grouped rows fill more than one run of 512, keys more than one block, and a prefix shifts both off the tiles."""
    q, k, v = rand(700, 6, 32), rand(700, 2, 32, seed=1), rand(700, 2, 32, seed=2)
    spans = torch.tensor([[0, 0], [3, 170], [3, 170], [0, 0]], dtype=torch.int32)
    args = (q, k, v, bounds([211, 97, 45, 300]), None, spans, None, True, 0.2, 0, 0.0)
    assert_right(args, torch.bfloat16)
    half = tuple(a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with force_backend("cpp"):
        first, again = everything(half), everything(half)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_largest_heads_and_large_scores() -> None:
    q, k, v = 10 * rand(40, 2, 256), rand(40, 1, 256, seed=1), rand(40, 1, 256, seed=2)
    assert_right((q, k, v, bounds([40]), None, None, None, True, 1.0, 0, 0.0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_packing_equals_separate_calls(dtype: torch.dtype, backend: str) -> None:
    """Forward and backward, against torch's own attention segment by segment."""
    lengths, heads, kv_heads, size = [31, 1, 64, 17], 6, 2, 32
    cu = bounds(lengths)
    q, k, v = (rand(int(cu[-1]), h, size, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads)))
    incoming = rand(int(cu[-1]), heads, size, seed=9, dtype=dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with force_backend(backend):
        out, _ = packed_attention(q, k, v, cu)
        grads = torch.autograd.grad(out, leaves, incoming)
    parts = []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        x, y, z = (t[None, a:b].transpose(1, 2) for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(x, y, z, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    expected = torch.cat(parts)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    for got, want in zip(grads, torch.autograd.grad(expected, leaves, incoming), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_a_shared_prefix_equals_a_repeated_one() -> None:
    """Two continuations of one prefix: as segments that share it, and written out in full."""
    size, p, a, b = 16, 13, 6, 9
    q, k, v = (rand(p + a + b, 2, size, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))
    spans = torch.tensor([[0, 0], [0, p], [0, p]], dtype=torch.int32)
    out, _ = packed_attention(q, k, v, bounds([p, a, b]), prefix=spans)
    rows = torch.tensor([*range(p + a), *range(p), *range(p + a, p + a + b)])
    full, _ = packed_attention(q[rows], k[rows], v[rows], bounds([p + a, p + b]))
    keep = torch.tensor([*range(p + a), *range(2 * p + a, 2 * p + a + b)])
    torch.testing.assert_close(out, full[keep])
    weight = rand(p + a + b, 2, size, seed=4)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    want = torch.autograd.grad((full[keep] * weight).sum(), (q, k, v))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_partial_results_merge_through_lse() -> None:
    """Attention over two disjoint halves of the keys, merged, equals attention over all; gradients too."""
    q, k, v = (rand(n, 2, 16, seed=i).requires_grad_() for i, n in enumerate((10, 30, 30)))
    cu_q = bounds([10])

    def over(a: int, b: int) -> tuple[Tensor, Tensor]:
        return packed_attention(q, k[a:b], v[a:b], cu_q, bounds([b - a]), causal=False)

    (o1, l1), (o2, l2), (whole, lse) = over(0, 11), over(11, 30), over(0, 30)
    merged_lse = torch.logaddexp(l1, l2)
    merged = o1 * (l1 - merged_lse).exp()[..., None] + o2 * (l2 - merged_lse).exp()[..., None]
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, lse)
    weight = rand(10, 2, 16, seed=7)
    got = torch.autograd.grad((merged * weight).sum(), (q, k, v))
    want = torch.autograd.grad((whole * weight).sum(), (q, k, v))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_only_lse_may_be_used() -> None:
    q, k, v = (rand(6, 1, 8, seed=i).requires_grad_() for i in range(3))
    _, lse = packed_attention(q, k, v, bounds([6]))
    dq, _, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert dq.abs().max() > 0 and dv.abs().max() == 0


def test_rows_without_keys() -> None:
    q, k, v = rand(9, 2, 8), rand(9, 2, 8, seed=1), rand(9, 2, 8, seed=2)
    cu_q, cu_k = bounds([5, 2]), bounds([2, 0])  # the first 3 queries of segment 0 stand before its 2 keys
    for backend in ("cpp", "reference"):
        with force_backend(backend):
            out, lse = packed_attention(q, k, v, cu_q, cu_k)
        alone = [0, 1, 2, 5, 6, 7, 8]
        assert (out[alone] == 0).all() and (lse[alone] == -torch.inf).all()
        assert lse[3:5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_whatever_the_threads(dtype: torch.dtype) -> None:
    q, k, v = (rand(400, h, 32, seed=i, dtype=dtype) for i, h in enumerate((6, 2, 2)))
    spans = torch.tensor([[0, 0], [0, 60], [0, 60], [0, 0], [10, 30]], dtype=torch.int32)
    args = (q, k, v, bounds([60, 100, 90, 120, 20]), None, spans, None, True, 0.2, 0, 0.0)
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            with force_backend("cpp"):
                runs.append(everything(args))
    finally:
        torch.set_num_threads(before)
    for name, once, *others in zip(("out", "lse", "dq", "dk", "dv"), *runs, strict=True):
        # dk and dv may be summed head by head when threads outnumber the key heads; out and dq never change
        same = others[1:] if name in ("dk", "dv") else others
        assert all(torch.equal(once if name in ("out", "lse", "dq") else others[0], o) for o in same), name


def test_nan_is_not_swallowed() -> None:
    q, k, v = (rand(20, 1, 16, seed=i) for i in range(3))
    v[3] = torch.nan  # zero times nan is nan: queries 0..2, which do not see key 3, may be nan too
    q[15] = torch.nan
    with force_backend("cpp"):
        out, _ = packed_attention(q, k, v, bounds([10, 10]))
    assert out[3:10].isnan().all() and out[15].isnan().all()
    assert out[10:15].isfinite().all() and out[16:].isfinite().all()


def test_what_cpp_does_not_take_is_said() -> None:
    args = tuple(a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in next(samples()).args)
    assert "float16" in (packed_attention_fwd.why_not("cpp", args) or "")
    out, lse = packed_attention_fwd.op(*args)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32


def test_transposed_inputs_are_copied() -> None:
    q, k, v = (rand(2, 16, 12, seed=i).permute(2, 0, 1) for i in range(3))
    with force_backend("cpp"):
        strided = packed_attention(q, k, v, bounds([12]))
        dense = packed_attention(q.contiguous(), k.contiguous(), v.contiguous(), bounds([12]))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_window_wider_than_any_segment_hides_nothing(backend: str, dtype: torch.dtype) -> None:
    """The widest number overflowed where a position was added to it, and gradients went missing."""
    leaves = [rand(50, heads, 16, seed=heads).to(dtype).requires_grad_() for heads in (4, 2, 2)]

    def results(window: int) -> list[Tensor]:
        out, lse = packed_attention(*leaves, bounds([30, 20]), bounds([20, 30]), causal=False, window=window)
        return [out, lse, *torch.autograd.grad([out.float().square().sum() + lse.sum()], leaves)]

    with force_backend(backend):
        wide, widest, all_seen = results(1000), results(2**63 - 1), results(0)
    assert all(torch.equal(a, b) for a, b in zip(widest, wide, strict=True))
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(widest, all_seen, strict=True))


def test_isa_is_known() -> None:
    assert _cpp.extension().isa() in ("baseline", "avx2", "avx512", "avx512bf16", "amx")


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"v": rand(8, 2, 4)}, r"k is \[8, 1, 4\], v is \[8, 2, 4\]"),
        ({"k": rand(8, 1, 5), "v": rand(8, 1, 5)}, "head size must be the same"),
        ({"q": rand(8, 2, 300), "k": rand(8, 1, 300), "v": rand(8, 1, 300)}, r"1\.\.256"),
        ({"k": rand(8, 3, 4), "v": rand(8, 3, 4)}, "2 query heads are not a multiple of 3"),
        ({"k": rand(8, 1, 4).half()}, "k must be float32"),
        ({"cu_seqlens_q": torch.tensor([0, 8])}, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": ints()}, "S segments have S . 1 bounds"),
        ({"cu_seqlens_k": ints(0, 4, 8)}, r"cu_seqlens_k must be \[2\] for 1 segments"),
        ({"prefix": ints([0, 1], [0, 1])}, r"prefix must be \[1, 2\]"),
        ({"seqused_k": ints(1, 2)}, r"seqused_k must be \[1\]"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"window": -1}, "must not be negative"),
        ({"softcap": float("inf")}, "softcap not infinite, got 0 and inf"),
        ({"window": 3, "prefix": ints([0, 0])}, "window hides keys by distance"),
        ({"cu_seqlens_q": ints(0, 9)}, r"cu_seqlens_q must ascend within 0\.\.8"),
        ({"cu_seqlens_q": ints(0, 5, 3)}, "cu_seqlens_q must ascend"),
        ({"cu_seqlens_k": ints(4, 9)}, r"segment 0 has keys 4 \+ 5, outside the 8 rows"),
        ({"cu_seqlens_k": ints(0, 8), "seqused_k": ints(9)}, r"segment 0 has keys 0 \+ 9"),
        ({"cu_seqlens_q": ints(0, 4), "prefix": ints([6, 3])}, r"prefix 6 \+ 3, outside"),
        ({"cu_seqlens_q": ints(0, 4), "prefix": ints([3, 3])}, "overlaps its own keys"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], text: str) -> None:
    given = {"q": rand(8, 2, 4), "k": rand(8, 1, 4), "v": rand(8, 1, 4), "cu_seqlens_q": ints(0, 8), **change}
    with pytest.raises(ValueError, match=rf"^packed_attention: .*{text}"):
        packed_attention(**given)


def test_backward_refuses_a_foreign_gradient() -> None:
    args = next(samples()).args
    out, lse = packed_attention_fwd.op(*args)
    with pytest.raises(ValueError, match="packed_attention_bwd: dout must be"):
        packed_attention_bwd.op(out[:-1], None, *args[:3], out, lse, *args[3:])


def test_opcheck_of_the_backward() -> None:
    args = next(samples()).args
    out, lse = packed_attention_fwd.op(*args)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(packed_attention_bwd.op, (torch.ones_like(out), dlse, *args[:3], out, lse, *args[3:]))
