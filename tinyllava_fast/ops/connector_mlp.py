"""Two linear layers with an activation between them, LLaVA's connector, as one op that keeps only its input.

    h = x W1ᵀ + b1              a = f(h)            y = a W2ᵀ + b2
    dh = (dy W2) f'(h)          dx = dh W1          dW1 = dhᵀ x     dW2 = dyᵀ a     db1, db2 = column sums of dh, dy

h and a are made anew in the backward pass: one product more, and of what autograd would keep, [N, K] for x and [N, D]
for each of h and a, only x is left. Products by a transposed left side run at half speed in torch on a CPU with AMX, so
the C++ pass that makes dh writes it transposed, and dy is transposed ahead. At widths of 2,048 that pays for
the product more, at 576 not quite (docs/LOG.md).
Legend: N rows, K inputs, D hidden, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.errors import nearest
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op

OP = "connector_mlp"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
"""By name, in the order of their numbers in C++."""
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
    "silu": torch.ops.aten.silu_,
}
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, h: torch.ops.aten.threshold_backward(grad, h, 0),
    "silu": torch.ops.aten.silu_backward,
}
"""(da, h) to da f'(h)."""


def connector_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """f(x W1ᵀ + b1) W2ᵀ + b2.

    x: [..., K] float. w1: [D, K]. b1: [D]. w2: [O, D]. b2: [O]. All of x's dtype. activation: gelu (the erf form),
    gelu_tanh, relu or silu. Returns [..., O]. Differentiable in all tensors, each gradient computed only where it is
    required. Raises ValueError for shapes, dtypes and an unknown activation.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return connector_mlp_fwd.op(flat, w1, b1, w2, b2, activation).view(*x.shape[:-1], w2.shape[0])


def _check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> None:
    expect(OP, "x", x, "N K", FLOATS)
    expect(OP, "w1", w1, "D K", (x.dtype,), like=x)
    expect(OP, "w2", w2, "O D", (x.dtype,), like=x)
    if w1.shape[1] != x.shape[1] or w2.shape[1] != w1.shape[0]:
        raise ValueError(f"{OP}: x {list(x.shape)}, w1 {list(w1.shape)} and w2 {list(w2.shape)} do not multiply")
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None:
            expect(OP, name, bias, "D", (x.dtype,), like=x)
            if bias.shape[0] != weight.shape[0]:
                raise ValueError(f"{OP}: {name} has {bias.shape[0]} entries, its weight has {weight.shape[0]} rows")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation {activation!r}; {nearest(activation, ACTIVATIONS)}")


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, n: int, k: int, d: int, o: int, activation: str, *, biases: bool = True) -> Sample:
        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g)

        x = randn(k, n).t() if n % 2 else randn(n, k)
        b1, b2 = (randn(d), randn(o)) if biases else (None, None)
        return Sample((x, randn(d, k) / k**0.5, b1, randn(o, d), b2, activation), label)

    for activation in ACTIVATIONS:
        yield case(activation, 12, 20, 33, 17, activation)
    yield case("several tiles, ragged", 131, 9, 70, 66, "gelu")
    yield case("no bias", 23, 16, 8, 24, "silu", biases=False)
    yield case("one row", 1, 5, 64, 3, "gelu")
    yield case("no row", 0, 8, 16, 8, "gelu_tanh")


def _activated(x: Tensor, w1: Tensor, b1: Tensor | None, activation: str) -> Tensor:
    """f(x W1ᵀ + b1) [N, D], in place. Whole, not in blocks of rows: each product of a block would pack W1 anew."""
    h = _cpp.empty(len(x), len(w1), dtype=x.dtype)
    torch.mm(x, w1.t(), out=h) if b1 is None else torch.addmm(b1, x, w1.t(), out=h)
    return _IN_PLACE[activation](h)


def _cpp_fwd(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    hidden = _activated(x, w1, b1, activation)
    y = _cpp.empty(len(x), len(w2), dtype=x.dtype)
    return torch.mm(hidden, w2.t(), out=y) if b2 is None else torch.addmm(b2, hidden, w2.t(), out=y)


@define_op(
    module=OP,
    check=_check,
    fake=lambda x, w1, b1, w2, b2, activation: x.new_empty((x.shape[0], w2.shape[0])),
    cpp=_cpp_fwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
    samples=_samples,
)
def connector_mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> Tensor:
    """[N, O]; see connector_mlp()."""
    return functional.linear(ACTIVATIONS[activation](functional.linear(x, w1, b1)), w2, b2)


def _check_bwd(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, want: list[bool]
) -> None:
    _check(x, w1, b1, w2, None, activation)
    expect(OP, "grad", grad, "N O", (x.dtype,), like=x)
    if grad.shape[0] != x.shape[0] or grad.shape[1] != w2.shape[0]:
        raise ValueError(f"{OP}: grad is {list(grad.shape)}, expected {[x.shape[0], w2.shape[0]]}")


def fake_bwd(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, want: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of x, w1, b1, w2, b2; the unwanted have no rows."""
    shapes = (x.shape, w1.shape, (w1.shape[0],), w2.shape, (w2.shape[0],))
    made = [x.new_empty(shape if wanted else (0, *shape[1:])) for shape, wanted in zip(shapes, want, strict=True)]
    return made[0], made[1], made[2], made[3], made[4]


