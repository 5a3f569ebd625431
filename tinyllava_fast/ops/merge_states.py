"""One attention result from two over disjoint keys, exactly.

    lse = log(exp(lse_a) + exp(lse_b))       wa = exp(lse_a - lse), wb = exp(lse_b - lse)
    out = wa out_a + wb out_b

    backward: d out_a = wa dout              d lse_a = wa (dlse + wb dout . (out_a - out_b))
              d out_b = wb dout              d lse_b = wb (dlse - wa dout . (out_a - out_b))

A side whose lse is -inf (its queries saw nothing) has weight 0; where both are, out is 0 and lse -inf.
Used as in arXiv:2501.01005, section 2.2. Legend: T queries, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect
from tinyllava_fast.ops._op import Sample, define_op

OP = "merge_states"
_CPP_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine what packed_attention returned for the same queries over two disjoint sets of keys.

    out_a, out_b: [T, H, Dh] float, one dtype. lse_a, lse_b: [T, H] float, one dtype, natural logarithm, -inf allowed.
    Returns out [T, H, Dh] of their dtype and lse [T, H] float32 (float64 for float64). Differentiable in all four.
    Raises ValueError for shapes and dtypes.
    """
    return merge_states_fwd.op(out_a, lse_a, out_b, lse_b)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    expect(OP, "out_a", out_a, "T H Dh", FLOATS)
    expect(OP, "out_b", out_b, "T H Dh", (out_a.dtype,), like=out_a)
    expect(OP, "lse_a", lse_a, "T H", FLOATS, like=out_a)
    expect(OP, "lse_b", lse_b, "T H", (lse_a.dtype,), like=out_a)
    for name, tensor, shape in (
        ("out_b", out_b, out_a.shape),
        ("lse_a", lse_a, out_a.shape[:2]),
        ("lse_b", lse_b, out_a.shape[:2]),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{OP}: {name} must be {list(shape)} as out_a has it, got {list(tensor.shape)}")


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, *shape: int, spread: float = 1.0) -> Sample:
        out_a, out_b = torch.randn(2, *shape, generator=g)
        lse_a, lse_b = spread * torch.randn(2, *shape[:2], generator=g)
        return Sample((out_a, lse_a, out_b, lse_b), label)

    yield case("even", 7, 3, 16)
    yield case("one side outweighs the other", 5, 2, 80, spread=30.0)
    yield case("one element", 1, 1, 1)
    yield case("no query", 0, 2, 8)
    yield case("many rows", 70, 4, 20)
    seen, blind = case("", 6, 2, 8).args, torch.tensor([False, True, False, True, True, False])
    out_a, lse_a, out_b, lse_b = seen
    lse_a, lse_b = lse_a.masked_fill(blind[:, None], -torch.inf), lse_b.masked_fill(blind.roll(1)[:, None], -torch.inf)
    yield Sample((out_a, lse_a, out_b, lse_b), "sides that saw nothing", differentiable=False)


def _fake(out_a: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), out_a.new_empty(out_a.shape[:2], dtype=_wide(out_a))


def _weights(lse_a: Tensor, lse_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -torch.inf, 0)
    return torch.exp(lse_a - safe), torch.exp(lse_b - safe), lse


def _cpp_fwd(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _fake(out_a)
    given = [out_a.contiguous(), lse_a.float().contiguous(), out_b.contiguous(), lse_b.float().contiguous()]
    _cpp.extension().merge_states_fwd(
        *(t.data_ptr() for t in (*given, out, lse)), lse.numel(), out.shape[2], _cpp.DTYPE_CODES[out.dtype]
    )
    return out, lse


def _cpp_bwd(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_out_a, d_out_b = out_a.new_empty(out_a.shape), out_a.new_empty(out_a.shape)
    d_lse_a, d_lse_b = (torch.empty(lse_a.shape, dtype=torch.float32) for _ in range(2))
    given = [
        dout.contiguous(),
        None if dlse is None else dlse.contiguous(),
        *(out_a.contiguous(), lse_a.float().contiguous(), out_b.contiguous(), lse_b.float().contiguous()),
    ]
    _cpp.extension().merge_states_bwd(
        *(0 if t is None else t.data_ptr() for t in (*given, d_out_a, d_lse_a, d_out_b, d_lse_b)),
        *(lse_a.numel(), out_a.shape[2], _cpp.DTYPE_CODES[out_a.dtype]),
    )
    return d_out_a, d_lse_a.to(lse_a.dtype), d_out_b, d_lse_b.to(lse_a.dtype)


def _triton_supports(*args: Any) -> str | None:
    doubles = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
    return "its Triton kernel computes in float32, got torch.float64" if doubles else None


@define_op(
    module=OP,
    check=_check,
    fake=_fake,
    cpp=_cpp_fwd,
    cpp_supports=_cpp.runs(*_CPP_TYPES),
    triton_supports=_triton_supports,
    samples=_samples,
)
def merge_states_fwd(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out [T, H, Dh], lse [T, H]); see merge_states()."""
    wa, wb, lse = _weights(lse_a, lse_b, _wide(out_a))
    out = wa[..., None] * out_a + wb[..., None] * out_b
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def _check_bwd(dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    _check(out_a, lse_a, out_b, lse_b)
    for name, tensor, dtype, shape in (
        ("dout", dout, out_a.dtype, out_a.shape),
        ("dlse", dlse, _wide(out_a), out_a.shape[:2]),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
            raise ValueError(f"{OP}_bwd: {name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _fake_bwd(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_a_grad, lse_a_grad = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    return out_a_grad, lse_a_grad, torch.empty_like(out_a_grad), torch.empty_like(lse_a_grad)


@define_op(
    module=OP,
    check=_check_bwd,
    fake=_fake_bwd,
    cpp=_cpp_bwd,
    cpp_supports=_cpp.runs(*_CPP_TYPES),
    triton_supports=_triton_supports,
)
def merge_states_bwd(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b, lse_b, contiguous. dlse None: lse was not used."""
    wide = _wide(out_a)
    wa, wb, _ = _weights(lse_a, lse_b, wide)
    gap = wa * wb * (dout.to(wide) * (out_a.to(wide) - out_b.to(wide))).sum(-1)
    through = torch.zeros_like(gap) if dlse is None else dlse
    grads = (wa[..., None] * dout, wa * through + gap, wb[..., None] * dout, wb * through - gap)
    return (
        grads[0].to(out_a.dtype).contiguous(),
        grads[1].to(lse_a.dtype).contiguous(),
        grads[2].to(out_a.dtype).contiguous(),
        grads[3].to(lse_a.dtype).contiguous(),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, ...]:
    inputs = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(inputs[0])
    return merge_states_bwd.op(dout, dlse, *inputs)


merge_states_fwd.op.register_autograd(_backward, setup_context=_setup_context)
