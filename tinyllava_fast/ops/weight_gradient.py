"""The gradient of a linear layer's weight, dW = dyᵀ x: the product that torch runs at half speed on a CPU with AMX.

Its left factor lies transposed. The C++ kernel turns it on the way into tiles; without them, and where there are fewer
outputs than inputs, a copy is turned ahead.
train/graph_passes.py puts the op into compiled graphs.
Legend: N rows, O outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op

OP = "weight_gradient"


def _check(grad: Tensor, x: Tensor) -> None:
    expect(OP, "grad", grad, "N O", FLOATS)
    expect(OP, "x", x, "N K", (grad.dtype,), like=grad)
    if grad.shape[0] != x.shape[0]:
        raise ValueError(f"{OP}: grad has {grad.shape[0]} rows, x has {x.shape[0]}")


def pays(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the CPU kernel beats torch's product by a transposed left side, for plain row-major factors."""
    return (
        dtype == torch.bfloat16
        and min(rows, outputs, inputs) >= 64
        and rows * outputs * inputs >= 1 << 24
        and _cpp.load()[0] is not None
        and _cpp.extension().weight_gradient_scratch(rows, outputs, inputs, 1) > 0
    )


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, n: int, o: int, k: int) -> Sample:
        def rows(width: int) -> Tensor:
            return torch.randn(n, 2 * width, generator=g)[:, :width]  # among other columns

        return Sample((rows(o), rows(k)), label, differentiable=False)

    yield case("one panel", 32, 32, 32)
    yield case("ragged", 99, 70, 41)
    yield case("more inputs than outputs", 99, 41, 70)
    yield case("several sums", 1300, 65, 40)
    yield case("blocks of inputs", 300, 1300, 1300)
    yield case("one row", 1, 64, 5)
    yield case("one column", 70, 1, 1)
    yield case("no row", 0, 8, 16)


def _run_cpp(grad: Tensor, x: Tensor) -> Tensor:
    (rows, outputs), inputs = grad.shape, x.shape[1]
    out = x.new_empty((outputs, inputs))
    threads, extension = torch.get_num_threads(), _cpp.extension()
    needed = extension.weight_gradient_scratch(rows, outputs, inputs, threads) if rows * outputs * inputs else 0
    if grad.dtype != torch.bfloat16 or outputs < inputs or not needed:
        return torch.mm(_cpp.transposed(grad), x, out=out)
    grad, x = _cpp.unit_stride(grad), _cpp.unit_stride(x)
    scratch = _cpp.scratch(needed)  # held: a pointer alone keeps nothing
    extension.weight_gradient_tiles(
        *(grad.data_ptr(), grad.stride(0), x.data_ptr(), x.stride(0), out.data_ptr()),
        *(scratch.data_ptr(), rows, outputs, inputs, threads),
    )
    return out


@define_op(
    module=OP,
    check=_check,
    fake=lambda grad, x: x.new_empty((grad.shape[1], x.shape[1])),
    cpp=_run_cpp,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=lambda *_: "torch's own product is used on a GPU",
    samples=_samples,
)
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x: grad [N, O], x [N, K] of one float dtype -> [O, K]. No gradient of its own: it is one."""
    return grad.t() @ x