def _cpp_bwd(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, want: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dw1, db1, dw2, db2 = fake_bwd(grad, x, w1, b1, w2, activation, want)
    if want[3] or want[4]:
        grad_t = _cpp.transposed(grad)
    if want[4]:
        torch.sum(grad_t, 1, out=db2)
    if not any(want[:4]):
        return dx, dw1, db1, dw2, db2
    rows, hidden = len(x), len(w1)
    if not any(want[:3]):
        a = _activated(x, w1, b1, activation)
    else:
        a = torch.mm(x, w1.t(), out=_cpp.empty(rows, hidden, dtype=x.dtype))  # h, until the pass below
        dh = torch.mm(grad, w2, out=_cpp.empty(rows, hidden, dtype=x.dtype))
        dh_t = _cpp.empty(hidden, rows, dtype=x.dtype) if want[1] or want[2] else None
        bias = None if b1 is None else b1.contiguous()
        _cpp.extension().bias_activation_bwd(
            *(a.data_ptr(), 0 if bias is None else bias.data_ptr(), dh.data_ptr()),
            *(0 if dh_t is None else dh_t.data_ptr(), rows, hidden),
            *(list(ACTIVATIONS).index(activation), _cpp.DTYPE_CODES[x.dtype]),
        )
        if want[0]:
            torch.mm(dh, w1, out=dx)
        if dh_t is not None and want[1]:
            torch.mm(dh_t, x, out=dw1)
        if dh_t is not None and want[2]:
            torch.sum(dh_t, 1, out=db1)
    if want[3]:
        torch.mm(grad_t, a, out=dw2)
    return dx, dw1, db1, dw2, db2


@define_op(
    module=OP,
    check=_check_bwd,
    fake=fake_bwd,
    cpp=_cpp_bwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
)
def connector_mlp_bwd(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, want: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2; the unwanted of these five have no rows."""
    dx, dw1, db1, dw2, db2 = fake_bwd(grad, x, w1, b1, w2, activation, want)
    h = functional.linear(x, w1, b1)
    dh = _SLOPES[activation](grad @ w2, h)
    if want[0]:
        dx = dh @ w1
    if want[1]:
        dw1 = dh.t() @ x
    if want[2]:
        db1 = dh.sum(0)
    if want[3]:
        dw2 = grad.t() @ ACTIVATIONS[activation](h)
    if want[4]:
        db2 = grad.sum(0)
    return dx, dw1, db1, dw2, db2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.activation = inputs[5]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want = list(ctx.needs_input_grad[:5])
    made = connector_mlp_bwd.op(grad, *ctx.saved_tensors, ctx.activation, want)
    return *(d if wanted else None for d, wanted in zip(made, want, strict=True)), None


connector_mlp_fwd.op.register_autograd(_backward, setup_context=_setup_context)
