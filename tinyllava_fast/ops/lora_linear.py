"""A linear layer and its low-rank adapter (LoRA, arXiv 2106.09685) as one op.

    m = mask(seed) of x's shape, 0 with probability p            s = scale / (1 - p)
    u = (m x) Aᵀ          y = x Wᵀ + bias + s u Bᵀ
    v = s dy B            dx = dy W + m (v A)        dA = vᵀ (m x)        dB = s dyᵀ u        dW = dyᵀ x

The mask is a hash of (seed, row, column), made anew in the backward pass, never stored. W is dense or NF4.
Legend: N rows, K inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._lora_products import WHOLE, Mask, add_up, down, in_one_pass, up
from tinyllava_fast.ops._lora_products import grad as narrow_grad
from tinyllava_fast.ops._lora_samples import samples
from tinyllava_fast.ops._op import Context, define_op
from tinyllava_fast.ops.gemm import product
from tinyllava_fast.ops.nf4 import NF4, check_nf4, dense, multiply, multiply_transposed

_LOW = 0xFFFFFFFF
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, weight, bias, a and b."""


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale (dropout(x) Aᵀ) Bᵀ.

    x: [..., K] float. weight: [O, K] of x's dtype, or NF4. bias: [O]. a: [R, K]. b: [O, R]. All of x's dtype. scale:
    alpha / R in peft's terms. dropout_p: 0 <= p < 1, for the adapter's input alone; 0 outside training. seed: [] int64
    on x's device; the same seed gives the same mask on every backend. None: drawn from torch's generator where p > 0.
    Returns [..., O]. Differentiable in x, a, b, bias and a dense weight, each computed only where it is required.
    Raises ValueError for shapes, dtypes and p.
    """
    if dropout_p > 0 and seed is None:
        seed = torch.randint(1 << 62, (), device=x.device)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    base: tuple[Tensor | None, Tensor | None, Tensor | None, int]
    if isinstance(weight, NF4):
        base = (None, weight.packed, weight.absmax, weight.blocksize)
    else:
        base = (weight, None, None, 0)
    y = lora_linear_fwd.op(flat, *base, bias, a, b, float(scale), float(dropout_p), seed)[0]
    return y.view(*x.shape[:-1], b.shape[0])


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """[rows, columns] bool, True where an element stays; int64 arithmetic whose low 32 bits are those of the C++."""
    low, high = seed & _LOW, (seed >> 32) & _LOW
    row = torch.arange(rows, device=seed.device)[:, None]
    first = _mix(row ^ low)
    second = _mix((first + high + 0x9E3779B9) & _LOW)
    h = torch.arange(columns, device=seed.device) ^ first
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _LOW
    h = (((h ^ (h >> 15)) + second) * 0x846CA68B) & _LOW
    return (h ^ (h >> 16)) >= dropout_threshold(p)


def _mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _LOW
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _LOW
    return h ^ (h >> 16)


def dropout_threshold(p: float) -> int:
    """Return the number that an element's 32-bit hash must reach for it to stay."""
    return min(_LOW, round(p * (1 << 32)))


def _mask(p: float, seed: Tensor | None) -> Mask:
    return WHOLE if seed is None or p == 0 else Mask(int(seed), dropout_threshold(p))


