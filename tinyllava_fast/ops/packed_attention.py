"""Attention inside the segments of a packed row: ragged, grouped-query, with keys that several segments share.

    s[i, j] = scale * q[i] . k[j]            (softcap > 0: softcap * tanh(s / softcap))
    lse[i]  = log sum_j exp(s[i, j])         j over the keys that query i sees
    out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]

    backward, with p = exp(s - lse) and delta[i] = dout[i] . out[i] - dlse[i]:
    dv[j] = sum_i p[i, j] dout[i]            ds[i, j] = scale * p[i, j] * (dout[i] . v[j] - delta[i])
    dq[i] = sum_j ds[i, j] k[j]              dk[j]    = sum_i ds[i, j] q[i]

Both outputs are differentiable: partial results over disjoint keys merge exactly through lse.
The backward is deterministic: no atomics; every sum has one order for a number of threads, and that of dq for any.
In C++ bfloat16 runs in AMX tiles where the ISA is amx; float32 and spans of fewer than 16 keys in AVX-512 there too.
Algorithm of the kernels: FlashAttention-2, arXiv:2307.08691; nothing of size [Tq, Tk] exists outside the reference.
Legend: Tq, Tk rows of q and of k; H, Hkv heads; Dh head size; S segments; G = H / Hkv query heads of a key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._attention_args import MAX_WINDOW, OP, Args, check, check_values, dense_rows, visible
from tinyllava_fast.ops._attention_samples import samples
from tinyllava_fast.ops._op import Context, define_op


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    prefix: Tensor | None = None,
    seqused_k: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of each segment over that segment's keys and its shared prefix.

    q: [Tq, H, Dh] float; k, v: [Tk, Hkv, Dh], same dtype; any strides. cu_seqlens_q: [S + 1] int32: segment s holds
    queries cu_seqlens_q[s] : cu_seqlens_q[s + 1]. cu_seqlens_k: [S + 1] int32, default cu_seqlens_q: its own keys start
    at cu_seqlens_k[s] and number cu_seqlens_k[s + 1] - cu_seqlens_k[s], or seqused_k[s] (int32 [S]) where given; then
    the starts may come in any order. prefix: [S, 2] int32 (start, length) of further rows of k and v that every
    query of the segment sees; they may not overlap its own keys.
    causal: query i of n sees own key j of m iff j <= i + m - n. window w > 0: own keys more than w - 1 positions
    back are hidden; not together with prefix. scale: default Dh ** -0.5.
    Returns out [Tq, H, Dh] of q's dtype and lse [Tq, H] float32 (float64 for float64); queries outside every segment
    and queries that see no key have out 0 and lse -inf. Differentiable in q, k, v, through both outputs.
    Raises ValueError for shapes, dtypes and, on a CPU, bounds out of range.
    """
    if scale is None:  # what has no head size is refused by the check
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    return packed_attention_fwd.call(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, prefix, seqused_k),
        *(causal, float(scale), min(int(window), MAX_WINDOW), float(softcap)),
    )


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    # new_empty, not empty_like: the output is contiguous whatever the strides of q
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_wide(q))


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Scores [G, Tq, Tk] of one key head in wide precision, and tanh(s / softcap) where there is a cap."""
    s = torch.einsum("igd,jd->gij", q.to(_wide(q)), k.to(_wide(q))) * scale
    if softcap == 0:
        return s, None
    t = torch.tanh(s / softcap)
    return t * softcap, t


def _cpp_supports(q: Tensor, *_: object) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 and bfloat16, got {q.dtype}"
    return None


def _triton_supports(*args: object) -> str | None:
    dtype = next(a.dtype for a in args if isinstance(a, Tensor))
    return "its Triton kernel computes in float32, got torch.float64" if dtype == torch.float64 else None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cpp_fwd(*args: object) -> tuple[Tensor, Tensor]:
    q, k, v, cu_q, cu_k, prefix, used, causal, scale, window, softcap = Args._make(args)
    out, lse = _fake(q)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    index = [None if t is None else t.contiguous() for t in (cu_q, cu_q if cu_k is None else cu_k, prefix, used)]
    _cpp.extension().packed_attention_fwd(
        *map(_pointer, (q, k, v, out, lse, *index)),
        *(cu_q.shape[0] - 1, *q.shape[:2], *k.shape[1:]),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(_cpp.DTYPE_CODES[q.dtype], int(causal), scale, window, softcap, torch.get_num_threads()),
    )
    return out, lse


@define_op(
    module="packed_attention",
    check=check,
    check_values=check_values,
    fake=_fake,
    cpp=_cpp_fwd,
    cpp_supports=_cpp_supports,
    triton_supports=_triton_supports,
    samples=samples,
)
def packed_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    prefix: Tensor | None,
    used: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out [Tq, H, Dh], lse [Tq, H]); see packed_attention()."""
    out, lse = _fake(q)
    hidden = ~visible(q, k, v, cu_q, cu_k, prefix, used, causal, scale, window, softcap)
    group = q.shape[1] // k.shape[1]
    for n in range(k.shape[1]):  # one key head at a time bounds the memory: [G, Tq, Tk]
        heads = slice(n * group, (n + 1) * group)
        s, _ = _scores(q[:, heads], k[:, n], scale, softcap)
        total = s.masked_fill_(hidden, -torch.inf).logsumexp(-1)  # [G, Tq]
        # a query that sees nothing has lse -inf: exp(-inf - 0) = 0 instead of exp(-inf + inf) = nan
        p = torch.exp(s - total.masked_fill(total == -torch.inf, 0)[..., None])
        out[:, heads] = torch.einsum("gij,jd->igd", p, v[:, n].to(p.dtype)).to(q.dtype)
        lse[:, heads] = total.t()
    return out, lse


