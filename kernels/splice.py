"""Triton kernels of ops/splice.py: rows in and out of the packed buffer, each moved once.

Both gradients are deterministic: a feature row reads its one position, and the text positions of a token are sorted on
the device, so that one program adds them up in float32, always in the same order. No atomics.

Legend: T tokens, V vocabulary, D width, R feature rows. A stride counts elements from row to row; columns are adjacent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase, power_of_2

TILE = 4096
"""Elements a program holds at a time: 32 a thread with 4 warps, enough loads in flight to cover latency."""
SUM_ROWS = 16
"""Rows of one token that are added at a time. Most tokens have one; the most frequent have hundreds."""
MAX_COLUMNS = 1024
"""Columns of a tile at most."""


@triton.jit
def find_owners(slots: tl.tensor, owner: tl.tensor, tokens: tl.tensor, rows: tl.tensor, BLOCK: tl.constexpr) -> None:
    """owner[slots[r]] = r; a slot outside 0..T-1 drops its row."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + r, mask=r < rows, other=-1)
    tl.store(owner + slot, r, mask=(slot >= 0) & (slot < tokens))


@triton.jit
def copy_rows(
    ids: tl.tensor,
    owner: tl.tensor,
    weight: tl.tensor,
    features: tl.tensor,
    out: tl.tensor,
    weight_stride: tl.tensor,
    features_stride: tl.tensor,
    tokens: tl.tensor,
    vocab: tl.tensor,
    dim: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out[t] = features[owner[t]], or weight[ids[t]] where nothing owns t. Each tile is read from one of the two."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = t < tokens
    image = tl.load(owner + t, mask=live, other=-1)
    token = tl.load(ids + t, mask=live, other=0)
    inside = (column < dim)[None, :]
    # an id outside the vocabulary becomes a row of NaN: the loss then says so, where a wild read would not
    known = (token >= 0) & (token < vocab)
    from_text = tl.load(
        weight + token[:, None] * weight_stride + column[None, :],
        mask=(live & (image < 0) & known)[:, None] & inside,
        other=float("nan"),
    )
    from_image = tl.load(
        features + image.to(tl.int64)[:, None] * features_stride + column[None, :],
        mask=(live & (image >= 0))[:, None] & inside,
        other=0.0,
    )
    value = tl.where((image >= 0)[:, None], from_image, from_text)
    tl.store(out + t.to(tl.int64)[:, None] * dim + column[None, :], value, mask=live[:, None] & inside)


@triton.jit
def gather_rows(
    grad: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    grad_stride: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out[r] = grad[slots[r]], zeros for a dropped row."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + r, mask=r < rows, other=-1)
    inside = (column < dim)[None, :]
    value = tl.load(
        grad + slot[:, None] * grad_stride + column[None, :],
        mask=((slot >= 0) & (slot < tokens))[:, None] & inside,
        other=0.0,
    )
    tl.store(out + r.to(tl.int64)[:, None] * dim + column[None, :], value, mask=(r < rows)[:, None] & inside)


@triton.jit
def sum_tokens(
    grad: tl.tensor,
    tokens_sorted: tl.tensor,
    order: tl.tensor,
    out: tl.tensor,
    grad_stride: tl.tensor,
    tokens: tl.tensor,
    vocab: tl.tensor,
    dim: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out[token] = sum of grad[order[i]] over the run of tokens_sorted that begins at i = program_id(0).

    Programs that stand inside a run, and those of covered positions (token V), leave at once.
    """
    start = tl.program_id(0)
    token = tl.load(tokens_sorted + start)
    before = tl.load(tokens_sorted + start - 1, mask=start > 0, other=-1)
    if (token != before) & (token >= 0) & (token < vocab):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < dim
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        at = start
        count = ROWS
        while count == ROWS:  # a full tile: the run may go on
            i = at + tl.arange(0, ROWS)
            same = tl.load(tokens_sorted + i, mask=i < tokens, other=-1) == token
            row = tl.load(order + i, mask=same, other=0)
            value = tl.load(
                grad + row[:, None] * grad_stride + column[None, :], mask=same[:, None] & inside[None, :], other=0.0
            )
            total += tl.sum(value.to(tl.float32), axis=0)
            count = tl.sum(same.to(tl.int32), axis=0)
            at += ROWS
        tl.store(out + token * dim + column, total.to(out.dtype.element_ty), mask=inside)


def splice_fwd(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """[T, D]: the embedding rows with the feature rows laid over them. As the reference, in any float dtype."""
    weight, features = _unit_stride(weight), _unit_stride(features)
    input_ids, slots = input_ids.contiguous(), slots.contiguous()
    tokens, dim = len(input_ids), weight.shape[1]
    out = weight.new_empty((tokens, dim))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):
        owner = _owners(slots, tokens)
        rows, columns = _tile(dim)
        copy_rows[_grid(tokens, rows, dim, columns)](
            input_ids, owner, weight, features, out, weight.stride(0), features.stride(0), tokens, len(weight), dim,
            ROWS=rows, COLUMNS=columns, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return out


def splice_bwd(
    grad: Tensor, input_ids: Tensor, slots: Tensor, vocab: int, want_weight: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [V, D] and features [R, D]; an unwanted one has no rows."""
    grad, input_ids, slots = _unit_stride(grad), input_ids.contiguous(), slots.contiguous()
    tokens, dim = grad.shape
    d_weight = grad.new_zeros((vocab if want_weight else 0, dim))
    d_features = grad.new_empty((len(slots) if want_features else 0, dim))
    with torch.cuda.device_of(grad):
        if d_weight.numel() and tokens:
            text = input_ids.masked_fill(_owners(slots, tokens) >= 0, vocab)
            ordered, order = torch.sort(text, stable=True)
            columns = power_of_2(dim, 16, TILE // SUM_ROWS)
            sum_tokens[(tokens, triton.cdiv(dim, columns))](
                grad, ordered, order, d_weight, grad.stride(0), tokens, vocab, dim,
                ROWS=SUM_ROWS, COLUMNS=columns, num_warps=4, **LAUNCH,
            )  # fmt: skip
        if d_features.numel():
            rows, columns = _tile(dim)
            gather_rows[_grid(len(slots), rows, dim, columns)](
                grad, slots, d_features, grad.stride(0), tokens, len(slots), dim,
                ROWS=rows, COLUMNS=columns, num_warps=4, **LAUNCH,
            )  # fmt: skip
    return d_weight, d_features


def compile_cases() -> Iterator[CompileCase]:
    """The kernels at a small and a large width."""
    yield CompileCase(
        "find_owners", "block 256", find_owners,
        {"slots": "*i64", "owner": "*i32", "tokens": "i32", "rows": "i32"}, {"BLOCK": 256}, 4, 3, False,
    )  # fmt: skip
    copy = {
        "ids": "*i64", "owner": "*i32", "weight": "*{}", "features": "*{}", "out": "*{}",
        "weight_stride": "i32:16", "features_stride": "i32:16", "tokens": "i32", "vocab": "i32", "dim": "i32:16",
    }  # fmt: skip
    gather = {
        "grad": "*{}", "slots": "*i64", "out": "*{}", "grad_stride": "i32:16", "tokens": "i32", "rows": "i32",
        "dim": "i32:16",
    }  # fmt: skip
    sums = {
        "grad": "*{}", "tokens_sorted": "*i64", "order": "*i64", "out": "*{}", "grad_stride": "i32:16", "tokens": "i32",
        "vocab": "i32", "dim": "i32:16",
    }  # fmt: skip
    for dtype, dim in ((torch.bfloat16, 576), (torch.bfloat16, 2048), (torch.float32, 2048)):
        kind = TRITON_TYPES[dtype]
        rows, columns = _tile(dim)
        tile = {"ROWS": rows, "COLUMNS": columns}
        sum_tile = {"ROWS": SUM_ROWS, "COLUMNS": power_of_2(dim, 16, TILE // SUM_ROWS)}
        for kernel, name, signature, constants in (
            (copy_rows, "copy_rows", copy, tile),
            (gather_rows, "gather_rows", gather, tile),
            (sum_tokens, "sum_tokens", sums, sum_tile),
        ):
            types = {argument: given.format(kind) for argument, given in signature.items()}
            yield CompileCase(name, f"D={dim} {kind}", kernel, types, constants, 4, 3, False)


def _owners(slots: Tensor, tokens: int) -> Tensor:
    """[T] int32: the feature row that covers a position, -1 for text."""
    owner = torch.full((tokens,), -1, dtype=torch.int32, device=slots.device)
    if len(slots):
        block = 256
        find_owners[(triton.cdiv(len(slots), block),)](slots, owner, tokens, len(slots), BLOCK=block, **LAUNCH)
    return owner


def _tile(dim: int) -> tuple[int, int]:
    columns = power_of_2(dim, 16, MAX_COLUMNS)
    return TILE // columns, columns


def _grid(rows: int, tile_rows: int, dim: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, tile_rows), triton.cdiv(dim, columns)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
