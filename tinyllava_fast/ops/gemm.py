"""The products of a linear layer in training, left right + bias: x Wᵀ forward, dy W and dyᵀ x backward.

On a CPU with AMX torch multiplies by a transposed left factor, as every weight gradient has it, at half its speed. The
C++ kernel lays the factors out as tiles whichever way they lie. train/graph_passes.py puts the op into compiled graphs.

Legend: M rows, N columns, K depth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op
from tinyllava_fast.ops._policy import faster

OP = "gemm"


def _check(left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    expect(OP, "left", left, "M K", FLOATS)
    expect(OP, "right", right, "K N", (left.dtype,), like=left)
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"{OP}: left has {left.shape[1]} columns, right has {right.shape[0]} rows")
    if bias is not None:
        expect(OP, "bias", bias, "N", (left.dtype,), like=left)
        if bias.shape[0] != right.shape[1]:
            raise ValueError(f"{OP}: bias has {bias.shape[0]} entries, right has {right.shape[1]} columns")


def pays(left: Tensor, right: Tensor) -> bool:
    """Return whether the kernel beats torch's product of these factors; the elements of a line have to be adjacent."""
    (rows, depth), columns = left.shape, right.shape[1]
    lie = all(1 in factor.stride() for factor in (left, right))
    return lie and faster("gemm", left, rows=rows, columns=columns, depth=depth, work=rows * columns * depth)


def _turned(factor: Tensor) -> tuple[Tensor, bool]:
    """The factor, or a copy, with its rows or its columns in one piece each; whether it is the columns."""
    if factor.stride(1) != 1 and factor.stride(0) == 1:
        return factor.t(), True
    return _cpp.unit_stride(factor), False


def _run_cpp(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    (rows, depth), columns = left.shape, right.shape[1]
    if left.dtype != torch.bfloat16 or not _cpp.has_tiles() or rows * columns * depth == 0:
        return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)
    out = left.new_empty((rows, columns))
    (a, a_turned), (b, b_turned) = _turned(left), _turned(right)
    bias = None if bias is None else bias.contiguous()
    threads, extension = torch.get_num_threads(), _cpp.extension()
    # held: a pointer alone keeps nothing
    scratch = _cpp.scratch(extension.gemm_scratch(rows, columns, depth, int(a_turned), threads))
    extension.gemm_tiles(
        *(a.data_ptr(), a.stride(0), int(a_turned), b.data_ptr(), b.stride(0), int(b_turned)),
        *(0 if bias is None else bias.data_ptr(), out.data_ptr(), scratch.data_ptr()),
        *(rows, columns, depth, threads),
    )
    return out


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, m: int, k: int, n: int, *, turned: tuple[bool, bool], bias: bool = False) -> Sample:
        def factor(rows: int, columns: int, turn: bool) -> Tensor:
            if turn:
                return factor(columns, rows, False).t()
            return torch.randn(rows, 2 * columns, generator=g)[:, :columns]  # among other columns

        shift = torch.randn(n, generator=g) if bias else None
        args = (factor(m, k, turned[0]), factor(k, n, turned[1]), shift)
        return Sample(args, f"{label}{', left turned' * turned[0]}{', right turned' * turned[1]}", differentiable=False)

    for turned in ((False, True), (False, False), (True, False), (True, True)):
        yield case("one panel", 32, 64, 32, turned=turned)
        yield case("ragged", 70, 99, 41, turned=turned, bias=True)
    yield case("pieces of the depth", 65, 1300, 150, turned=(False, True), bias=True)
    yield case("sums of several depths", 80, 1300, 40, turned=(True, False))
    yield case("blocks of columns", 40, 300, 1300, turned=(True, False))
    yield case("the whole depth is too deep", 33, 5300, 200, turned=(False, False), bias=True)
    yield case("one row", 1, 5, 64, turned=(False, True))
    yield case("one column", 70, 1, 1, turned=(True, False))
    yield case("no depth", 8, 0, 16, turned=(False, False), bias=True)
    yield case("no row", 0, 8, 16, turned=(False, True))


@define_op(
    module=OP,
    check=_check,
    fake=lambda left, right, bias: left.new_empty((left.shape[0], right.shape[1])),
    cpp=_run_cpp,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=lambda *_: "torch's own product is used on a GPU",
    samples=_samples,
)
def gemm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """left [M, K] right [K, N] + bias [N], of one float dtype -> [M, N]. It has no gradient: it comes after them."""
    y = left @ right
    return y if bias is None else y + bias


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] right [K, N] without gradient, by whichever is fastest: for the backward passes of other ops."""
    if pays(left, right):
        return gemm.infer(left, right, None)
    if left.stride(1) != 1 and faster("transpose", left):
        left = transposed(left.t())
    return left @ right


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous copy of matrix.t(), bfloat16 on a CPU, three times as fast as torch's."""
    if matrix.stride(0) == 1:
        return matrix.t().contiguous()
    matrix = _cpp.unit_stride(matrix)
    out = _cpp.empty(matrix.shape[1], matrix.shape[0], dtype=matrix.dtype)
    _cpp.extension().transpose(matrix.data_ptr(), matrix.stride(0), out.data_ptr(), *matrix.shape)
    return out