def _check_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
) -> None:
    check(q, k, v, *rest)
    for name, tensor, dtype, shape in (
        ("dout", dout, q.dtype, q.shape),
        ("out", out, q.dtype, q.shape),
        ("lse", lse, _wide(q), q.shape[:2]),
        ("dlse", dlse, _wide(q), q.shape[:2]),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or tensor.device != q.device):
            raise ValueError(
                f"{OP}_bwd: {name} must be {dtype} {list(shape)} on {q.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _check_values_bwd(*args: object) -> None:
    check_values(*args[2:5], *args[7:])


def _fake_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cpp_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    *_, cu_q, cu_k, prefix, used, causal, scale, window, softcap = Args._make((q, k, v, *rest))
    grads = _fake_bwd(dout, dlse, q, k, v)
    strided = [dense_rows(t) for t in (dout, q, k, v)]
    dout, q, k, v = strided
    dense = [None if t is None else t.contiguous() for t in (out, lse, dlse)]
    index = [None if t is None else t.contiguous() for t in (cu_q, cu_q if cu_k is None else cu_k, prefix, used)]
    _cpp.extension().packed_attention_bwd(
        *map(_pointer, (dout, dense[2], q, k, v, dense[0], dense[1], *grads, *index)),
        *(cu_q.shape[0] - 1, *q.shape[:2], *k.shape),
        *(s for t in strided for s in t.stride()[:2]),
        *(_cpp.DTYPE_CODES[q.dtype], int(causal), scale, window, softcap, torch.get_num_threads()),
    )
    return grads


@define_op(
    module="packed_attention",
    check=_check_bwd,
    check_values=_check_values_bwd,
    fake=_fake_bwd,
    cpp=_cpp_bwd,
    cpp_supports=_cpp_supports,
    triton_supports=_triton_supports,
)
def packed_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    prefix: Tensor | None,
    used: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, shapes and dtype of q, k, v. dlse None: lse was not used."""
    dq, dk, dv = _fake_bwd(dout, dlse, q, k, v)
    hidden = ~visible(q, k, v, cu_q, cu_k, prefix, used, causal, scale, window, softcap)
    group, wide = q.shape[1] // k.shape[1], _wide(q)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)  # [Tq, H]
    if dlse is not None:
        delta = delta - dlse
    for n in range(k.shape[1]):
        heads = slice(n * group, (n + 1) * group)
        grad, keys, values = dout[:, heads].to(wide), k[:, n].to(wide), v[:, n].to(wide)
        s, t = _scores(q[:, heads], k[:, n], scale, softcap)
        total = lse[:, heads].t()
        total = total.masked_fill(total == -torch.inf, 0)
        p = torch.exp(s.masked_fill_(hidden, -torch.inf) - total[..., None])
        ds = (torch.einsum("igd,jd->gij", grad, values) - delta[:, heads].t()[..., None]) * p * scale
        if t is not None:
            ds = ds * (1 - t * t)
        dv[:, n] = torch.einsum("gij,igd->jd", p, grad).to(v.dtype)
        dk[:, n] = torch.einsum("gij,igd->jd", ds, q[:, heads].to(wide)).to(k.dtype)
        dq[:, heads] = torch.einsum("gij,jd->igd", ds, keys).to(q.dtype)
    return dq, dk, dv


def _setup_context(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)  # lse is rarely used: its gradient stays None instead of zeros


def _backward(ctx: Context, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *bounds = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    return *packed_attention_bwd.op(dout, dlse, q, k, v, out, lse, *bounds, *ctx.settings), *[None] * 8


packed_attention_fwd.op.register_autograd(_backward, setup_context=_setup_context)
