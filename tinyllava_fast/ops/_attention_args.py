"""The checks of the arguments of packed attention, and the keys that they make visible."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyllava_fast.ops._check import FLOATS, expect

OP = "packed_attention"
MAX_HEAD_DIM = 256
MAX_WINDOW = 2**31
"""Bounds are int32, so a wider window hides no more keys; sums of positions and this one do not overflow."""


class Args(NamedTuple):
    """The arguments of packed_attention_fwd."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor | None
    prefix: Tensor | None
    used: Tensor | None
    causal: bool
    scale: float
    window: int
    softcap: float


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, queries: str, keys: str) -> None:
    """Raise ValueError unless q [queries, H, Dh] and k, v [keys, Hkv, Dh] belong together."""
    expect(op, "q", q, f"{queries} H Dh", FLOATS)
    expect(op, "k", k, f"{keys} Hkv Dh", (q.dtype,), like=q)
    expect(op, "v", v, f"{keys} Hkv Dh", (q.dtype,), like=q)
    heads, size = q.shape[1:]
    if k.shape != v.shape:
        raise ValueError(f"{op}: k is {list(k.shape)}, v is {list(v.shape)}; they must have one shape")
    if k.shape[2] != size or not 1 <= size <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head size must be the same in q and k and 1..{MAX_HEAD_DIM}, got {size}, {k.shape[2]}")
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"{op}: {heads} query heads are not a multiple of {k.shape[1]} key heads")


def check_int32(op: str, name: str, tensor: Tensor | None, dims: str, shape: list[int], of: str, like: Tensor) -> None:
    """Raise ValueError unless the tensor is None, or int32 of this shape where ``like`` is. of: what it counts."""
    if tensor is None:
        return
    expect(op, name, tensor, dims, (torch.int32,), like=like)
    if list(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape} for {of}, got {list(tensor.shape)}")


def check_numbers(op: str, scale: float, window: int, softcap: float) -> None:
    """Raise ValueError unless the scale is positive, window and softcap are not negative, and none is infinite."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if window < 0 or not 0 <= softcap < float("inf"):
        raise ValueError(
            f"{op}: window and softcap must not be negative, softcap not infinite, got {window} and {softcap}"
        )


def check(*args: object) -> None:
    """Raise ValueError for shapes, dtypes and numbers that packed_attention_fwd does not take."""
    q, k, v, cu_q, cu_k, prefix, used, _, scale, window, softcap = Args._make(args)
    check_heads(OP, q, k, v, "Tq", "Tk")
    expect(OP, "cu_seqlens_q", cu_q, "S+1", (torch.int32,), like=q)
    if cu_q.shape[0] < 1:
        raise ValueError(f"{OP}: cu_seqlens_q is empty; S segments have S + 1 bounds")
    segments = cu_q.shape[0] - 1
    for name, tensor, dims, shape in (
        ("cu_seqlens_k", cu_k, "S+1", [segments + 1]),
        ("prefix", prefix, "S 2", [segments, 2]),
        ("seqused_k", used, "S", [segments]),
    ):
        check_int32(OP, name, tensor, dims, shape, f"{segments} segments", q)
    check_numbers(OP, scale, window, softcap)
    if window and prefix is not None:
        raise ValueError(f"{OP}: window hides keys by distance, which a shared prefix has none of; give one of them")


def check_values(*args: object) -> None:
    """Raise ValueError, naming the segment, for bounds outside q and k and for a prefix over own keys."""
    q, k, _, cu_q, cu_k, prefix, used, *_ = Args._make(args)
    tokens, keys = q.shape[0], k.shape[0]
    bounds_q = _wide(cu_q)
    bounds_k = bounds_q if cu_k is None else _wide(cu_k)
    starts, counts = bounds_k[:-1], _wide(used) if used is not None else bounds_k[1:] - bounds_k[:-1]
    if bounds_q[0] < 0 or bounds_q[-1] > tokens or (bounds_q[1:] < bounds_q[:-1]).any():
        raise ValueError(f"{OP}: cu_seqlens_q must ascend within 0..{tokens}, got {bounds_q.tolist()}")
    bad = (starts < 0) | (counts < 0) | (starts + counts > keys)
    if bad.any():
        s = int(bad.argmax())
        raise ValueError(f"{OP}: segment {s} has keys {starts[s]} + {counts[s]}, outside the {keys} rows of k")
    if prefix is not None:
        first, length = _wide(prefix).T
        bad = (first < 0) | (length < 0) | (first + length > keys)
        if bad.any():
            s = int(bad.argmax())
            raise ValueError(f"{OP}: segment {s} has prefix {first[s]} + {length[s]}, outside the {keys} rows of k")
        bad = (first < starts + counts) & (starts < first + length) & (length > 0) & (counts > 0)
        if bad.any():
            s = int(bad.argmax())
            raise ValueError(f"{OP}: the prefix {first[s]} + {length[s]} of segment {s} overlaps its own keys")


def _wide(bounds: Tensor) -> np.ndarray:
    """Return the bounds in 64 bits: sums of two bounds of 32 bits overflow."""
    return bounds.numpy().astype(np.int64)


def visible(*args: object) -> Tensor:
    """Return [Tq, Tk] bool: True where a query sees a key."""
    q, k, _, cu_q, cu_k, prefix, used, causal, _, window, _ = Args._make(args)
    segments = cu_q.shape[0] - 1
    if segments == 0:
        return torch.zeros((q.shape[0], k.shape[0]), dtype=torch.bool, device=q.device)
    cu_q = cu_q.long()
    cu_k = cu_q if cu_k is None else cu_k.long()
    starts, counts = cu_k[:-1], cu_k[1:] - cu_k[:-1] if used is None else used.long()
    row = torch.arange(q.shape[0], device=q.device)
    seg = torch.searchsorted(cu_q[1:], row, right=True)
    inside = (seg < segments) & (row >= cu_q[0])
    seg = seg.clamp(max=segments - 1)
    # position of each query on the axis of its own keys: the last query stands on the last key
    position = (row - cu_q[seg] + counts[seg] - (cu_q[seg + 1] - cu_q[seg]))[:, None]
    key = torch.arange(k.shape[0], device=q.device)[None, :]
    own = key - starts[seg][:, None]
    seen = (own >= 0) & (own < counts[seg][:, None])
    if causal:
        seen &= own <= position
    if window:
        seen &= own > position - window
    if prefix is not None:
        ahead = key - prefix[seg, 0][:, None]
        seen |= (ahead >= 0) & (ahead < prefix[seg, 1][:, None])
    return seen & inside[:, None]


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor itself where a row's elements lie side by side, as the kernels read them, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()
