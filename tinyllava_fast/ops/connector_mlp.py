"""Two linear layers with an activation between them, LLaVA's connector, as one op that keeps half as much.

    h = x W1ᵀ + b1              a = f(h)            y = a W2ᵀ + b2
    dh = (dy W2) f'(h)          dx = dh W1          dW1 = dhᵀ x     dW2 = dyᵀ a     db1, db2 = column sums of dh, dy

Autograd would keep h and a, [N, D] each. Here a is made anew by the pass over h that its gradient needs anyway. h is
kept: without it the backward pass has a product more, a fifth of its time where products are all that takes any.
Legend: N rows, K inputs, D hidden, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.errors import nearest
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Context, Sample, define_op
from tinyllava_fast.ops.gemm import product

OP = "connector_mlp"
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, w1, b1, w2 and b2."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
"""By name, in the order of their numbers in C++."""
_INTO: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.ops.aten.gelu.out,
    "gelu_tanh": partial(torch.ops.aten.gelu.out, approximate="tanh"),
    "relu": torch.ops.aten.relu.out,
    "silu": torch.ops.aten.silu.out,
}
"""h and out= to f(h)."""
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
    return connector_mlp_fwd.call(flat, w1, b1, w2, b2, activation)[0].view(*x.shape[:-1], w2.shape[0])


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


def _rooms(count: int, h: Tensor) -> list[Tensor]:
    """Return buffers of h's shape, which the next call reuses: faults of fresh pages cost a quarter of a product."""
    return list(_cpp.scratch(count * h.nbytes, OP).view(h.dtype).view(count, *h.shape))


def _cpp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    h = functional.linear(x, w1, b1)  # whole, not in blocks of rows: each product of a block would pack W1 anew
    return functional.linear(_INTO[activation](h, out=_rooms(1, h)[0]), w2, b2), h


@define_op(
    module=OP,
    check=_check,
    fake=lambda x, w1, b1, w2, b2, activation: (x.new_empty((len(x), len(w2))), x.new_empty((len(x), len(w1)))),
    cpp=_cpp_fwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
    samples=_samples,
)
def connector_mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """y [N, O] and h [N, D]; see connector_mlp()."""
    h = functional.linear(x, w1, b1)
    return functional.linear(ACTIVATIONS[activation](h), w2, b2), h


def _check_bwd(grad: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, activation: str, want: list[bool]) -> None:
    _check(x, w1, None, w2, None, activation)
    for name, tensor, columns in (("grad", grad, len(w2)), ("h", h, len(w1))):
        expect(OP, name, tensor, "N O", (x.dtype,), like=x)
        if tensor.shape != (len(x), columns):
            raise ValueError(f"{OP}: {name} is {list(tensor.shape)}, expected {[len(x), columns]}")


def fake_bwd(grad: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, kind: str, want: list[bool]) -> Gradients:
    """Return empty gradients; the unwanted have no rows."""
    shapes = (x.shape, w1.shape, (w1.shape[0],), w2.shape, (w2.shape[0],))
    made = [x.new_empty(shape if wanted else (0, *shape[1:])) for shape, wanted in zip(shapes, want, strict=True)]
    return made[0], made[1], made[2], made[3], made[4]


def _cpp_bwd(
    grad: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, activation: str, want: list[bool]
) -> Gradients:
    dx, dw1, db1, dw2, db2 = fake_bwd(grad, x, h, w1, w2, activation, [False] * 5)
    h = h.contiguous()
    if want[4]:
        db2 = grad.sum(0)
    if any(want[:3]):
        a, dh = _rooms(2, h)
        torch.mm(grad, w2, out=dh)
        _cpp.extension().activation_bwd(
            *(h.data_ptr(), a.data_ptr(), dh.data_ptr(), h.numel()),
            *(list(ACTIVATIONS).index(activation), _cpp.DTYPE_CODES[h.dtype]),
        )
        if want[0]:
            dx = product(dh, w1)
        if want[1]:
            dw1 = product(dh.t(), x)
        if want[2]:
            db1 = dh.sum(0)
    elif want[3]:
        a = _INTO[activation](h, out=_rooms(1, h)[0])
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
    grad: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor, activation: str, want: list[bool]
) -> Gradients:
    """Gradients of x, w1, b1, w2 and b2; the unwanted of these five have no rows."""
    dx, dw1, db1, dw2, db2 = fake_bwd(grad, x, h, w1, w2, activation, want)
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


def _setup_context(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, _, *settings = inputs
    ctx.save_for_backward(x, output[1], w1, w2)
    ctx.settings = tuple(settings)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Context, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    want = list(ctx.needs_input_grad[:5])
    made = connector_mlp_bwd.op(grad, *ctx.saved_tensors, *ctx.settings, want)
    return *(d if wanted else None for d, wanted in zip(made, want, strict=True)), None


connector_mlp_fwd.op.register_autograd(_backward, setup_context=_setup_context)
