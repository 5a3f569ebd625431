"""A step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) for one weight, in one pass over memory.

    g  = factor grad                                 factor: what clipping leaves of the gradient
    m  = b1 m + (1 - b1) g                           v = b2 v + (1 - b2) g²
    p  = (1 - lr decay) p  -  lr / (1 - b1ⁿ)  m / (sqrt(v / (1 - b2ⁿ)) + eps)
    weight = p, rounded by dither

Of these, factor, 1 - b1ⁿ and 1 - b2ⁿ are ``scalars``, a tensor on the device: nobody waits there for the gradients'
norm. A factor that is no number stands for a step that is left out: nothing changes.

p, m and v are float32; the gradient has the dtype that it came in, the weight is what the model computes with. In four
passes (a float32 gradient, clipping, the update, the rounding) the same step moves twice the bytes.

Dither: a bfloat16 weight is p rounded up where the fraction that does not fit exceeds a threshold of the element's own,
a hash of its index, and down elsewhere. Rounding to the nearest instead would swallow an update of less than half a
step of the grid until many of them have added up, for every weight that starts on it, as a checkpoint's bfloat16
weights all do. So a tenth of a step moves a tenth of the weights, nothing flickers, no random state is kept, and a p on
the grid is its own weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS
from tinyllava_fast.ops._op import Sample, define_op

CHUNK = 1 << 14
"""Elements whose squares the C++ kernel sums together."""
_PIECE = 1 << 22  # elements whose thresholds are made at once
_WORD = 0xFFFFFFFF


def dither(p: Tensor, weight: Tensor) -> None:
    """Write p, float32, into weight, of its shape; into bfloat16 as above, into another dtype as torch rounds."""
    if (p.dtype, weight.dtype) != (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        weight.copy_(p)
        return
    source, target = p.detach().reshape(-1), weight.detach().view(-1)
    for at in range(0, p.numel(), _PIECE):
        part = source[at : at + _PIECE]
        index = torch.arange(at, at + part.numel(), device=p.device)
        hashed = index * 0x9E3779B1 & _WORD
        hashed = (hashed ^ hashed >> 15) * 0x85EBCA77 & _WORD
        bits = part.view(torch.int32) + (hashed >> 16).to(torch.int32) & -0x10000
        target[at : at + _PIECE] = bits.view(torch.float32)


def step_scalars(factor: float | Tensor, betas: tuple[float, float], step: int | Tensor) -> Tensor:
    """Return the scalars [3] float64 of one step: factor, 1 - b1ⁿ, 1 - b2ⁿ.

    factor: what gradients are multiplied by, nan to leave the step out. step: n, from 1. Either may be a tensor [], on
    whose device the scalars then are.
    """
    given = [one for one in (factor, step) if isinstance(one, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    count = step.double() if isinstance(step, Tensor) else float(step)
    corrections = [_filled(1 - beta**count, device) for beta in betas]
    return torch.stack([_filled(factor, device), *corrections])


def _filled(value: float | Tensor, device: torch.device) -> Tensor:
    return value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


def _check(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    scalars: Tensor,
    *numbers: float,
) -> None:
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("weight", weight), ("grad", grad)):
        if tensor is not None and (tensor.shape != p.shape or tensor.dtype not in FLOATS):
            raise ValueError(
                f"adamw: {name} must be float of p's shape {list(p.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    if not p.dtype == exp_avg.dtype == exp_avg_sq.dtype:
        raise ValueError(f"adamw: p is {p.dtype}, its moments are {exp_avg.dtype} and {exp_avg_sq.dtype}")
    if scalars.shape != (3,) or scalars.dtype != torch.float64:
        raise ValueError(f"adamw: scalars must be [3] float64, got {scalars.dtype} {list(scalars.shape)}")


def _supports(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None, *rest: object) -> str | None:
    kinds = (p.dtype, torch.bfloat16 if weight is None else weight.dtype)
    if kinds != (torch.float32, torch.bfloat16):
        return f"its C++ kernel takes float32 masters of bfloat16 weights, got {kinds[0]} and {kinds[1]}"
    if not all(t.is_contiguous() for t in (p, exp_avg, exp_avg_sq, weight) if t is not None):
        return "its C++ kernel takes contiguous weights"
    return None


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, *shape: int, rounds: bool = True, grad: bool = True, factor: float = 1.0) -> Sample:
        p, m, slope = (torch.randn(shape, generator=g) for _ in range(3))
        v = torch.rand(shape, generator=g)
        weight = p.bfloat16() if rounds else None
        if len(shape) == 2 and grad:
            slope = slope.t().contiguous().t()
        scalars = step_scalars(factor, (0.9, 0.95), 3)
        args = (p, m, v, weight, slope if grad else None, scalars, 1e-2, 0.1, 0.9, 0.95, 1e-8)
        return Sample(args, label, differentiable=False, kept=(0, 1, 2, 3, 5))

    yield case("ragged, clipped", 37, 61, factor=0.3)
    yield case("several chunks", 3 * CHUNK + 5)
    yield case("float32 weight", 1030, rounds=False, factor=0.5)
    yield case("no gradient", 7, 9, grad=False)
    yield case("left out", 5, 30, factor=math.nan)
    yield case("one element", 1)
    yield case("no element", 0, 4)


def _run_cpp(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    scalars: Tensor,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    factor, *corrections = scalars.tolist()
    if math.isnan(factor):
        return
    if grad is not None:
        grad = (grad if grad.dtype in (torch.float32, torch.bfloat16) else grad.float()).contiguous()
    _cpp.extension().adamw(
        *(t.data_ptr() if t is not None else 0 for t in (p, m, v, weight, grad)),
        *(p.numel(), _cpp.DTYPE_CODES[grad.dtype if grad is not None else torch.float32]),
        *(factor, lr, 1.0 - lr * weight_decay, beta1, beta2, eps, *corrections),
    )


@define_op(
    module="adamw",
    check=_check,
    fake=lambda *_: None,
    cpp=_run_cpp,
    cpp_supports=_supports,
    samples=_samples,
    mutates=("p", "exp_avg", "exp_avg_sq", "weight"),
)
def adamw(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    grad: Tensor | None,
    scalars: Tensor,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step in place: p and its moments, float32 of one shape, and weight, p in the model's dtype, unless None.

    grad: of any float dtype; None counts as zero. scalars: of ``step_scalars``, on p's device.
    """
    factor, correction1, correction2 = scalars.unbind()
    is_step = ~factor.isnan()
    scale = factor.nan_to_num(0.0).to(p.dtype)
    g = torch.zeros_like(p) if grad is None else grad.to(p.dtype) * scale
    first = exp_avg.lerp(g, 1 - beta1)
    second = (exp_avg_sq * beta2).addcmul_(g, g, value=1 - beta2)
    divisor = second.sqrt().div_(correction2.sqrt().to(p.dtype)).add_(eps)
    moved = p * (1 - lr * weight_decay) - first / divisor * (lr / correction1).to(p.dtype)
    for kept, new in ((exp_avg, first), (exp_avg_sq, second), (p, moved)):
        kept.copy_(torch.where(is_step, new, kept))
    if weight is not None:
        rounded = torch.empty_like(weight)
        dither(p, rounded)
        weight.copy_(torch.where(is_step, rounded, weight))


def _check_sum(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"square_sum: x must be float, got {x.dtype}")


def _sum_samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    for shape in ((5, 7), (CHUNK + 1,), (3, CHUNK + 130), (1,), (0, 3)):
        yield Sample((torch.randn(shape, generator=g) / 100,), f"{list(shape)}", differentiable=False)
    yield Sample((torch.randn(6, 10, generator=g)[:, ::2],), "strided", differentiable=False)


def _sum_cpp(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = torch.empty(-(-x.numel() // CHUNK), dtype=torch.float64)
    _cpp.extension().square_sum(x.data_ptr(), parts.data_ptr(), x.numel(), _cpp.DTYPE_CODES[x.dtype])
    return parts.sum()


@define_op(
    module="adamw",
    check=_check_sum,
    fake=lambda x: x.new_empty((), dtype=torch.float64),
    cpp=_sum_cpp,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    samples=_sum_samples,
)
def square_sum(x: Tensor) -> Tensor:
    """The sum of the squares of x, any shape, as a float64 scalar; the same for every number of threads in C++."""
    return x.double().square().sum()