def _masked(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None or p == 0 else x * dropout_mask(seed, x.shape[0], x.shape[1], p)


class Forward(NamedTuple):
    """The arguments of lora_linear_fwd."""

    x: Tensor
    weight: Tensor | None
    packed: Tensor | None
    absmax: Tensor | None
    blocksize: int
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    p: float
    seed: Tensor | None


class Backward(NamedTuple):
    """The arguments of lora_linear_bwd."""

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    packed: Tensor | None
    absmax: Tensor | None
    blocksize: int
    a: Tensor
    b: Tensor
    u: Tensor
    scale: float
    p: float
    seed: Tensor | None
    want: list[bool]


def _check_common(given: Forward | Backward) -> None:
    op, x, a, b, weight, seed = "lora_linear", given.x, given.a, given.b, given.weight, given.seed
    expect(op, "x", x, "N K", FLOATS)
    expect(op, "a", a, "R K", (x.dtype,), like=x)
    expect(op, "b", b, "O R", (x.dtype,), like=x)
    if a.shape[1] != x.shape[1] or b.shape[1] != a.shape[0]:
        raise ValueError(f"{op}: x {list(x.shape)}, a {list(a.shape)} and b {list(b.shape)} do not multiply")
    if weight is not None:
        expect(op, "weight", weight, "O K", (x.dtype,), like=x)
        if weight.shape[0] != b.shape[0] or weight.shape[1] != x.shape[1]:
            raise ValueError(f"{op}: weight is {list(weight.shape)}, the adapter is for {[b.shape[0], a.shape[1]]}")
    elif given.packed is None or given.absmax is None:
        raise ValueError(f"{op}: give a dense weight or an NF4 one")
    else:
        expect(op, "packed", given.packed, "P", (torch.uint8,), like=x)
        check_nf4(op, stored_nf4(given))
    if not 0 <= given.p < 1:
        raise ValueError(f"{op}: dropout_p must be at least 0 and below 1, got {given.p}")
    if given.p > 0 and seed is None:
        raise ValueError(f"{op}: dropout_p is {given.p} and there is no seed")
    if seed is not None and (seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != x.device):
        raise ValueError(f"{op}: seed must be one int64 number on {x.device}, got {seed.dtype} {list(seed.shape)}")


def stored_nf4(given: Forward | Backward) -> NF4:
    """Return the weight where it is not a dense one."""
    assert given.packed is not None and given.absmax is not None  # noqa: S101 the check has seen them
    return NF4(given.packed, given.absmax, (given.b.shape[0], given.x.shape[1]), given.blocksize)


def _check(*args: object) -> None:
    given = Forward._make(args)
    _check_common(given)
    if given.bias is not None:
        expect("lora_linear", "bias", given.bias, "O", (given.x.dtype,), like=given.x)
        if given.bias.shape[0] != given.b.shape[0]:
            raise ValueError(
                f"lora_linear: bias has {given.bias.shape[0]} entries, the weight has {given.b.shape[0]} rows"
            )


def _fake(*args: object) -> tuple[Tensor, Tensor]:
    x, a, b = (given := Forward._make(args)).x, given.a, given.b
    return x.new_empty((x.shape[0], b.shape[0])), x.new_empty((x.shape[0], a.shape[0]))


def _cpp_fwd(*args: object) -> tuple[Tensor, Tensor]:
    given = Forward._make(args)
    x, b, bias, weight = _cpp.unit_stride(given.x), given.b, given.bias, given.weight
    u = down(x, given.a.t(), 1.0, _mask(given.p, given.seed))
    if weight is None:
        y = multiply(x, stored_nf4(given), bias)
    else:
        y = _cpp.empty(len(x), len(b), dtype=x.dtype)
        torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)
    add_up(u, b.t(), given.scale / (1 - given.p), y)
    return y, u


