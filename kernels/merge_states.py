"""merge_states on a GPU: memory-bound, one pass over rows of (query, head); gradients of all four in one more."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase

ELEMENTS = 4096  # of a program: 32 a thread of 4 warps, so that loads of 16 bytes are in flight


@triton.jit
def _weights(lse_a, lse_b, r, inside):
    """(wa, wb, lse) of the rows; 0, 0, -inf where both sides are -inf."""
    a = tl.load(lse_a + r, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(lse_b + r, mask=inside, other=0.0).to(tl.float32)
    peak = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    ea = tl.exp(a - shift)
    eb = tl.exp(b - shift)
    total = ea + eb
    safe = tl.where(total == 0, 1.0, total)
    return ea / safe, eb / safe, tl.where(total == 0, -float("inf"), shift + tl.log(safe))


@triton.jit
def _merge(out_a, lse_a, out_b, lse_b, out, lse, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out and lse of ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = r < rows
    wa, wb, total = _weights(lse_a, lse_b, r, inside)
    tl.store(lse + r, total, mask=inside)
    at = r[:, None] * SIZE + d[None, :]
    wanted = inside[:, None] & (d < SIZE)[None, :]
    a = tl.load(out_a + at, mask=wanted, other=0.0).to(tl.float32)
    b = tl.load(out_b + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + at, (wa[:, None] * a + wb[:, None] * b).to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _differentiate(
    dout, dlse, out_a, lse_a, out_b, lse_b, d_out_a, d_lse_a, d_out_b, d_lse_b, rows,
    DLSE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The four gradients of ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = r < rows
    wa, wb, _ = _weights(lse_a, lse_b, r, inside)
    at = r[:, None] * SIZE + d[None, :]
    wanted = inside[:, None] & (d < SIZE)[None, :]
    a = tl.load(out_a + at, mask=wanted, other=0.0).to(tl.float32)
    b = tl.load(out_b + at, mask=wanted, other=0.0).to(tl.float32)
    grad = tl.load(dout + at, mask=wanted, other=0.0).to(tl.float32)
    gap = wa * wb * tl.sum(grad * (a - b), 1)
    through = tl.zeros([ROWS], tl.float32)
    if DLSE:
        through = tl.load(dlse + r, mask=inside, other=0.0)
    tl.store(d_out_a + at, (wa[:, None] * grad).to(d_out_a.dtype.element_ty), mask=wanted)
    tl.store(d_out_b + at, (wb[:, None] * grad).to(d_out_b.dtype.element_ty), mask=wanted)
    tl.store(d_lse_a + r, (wa * through + gap).to(d_lse_a.dtype.element_ty), mask=inside)
    tl.store(d_lse_b + r, (wb * through - gap).to(d_lse_b.dtype.element_ty), mask=inside)


def _tile(size: int) -> dict[str, int]:
    columns = triton.next_power_of_2(size)
    return {"SIZE": size, "ROWS": max(1, min(64, ELEMENTS // columns)), "COLUMNS": columns}


def merge_states_fwd(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out [T, H, Dh], lse [T, H]); as the reference."""
    out, lse = out_a.new_empty(out_a.shape), out_a.new_empty(out_a.shape[:2], dtype=torch.float32)
    if out.numel():
        tile, given = _tile(out.shape[2]), [t.contiguous() for t in (out_a, lse_a, out_b, lse_b)]
        with torch.cuda.device_of(out):
            _merge[(triton.cdiv(lse.numel(), tile["ROWS"]),)](*given, out, lse, lse.numel(), **tile, **LAUNCH)
    return out, lse


def merge_states_bwd(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b, lse_b; as the reference."""
    given = [t.contiguous() for t in (out_a, lse_a, out_b, lse_b)]
    da, dla, db, dlb = (t.new_empty(t.shape) for t in given)
    if dout.numel():
        tile, rows = _tile(dout.shape[2]), lse_a.numel()
        first = [dout.contiguous(), given[1] if dlse is None else dlse.contiguous()]
        with torch.cuda.device_of(dout):
            _differentiate[(triton.cdiv(rows, tile["ROWS"]),)](
                *first, *given, da, dla, db, dlb, rows, DLSE=dlse is not None, **tile, **LAUNCH
            )
    return da, dla, db, dlb


def compile_cases() -> Iterator[CompileCase]:
    """Both kernels at a usual and at the largest head size."""
    for dtype, size in ((torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 80)):
        kind = f"*{TRITON_TYPES[dtype]}"
        types = dict.fromkeys(("lse_a", "lse_b", "lse", "dlse", "d_lse_a", "d_lse_b"), "*fp32") | {"rows": "i32"}
        for kernel, name, more in ((_merge, "merge", {}), (_differentiate, "differentiate", {"DLSE": True})):
            constants = {**_tile(size), **more}
            signature = {a: types.get(a, kind) for a in kernel.arg_names if a not in constants}
            yield CompileCase(name, f"Dh={size} {kind[1:]}", kernel, signature, constants, 4, 3, False)
