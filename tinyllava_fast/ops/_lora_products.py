"""The products of a LoRA layer with its adapter on a CPU, dropout applied on the way.

Each has one wide factor, [N, K] or [N, O], whose reading takes longer than multiplying it by a few columns. Where
vectors multiply bfloat16 (_policy.TABLE) a C++ kernel reads it once; elsewhere the products are torch's. Elements
of a row are adjacent in the wide matrix, the narrow one [N, R] is contiguous, a factor may lie either way.

Legend: N rows, C columns of the wide matrix, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._policy import faster
from tinyllava_fast.ops.gemm import product

ROWS = 512
"""Rows that are masked at a time for torch's product: the copy stays in the cache."""


class Mask(NamedTuple):
    """The elements of the wide matrix that stay: those whose hash of this seed reaches the threshold; 0 keeps all."""

    seed: int = 0
    threshold: int = 0


WHOLE = Mask()


def in_one_pass(rank: int, wide: Tensor) -> bool:
    """Return whether the C++ kernels do products of this rank with this wide matrix."""
    return faster("lora_linear", wide, rank=rank, columns=wide.shape[1])


def down(x: Tensor, factor: Tensor, scale: float, mask: Mask = WHOLE) -> Tensor:
    """scale (mask x) factor: x [N, C], factor [C, R] -> [N, R]."""
    (rows, columns), rank = x.shape, factor.shape[1]
    out = x.new_empty((rows, rank))
    if in_one_pass(rank, x):
        (lies, turned), scratch = _lies(factor), _scratch(rows, columns, rank)  # held: a pointer alone keeps nothing
        _cpp.extension().lora_down(
            *(x.data_ptr(), x.stride(0), lies.data_ptr(), turned, out.data_ptr(), scratch.data_ptr()),
            *(rows, columns, rank, scale, *mask),
        )
        return out
    if mask.threshold == 0:
        return torch.addmm(out, x, factor, beta=0, alpha=scale, out=out)
    buffer = x.new_empty((min(ROWS, rows), columns))
    for start in range(0, rows, ROWS):
        part = x[start : start + ROWS]
        _drop(part, buffer, start, mask)
        into = out[start : start + ROWS]
        torch.addmm(into, buffer[: len(part)], factor, beta=0, alpha=scale, out=into)
    return out


def up(u: Tensor, factor: Tensor, scale: float, mask: Mask = WHOLE) -> Tensor:
    """mask (scale u factor): u [N, R], factor [R, C] -> [N, C]. torch's product: it is for something to be added to."""
    out = _cpp.empty(u.shape[0], factor.shape[1], dtype=u.dtype)
    torch.addmm(out, u, factor, beta=0, alpha=scale, out=out)
    if mask.threshold > 0:
        _drop(out, out, 0, mask)
    return out


def add_up(u: Tensor, factor: Tensor, scale: float, into: Tensor, mask: Mask = WHOLE) -> None:
    """into [N, C] += mask (scale u factor): u [N, R], factor [R, C]; into is contiguous."""
    (rows, rank), columns = u.shape, factor.shape[1]
    if in_one_pass(rank, into):
        (lies, turned), scratch = _lies(factor), _scratch(rows, columns, rank)
        _cpp.extension().lora_up(
            *(u.data_ptr(), lies.data_ptr(), turned, into.data_ptr(), scratch.data_ptr()),
            *(rows, columns, rank, scale, *mask),
        )
    elif mask.threshold == 0:
        into.addmm_(u, factor, alpha=scale)
    else:
        into += up(u, factor, scale, mask)


def grad(left: Tensor, right: Tensor, scale: float, mask: Mask = WHOLE, *, turned: bool = False) -> Tensor:
    """scale leftᵀ (mask right): left [N, R], right [N, C] -> [R, C], or turned [C, R], which is contiguous too."""
    (rows, rank), columns = left.shape, right.shape[1]
    out = right.new_empty((columns, rank) if turned else (rank, columns))
    if in_one_pass(rank, right):
        scratch = _scratch(rows, columns, rank)
        _cpp.extension().lora_grad(
            *(left.data_ptr(), right.data_ptr(), right.stride(0), out.data_ptr(), int(turned), scratch.data_ptr()),
            *(rows, columns, rank, scale, *mask),
        )
        return out
    kept = right
    if mask.threshold > 0:
        kept = _cpp.empty(*right.shape, dtype=right.dtype)
        _drop(right, kept, 0, mask)
    made = product(left.t(), kept)  # the narrow one is transposed
    return torch.mul(made.t() if turned else made, scale, out=out)


def _lies(factor: Tensor) -> tuple[Tensor, int]:
    """The contiguous factor or its transpose, and whether it is the latter."""
    return (factor.t().contiguous(), 1) if factor.stride(0) == 1 else (factor.contiguous(), 0)


def _scratch(rows: int, columns: int, rank: int) -> Tensor:
    return _cpp.scratch(_cpp.extension().lora_scratch(rows, columns, rank))


def _drop(source: Tensor, target: Tensor, row: int, mask: Mask) -> None:
    """target = mask * source [n, C], which begins at this row of the wide matrix and may be the target."""
    _cpp.extension().dropout_copy(
        *(source.data_ptr(), source.stride(0), target.data_ptr(), target.stride(0), *source.shape, row),
        *(*mask, _cpp.DTYPE_CODES[source.dtype]),
    )
