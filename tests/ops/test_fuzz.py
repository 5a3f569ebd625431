"""Arguments of any value, dtype, shape or stride break no op: it refuses them in words or computes as its reference.

Short and the same every time in `make test`; `make sanitize` runs it where reading out of bounds is noticed, and
`make fuzz` does so with new arguments until its time is up.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.agreement import TINY, distance
from tinyllava_fast.ops import pack_plan, packed_attention
from tinyllava_fast.ops._op import force_backend

settings.register_profile("short", max_examples=100, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
PROFILE = settings.get_profile(os.environ.get("TLF_FUZZ", "short"))

INT32 = 2**31
LIMITS = [-(2**63), -INT32 - 1, -INT32, -7, -1, 0, 1, 2, 3, 5, 8, 64, 511, INT32 - 1, INT32, 2**62, 2**63 - 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHERS = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
NUMBERS = [-float("inf"), -1.0, -0.0, 0.0, 1e-45, 1e-20, 0.1, 1.0, 4.0, 1e20, 3e38, float("inf"), float("nan")]


def restrided(data: st.DataObject, tensor: Tensor) -> Tensor:
    """The same values behind other strides: a transposed, a spread or an expanded buffer, or one that starts later."""
    how = data.draw(st.sampled_from(["as it is", "transposed", "every third", "offset", "expanded"]))
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every third" and tensor.dim():
        wide = tensor.new_zeros((*tensor.shape[:-1], 3 * tensor.shape[-1] + 1))
        wide[..., 1::3] = tensor
        return wide[..., 1::3]
    if how == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if how == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


def spoilt(data: st.DataObject, tensor: Tensor) -> Tensor:
    """Mostly the tensor itself, at times one of another dtype or shape."""
    how = data.draw(st.integers(0, 11))
    if how == 0:
        return tensor.to(data.draw(st.sampled_from([*DTYPES, *OTHERS, torch.int32])))
    if how == 1:
        return tensor[None]
    if how == 2 and tensor.dim():
        return tensor.flatten() if tensor.dim() > 1 else tensor.sum().to(tensor.dtype)
    if how == 3 and tensor.dim() and tensor.shape[0]:
        return tensor[: data.draw(st.integers(0, tensor.shape[0] - 1))]
    if how == 4 and tensor.dim() > 1:
        return tensor[..., : data.draw(st.integers(0, tensor.shape[-1]))]
    return tensor


def integers(data: st.DataObject, count: int, sensible: st.SearchStrategy[int], dtype: torch.dtype) -> Tensor:
    """So many integers, at times one of them at the end of what the dtype holds."""
    values = data.draw(st.lists(sensible, min_size=count, max_size=count))
    if count and data.draw(st.integers(0, 4)) == 0:
        info = torch.iinfo(dtype)
        wild = st.sampled_from([v for v in LIMITS if info.min <= v <= info.max])
        values[data.draw(st.integers(0, count - 1))] = data.draw(wild)
    return torch.tensor(values, dtype=dtype)


@settings(PROFILE)
@given(data=st.data())
def test_pack_plan(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 12))
    columns = [integers(data, count, st.integers(low, 9), torch.int64) for low in (1, 0, 1)]
    columns = [spoilt(data, restrided(data, column)) for column in columns]
    limit = st.one_of(st.integers(0, 30), st.integers(9, 30), st.sampled_from(LIMITS))
    numbers = [data.draw(limit) for _ in range(4)]
    try:
        with force_backend("cpp"):
            got = pack_plan(*columns, *numbers)
    except ValueError as error:
        assert str(error).startswith("pack_plan: ")
        return
    with force_backend("reference"):
        assert torch.equal(got, pack_plan(*columns, *numbers))


def arguments(data: st.DataObject) -> tuple[list[Any], dict[str, Any]]:
    """Of packed_attention, right in most respects."""
    segments = data.draw(st.integers(0, 4))
    heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    size = data.draw(st.sampled_from([0, 1, 3, 8, 16, 33, 64, 128, 256, 257]))
    lengths = st.lists(st.integers(0, 40), min_size=segments, max_size=segments)
    bounds = [torch.tensor([0, *data.draw(lengths)]).cumsum(0).int() for _ in range(2)]
    for each in bounds:
        if data.draw(st.integers(0, 5)) == 0:
            each[data.draw(st.integers(0, segments))] = data.draw(st.sampled_from([-INT32, -1, 3, 90, INT32 - 1]))
    own = data.draw(st.booleans())
    rows = max(0, min(200, max(bounds[0].tolist()))) + data.draw(st.integers(0, 2))
    keys = rows if not own else max(0, min(200, max(bounds[1].tolist()))) + data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from(DTYPES[:2] if data.draw(st.booleans()) else DTYPES))
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, h, size, generator=g).to(dtype) for n, h in ((rows, heads * group), (keys, heads), (keys, heads))
    )
    named: dict[str, Any] = {
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.one_of(st.none(), st.sampled_from(NUMBERS))),
        "window": data.draw(st.one_of(st.just(0), st.just(0), st.integers(1, 50), st.sampled_from(LIMITS))),
        "softcap": data.draw(st.one_of(st.just(0.0), st.just(0.0), st.sampled_from(NUMBERS))),
    }
    if data.draw(st.integers(0, 2)) == 0:
        pairs = integers(data, 2 * segments, st.integers(0, 20), torch.int32).view(segments, 2)
        named["prefix"] = spoilt(data, restrided(data, pairs))
    if data.draw(st.integers(0, 2)) == 0:
        named["seqused_k"] = spoilt(data, restrided(data, integers(data, segments, st.integers(0, 9), torch.int32)))
    places = [q, k, v, bounds[0], *([bounds[1]] if own else [])]
    return [spoilt(data, restrided(data, t)) for t in places], named


def outcome(given: list[Any], named: dict[str, Any], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """out, lse and the gradients of q, k, v for seeded ones, from this dtype's arithmetic."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in given[:3]]
    with force_backend(backend):
        out, lse = packed_attention(*leaves, *given[3:], **named)
        g = torch.Generator().manual_seed(1)
        incoming = [torch.randn(t.shape, generator=g).to(t) for t in (out, lse)]
        return [out, lse, *torch.autograd.grad([out, lse], leaves, incoming)]


