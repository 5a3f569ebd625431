"""Two linear layers with an activation between them, LLaVA's connector, as one op that keeps only its input.

    h = x W1ᵀ + b1              a = f(h)            y = a W2ᵀ + b2
    dh = (dy W2) f'(h)          dx = dh W1          dW1 = dhᵀ x     dW2 = dyᵀ a     db1, db2 = column sums of dh, dy

h and a are made anew in the backward pass: one product more, and of what autograd would keep, [N, K] for x and [N, D]
for each of h and a, only x is left. On a CPU with AMX gemm earns that product back.
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
from tinyllava_fast.ops.gemm import product

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
    return connector_mlp_fwd.call(flat, w1, b1, w2, b2, activation).view(*x.shape[:-1], w2.shape[0])


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


def _hidden(x: Tensor, w1: Tensor, b1: Tensor | None, room: Tensor) -> Tensor:
    """x W1ᵀ + b1 [N, D] in the room. Whole, not in blocks of rows: each product of a block would pack W1 anew."""
    return torch.mm(x, w1.t(), out=room) if b1 is None else torch.addmm(b1, x, w1.t(), out=room)


def _rooms(count: int, x: Tensor, w1: Tensor) -> list[Tensor]:
    """[N, D] each, until the next call: faults of fresh pages cost as much as a quarter of a product (docs/LOG.md)."""
    rows, hidden = len(x), len(w1)
    return list(_cpp.scratch(count * rows * hidden * x.itemsize, OP).view(x.dtype).view(count, rows, hidden))


def _cpp_fwd(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    a = _IN_PLACE[activation](functional.linear(x, w1, b1))
    return functional.linear(a, w2, b2)


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
    dx, dw1, db1, dw2, db2 = fake_bwd(grad, x, w1, b1, w2, activation, [False] * 5)
    if want[4]:
        db2 = grad.sum(0)
    if not any(want[:4]):
        return dx, dw1, db1, dw2, db2
    if any(want[:3]):
        a, dh = _rooms(2, x, w1)  # h and da, until the pass below
        _hidden(x, w1, b1, a)
        torch.mm(grad, w2, out=dh)
        _cpp.extension().activation_bwd(
            *(a.data_ptr(), dh.data_ptr(), a.numel(), list(ACTIVATIONS).index(activation), _cpp.DTYPE_CODES[x.dtype])
        )
        if want[0]:
            dx = product(dh, w1)
        if want[1]:
            dw1 = product(dh.t(), x)
        if want[2]:
            db1 = dh.sum(0)
    else:
        a = _IN_PLACE[activation](_hidden(x, w1, b1, *_rooms(1, x, w1)))
    if want[3]:
        dw2 = product(grad.t(), a)
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
