"""Attention of one new token a sequence over its rows of a K/V pool: the inner loop of generation on a CPU.

    s[j]  = scale * q . k[j]             (softcap > 0: softcap * tanh(s / softcap))
    out   = sum_j softmax(s)[j] v[j]     j over the sequence's own rows and those of its shared prefix

What packed_attention computes for segments of one query, without its tiles: packing keys into them costs more than one
query gains. Not differentiable. Legend: S sequences, P rows of the pool, H, Hkv heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._attention_args import MAX_HEAD_DIM, check_heads, check_int32, check_numbers
from tinyllava_fast.ops._check import FLOATS
from tinyllava_fast.ops._op import Sample, define_op

OP = "decode_attention"


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    used: Tensor,
    *,
    scale: float | None = None,
    prefix: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Each query over the rows start[s] : start[s] + used[s] of k and v and those of its prefix.

    q: [S, H, Dh] float; k, v: [P, Hkv, Dh], same dtype; any strides. start, used: [S] int32. prefix: [S, 2] int32
    (start, length) of further rows, none of them its own. scale: default Dh ** -0.5.
    Returns [S, H, Dh] of q's dtype; zeros for a query that sees no key.
    Raises ValueError for shapes and dtypes and, on a CPU, rows out of range.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return decode_attention_fwd.infer(q, k, v, start, used, prefix, scale, float(softcap))


def _check(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, used: Tensor, prefix: Tensor | None, scale: float, softcap: float
) -> None:
    if _plainly_right(q, k, v, start, used, prefix) and 0 < scale < float("inf") and 0 <= softcap < float("inf"):
        return  # it is called for every layer of every token: no sentence is made unless one is needed
    check_heads(OP, q, k, v, "S", "P")
    for name, tensor, dims, shape in (
        ("start", start, "S", [len(q)]),
        ("used", used, "S", [len(q)]),
        ("prefix", prefix, "S 2", [len(q), 2]),
    ):
        check_int32(OP, name, tensor, dims, shape, f"{len(q)} queries", q)
    check_numbers(OP, scale, 0, softcap)


def _plainly_right(q: Tensor, k: Tensor, v: Tensor, start: Tensor, used: Tensor, prefix: Tensor | None) -> bool:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.dtype not in FLOATS:
        return False
    sequences, heads, size = q.shape
    return (
        k.dtype == v.dtype == q.dtype
        and k.shape[2] == size
        and 1 <= size <= MAX_HEAD_DIM
        and k.shape[1] > 0
        and heads % k.shape[1] == 0
        and start.dtype == used.dtype == torch.int32
        and start.shape == used.shape == (sequences,)
        and (prefix is None or (prefix.dtype == torch.int32 and prefix.shape == (sequences, 2)))
        and k.device == v.device == start.device == used.device == q.device
        and (prefix is None or prefix.device == q.device)
    )


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(
        label: str,
        spans: list[tuple[int, int]],
        heads: tuple[int, int] = (6, 2),
        size: int = 16,
        prefix: list[tuple[int, int]] | None = None,
        softcap: float = 0.0,
    ) -> Sample:
        q = torch.randn(len(spans), heads[0], size, generator=g)
        k, v = torch.randn(2, 200, heads[1], size, generator=g)
        bounds = torch.tensor(spans, dtype=torch.int32).view(-1, 2)
        shared = None if prefix is None else torch.tensor(prefix, dtype=torch.int32)
        return Sample((q, k, v, bounds[:, 0], bounds[:, 1], shared, size**-0.5, softcap), label, differentiable=False)

    yield case("ragged", [(0, 1), (1, 70), (150, 50), (90, 64)])
    yield case("shared prefix", [(0, 3), (10, 130), (7, 1)], prefix=[(150, 50), (150, 50), (8, 0)])
    yield case("one sequence, one key", [(5, 1)], heads=(1, 1), size=1)
    yield case("no sequence", [])
    yield case("a query without keys", [(3, 0), (4, 2)], prefix=[(0, 0), (0, 2)])
    yield case("many heads of one key head", [(0, 80), (100, 9)], heads=(22, 2), size=33, softcap=5.0)
    q, k, v, *rest = case("", [(0, 90), (100, 65)], size=8).args
    strided = (q.transpose(0, 1).contiguous().transpose(0, 1), k.transpose(0, 1).contiguous().transpose(0, 1))
    wide = torch.stack([v, v], -1).flatten(-2)[..., ::2]
    yield Sample((*strided, wide, *rest), "strided", differentiable=False)


def _cpp_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, used: Tensor, prefix: Tensor | None, scale: float, softcap: float
) -> Tensor:
    q, start, used = q.contiguous(), start.contiguous(), used.contiguous()
    k, v = (t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in (k, v))
    prefix = None if prefix is None else prefix.contiguous()
    out = torch.empty_like(q)
    bad = _cpp.extension().decode_attention(
        *(t.data_ptr() for t in (q, k, v, out, start, used)),
        0 if prefix is None else prefix.data_ptr(),
        *(len(q), len(k), q.shape[1], *k.shape[1:]),
        *(*k.stride()[:2], *v.stride()[:2]),
        *(_cpp.DTYPE_CODES[q.dtype], scale, softcap),
    )
    if bad >= 0:
        shared = "" if prefix is None else f" with prefix {prefix[bad].tolist()}"
        own = f"{int(start[bad])} + {int(used[bad])}"
        raise ValueError(f"{OP}: sequence {bad} has rows {own}{shared}, which the {len(k)} rows of k do not hold")
    return out


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@define_op(
    module=OP,
    check=_check,
    fake=_fake,
    cpp=_cpp_fwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_samples,
)
def decode_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, used: Tensor, prefix: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """[S, H, Dh]; see decode_attention()."""
    wide = torch.promote_types(q.dtype, torch.float32)
    row = torch.arange(k.shape[0], device=q.device)
    seen = (row >= start[:, None]) & (row < (start + used)[:, None])  # [S, P]
    if prefix is not None:
        seen |= (row >= prefix[:, :1]) & (row < prefix.sum(1, keepdim=True))
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))  # [P, H, Dh]
    s = torch.einsum("shd,phd->shp", q.to(wide), keys) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    p = s.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    p = p.masked_fill(~seen[:, None], 0)  # a query that sees nothing: zeros, not nan
    return torch.einsum("shp,phd->shd", p, values).to(q.dtype).contiguous()