@settings(PROFILE)
@given(data=st.data())
def test_packed_attention(data: st.DataObject) -> None:
    given, named = arguments(data)
    try:
        with force_backend("cpp"):
            packed_attention(*given, **named)
    except ValueError as error:
        assert str(error).startswith("packed_attention: ")
        return
    dtype = given[0].dtype
    ours, theirs = (outcome(given, named, dtype, backend) for backend in ("cpp", "reference"))
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
    scale = named["scale"]
    if (scale is not None and scale > 1) or 0 < named["softcap"] < 1e-3:
        return  # sums and products beyond what the dtype holds: only that nothing breaks
    exact = outcome(given, named, torch.float64, "reference")
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        finite = truth[truth.isfinite()]
        largest = max(1.0, float(finite.detach().abs().max())) if finite.numel() else 1.0
        allowed = 2 * distance(their, truth) + 4 * TINY.get(dtype, 1e-12) * largest
        assert distance(our, truth) <= allowed


@pytest.mark.parametrize("used", [None, [INT32 - 1]])
def test_bounds_that_overflow_are_refused(used: list[int] | None) -> None:
    """2^31 - 1 keys from row 5 on end, in 32 bits, before the first row."""
    q = torch.zeros(8, 1, 16)
    starts = torch.tensor([5, 8] if used else [5, -INT32], dtype=torch.int32)
    counts = None if used is None else torch.tensor(used, dtype=torch.int32)
    with pytest.raises(ValueError, match="segment 0 has keys 5"):
        packed_attention(q, q, q, torch.tensor([0, 8]).int(), starts, seqused_k=counts)
    prefix = torch.tensor([[5, INT32 - 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="segment 0 has prefix 5"):
        packed_attention(q, q, q, torch.tensor([0, 0]).int(), prefix=prefix)