@define_op(
    module="lora_linear",
    check=_check,
    fake=_fake,
    cpp=_cpp_fwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
    samples=samples,
)
def lora_linear_fwd(
    x: Tensor,
    weight: Tensor | None,
    packed: Tensor | None,
    absmax: Tensor | None,
    blocksize: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [N, O], u [N, R]); see lora_linear(). Give weight, or packed, absmax and blocksize."""
    w = _whole(Forward(x, weight, packed, absmax, blocksize, bias, a, b, scale, p, seed))
    u = functional.linear(_masked(x, p, seed), a)
    return functional.linear(x, w, bias) + functional.linear(u, b) * (scale / (1 - p)), u


def _whole(given: Forward | Backward) -> Tensor:
    return dense(stored_nf4(given), given.x.dtype) if given.weight is None else given.weight


def _check_bwd(*args: object) -> None:
    given = Backward._make(args)
    _check_common(given)
    grad, x, b = given.grad, given.x, given.b
    expect("lora_linear", "grad", grad, "N O", (x.dtype,), like=x)
    if grad.shape[0] != x.shape[0] or grad.shape[1] != b.shape[0]:
        raise ValueError(f"lora_linear: grad is {list(grad.shape)}, expected {[x.shape[0], b.shape[0]]}")


def empty_gradients(given: Backward) -> Gradients:
    """Return room for the gradients; the unwanted have no rows."""
    x, a, b = given.x, given.a, given.b
    shapes = (x.shape, (b.shape[0], x.shape[1]), (b.shape[0],), a.shape, b.shape)
    made = [x.new_empty(shape if want else (0, *shape[1:])) for shape, want in zip(shapes, given.want, strict=True)]
    return made[0], made[1], made[2], made[3], made[4]


def _cpp_bwd(*args: object) -> Gradients:
    given = Backward._make(args)
    x, grad, b = _cpp.unit_stride(given.x), _cpp.unit_stride(given.grad), given.b
    u, want, factor, mask = given.u, given.want, given.scale / (1 - given.p), _mask(given.p, given.seed)
    dx, dw, dbias, da, db = empty_gradients(given._replace(want=[False] * 5))
    v = down(grad, b, factor) if want[0] or want[3] else u
    if want[0]:
        dx = _cpp_dx(given._replace(x=x, grad=grad), v, mask)
    if want[1]:
        dw = product(grad.t(), x)
    if want[2]:
        dbias = grad.sum(0)
    if want[3]:
        da = narrow_grad(v, x, 1.0, mask)
    if want[4]:
        db = narrow_grad(u, grad, factor, turned=True)
    return dx, dw, dbias, da, db


def _cpp_dx(given: Backward, v: Tensor, mask: Mask) -> Tensor:
    """Return dy W + m (v A).

    The kernel adds the adapter's share to W's product and masks on the way; torch's product adds to the share, which is
    masked first.
    """
    x, grad, a, weight = given.x, given.grad, given.a, given.weight
    share = None if in_one_pass(len(a), x) else up(v, a, 1.0, mask)
    if weight is None:
        dx = multiply_transposed(grad, stored_nf4(given), into=share)
    elif share is None:
        dx = torch.mm(grad, weight, out=_cpp.empty(*x.shape, dtype=x.dtype))
    else:
        dx = share.addmm_(grad, weight)
    if share is None:
        add_up(v, a, 1.0, dx, mask)
    return dx


@define_op(
    module="lora_linear",
    check=_check_bwd,
    fake=lambda *args: empty_gradients(Backward._make(args)),
    cpp=_cpp_bwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
)
def lora_linear_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    packed: Tensor | None,
    absmax: Tensor | None,
    blocksize: int,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    want: list[bool],
) -> Gradients:
    """Gradients of x, weight, bias, a and b; the unwanted of these five have no rows."""
    given = Backward(grad, x, weight, packed, absmax, blocksize, a, b, u, scale, p, seed, want)
    factor = scale / (1 - p)
    dx, dw, dbias, da, db = empty_gradients(given)
    v = (grad @ b) * factor
    if want[0]:
        dx = grad @ _whole(given) + _masked(v @ a, p, seed)
    if want[1]:
        dw = grad.t() @ x
    if want[2]:
        dbias = grad.sum(0)
    if want[3]:
        da = v.t() @ _masked(x, p, seed)
    if want[4]:
        db = (grad.t() @ u) * factor
    return dx, dw, dbias, da, db


def _setup_context(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    given, u = Forward._make(inputs), output[1]
    ctx.save_for_backward(given.x, given.weight, given.packed, given.absmax, given.a, given.b, u, given.seed)
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.settings = given.blocksize, given.scale, given.p


def _backward(ctx: Context, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    x, weight, packed, absmax, a, b, u, seed = ctx.saved_tensors
    blocksize, scale, p = ctx.settings
    need = ctx.needs_input_grad
    want = [need[0], need[1], need[5], need[6], need[7]]
    made = lora_linear_bwd.op(grad, x, weight, packed, absmax, blocksize, a, b, u, scale, p, seed, want)
    dx, dw, dbias, da, db = (g if wanted else None for g, wanted in zip(made, want, strict=True))
    return dx, dw, None, None, None, dbias, da, db, None, None, None


lora_linear_fwd.op.register_autograd(_backward, setup_context=_setup_context)
