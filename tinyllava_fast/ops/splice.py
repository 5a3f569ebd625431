"""Text embeddings and image features in one packed buffer.

    out[t]        = weight[input_ids[t]]
    out[slots[r]] = features[r]              slots[r] == T: the row goes nowhere

Legend: T tokens of the pack, V vocabulary, D hidden size, R image rows (images x tokens an image).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinyllava_fast.hardware import keeps_memory
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect, expect_range
from tinyllava_fast.ops._op import Context, Sample, define_op


def splice(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """Embed the tokens and lay the image rows over them.

    input_ids: [T] int64, each in 0..V-1 (image positions too: any valid id, never embedded). weight: [V, D] float.
    features: [R, D] float, cast to weight's dtype. slots: [R] int64, distinct positions in 0..T-1, or T: row dropped.
    Returns [T, D] of weight's dtype. Differentiable in weight (only rows of text tokens receive gradient) and features
    (dropped rows receive zero). Raises ValueError for shapes, dtypes and, on a CPU, values out of range.
    """
    return splice_fwd.op(input_ids, weight, features.to(weight.dtype), slots)


def _check(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> None:
    expect("splice", "input_ids", input_ids, "T", (torch.int64,))
    expect("splice", "weight", weight, "V D", FLOATS, like=input_ids)
    expect("splice", "features", features, "R D", (weight.dtype,), like=input_ids)
    expect("splice", "slots", slots, "R", (torch.int64,), like=input_ids)
    if features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"splice: features have {features.shape[1]} columns, the embedding has {weight.shape[1]}; "
            "the connector must map to the language model's hidden size"
        )
    if features.shape[0] != slots.shape[0]:
        raise ValueError(f"splice: {features.shape[0]} feature rows for {slots.shape[0]} slots")


def _check_values(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> None:
    expect_range("splice", "input_ids", input_ids, 0, weight.shape[0] - 1, "the rows of the embedding")
    expect_range("splice", "slots", slots, 0, input_ids.shape[0], "positions of the pack, or its length to drop a row")


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(label: str, t: int, v: int, d: int, slots: list[int]) -> Sample:
        ids = torch.randint(0, v, (t,), generator=g)
        weight, features = torch.randn(v, d, generator=g), torch.randn(len(slots), d, generator=g)
        return Sample((ids, weight, features, torch.tensor(slots, dtype=torch.int64)), label)

    yield case("two images, one dropped row", 23, 11, 8, [*range(3, 7), *range(12, 16), 23])
    yield case("text only", 9, 5, 7, [])
    yield case("image only", 4, 3, 33, [3, 1, 0, 2])
    yield case("one token", 1, 1, 1, [1, 1])
    yield case("no token", 0, 4, 5, [0, 0])
    weight = torch.randn(6, 20, generator=g)[:, ::2]
    features = torch.randn(10, 4, generator=g).t()
    yield Sample((torch.tensor([5, 5, 5, 0, 1])[::1], weight, features, torch.tensor([1, 5, 4, 5])), "strided")


def _fake(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    return weight.new_empty((input_ids.shape[0], weight.shape[1]))


def _cpp_fwd(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    input_ids, slots = input_ids.contiguous(), slots.contiguous()
    weight, features = _cpp.unit_stride(weight), _cpp.unit_stride(features)
    out = weight.new_empty((len(input_ids), weight.shape[1]))
    owner = torch.empty(len(input_ids), dtype=torch.int32)
    _cpp.extension().splice_fwd(
        *(input_ids.data_ptr(), weight.data_ptr(), _cpp.row_bytes(weight)),
        *(features.data_ptr(), _cpp.row_bytes(features), slots.data_ptr(), owner.data_ptr()),
        *(out.data_ptr(), len(input_ids), len(slots), _cpp.row_bytes(out)),
    )
    return out


@define_op(module="splice", check=_check, check_values=_check_values, fake=_fake, cpp=_cpp_fwd, samples=_samples)
def splice_fwd(input_ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """[T, D]; see splice()."""
    text = weight.index_select(0, input_ids)
    scratch = text.new_zeros((1, text.shape[1]))  # row T takes the dropped rows: no data-dependent shape
    return torch.cat([text, scratch]).index_copy(0, slots, features)[:-1].clone()


def _check_bwd(grad: Tensor, input_ids: Tensor, slots: Tensor, *_: object) -> None:
    expect("splice_bwd", "grad", grad, "T D", FLOATS)
    expect("splice_bwd", "input_ids", input_ids, "T", (torch.int64,), like=grad)
    expect("splice_bwd", "slots", slots, "R", (torch.int64,), like=grad)
    if grad.shape[0] != input_ids.shape[0]:
        raise ValueError(f"splice_bwd: grad has {grad.shape[0]} rows for {input_ids.shape[0]} tokens")


def _samples_bwd() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(1)
    for sample in _samples():
        input_ids, weight, _, slots = sample.args
        grad = torch.randn(len(input_ids), weight.shape[1], generator=g)
        for flags in ((True, True), (True, False), (False, True)):
            yield Sample((grad, input_ids, slots, len(weight), *flags), f"{sample.label} {flags}", differentiable=False)


def _fake_bwd(
    grad: Tensor, input_ids: Tensor, slots: Tensor, vocab: int, want_weight: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    rows_w, rows_f = vocab if want_weight else 0, slots.shape[0] if want_features else 0
    return grad.new_empty((rows_w, grad.shape[1])), grad.new_empty((rows_f, grad.shape[1]))


def _weight_kernel(kernel: Callable[..., None], target: Tensor, grad: Tensor, input_ids: Tensor, slots: Tensor) -> None:
    (tokens, dim), vocab = grad.shape, target.shape[0]
    scratch = torch.empty(2 * tokens + vocab, dtype=torch.int32)  # held: a pointer alone keeps nothing
    kernel(
        *(grad.data_ptr(), grad.stride(0), input_ids.data_ptr(), slots.data_ptr(), scratch.data_ptr()),
        *(target.data_ptr(), tokens, len(slots), vocab, dim, _cpp.DTYPE_CODES[grad.dtype]),
    )


def _cpp_bwd(
    grad: Tensor, input_ids: Tensor, slots: Tensor, vocab: int, want_weight: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    dim, rows = grad.shape[1], len(slots)
    grad, input_ids, slots = _cpp.unit_stride(grad), input_ids.contiguous(), slots.contiguous()
    # Fresh memory is zero already: only rows of text are touched. Memory that was in use is cleared on the way.
    used = keeps_memory()
    d_weight = (_cpp.empty if used else _cpp.zeros)(vocab if want_weight else 0, dim, dtype=grad.dtype)
    d_features = grad.new_empty((rows if want_features else 0, dim))
    if want_weight:
        kernel = _cpp.extension().splice_bwd_weight if used else _cpp.extension().splice_bwd_add
        _weight_kernel(kernel, d_weight, grad, input_ids, slots)
    if want_features:
        _cpp.extension().splice_bwd_features(
            *(grad.data_ptr(), _cpp.row_bytes(grad), slots.data_ptr()),
            *(d_features.data_ptr(), len(grad), rows, _cpp.row_bytes(d_features)),
        )
    return d_weight, d_features


@define_op(
    module="splice",
    check=_check_bwd,
    fake=_fake_bwd,
    cpp=_cpp_bwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
    samples=_samples_bwd,
)
def splice_bwd(
    grad: Tensor, input_ids: Tensor, slots: Tensor, vocab: int, want_weight: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [V, D] and features [R, D]; an unwanted one has no rows."""
    tokens, dim = grad.shape
    d_weight, d_features = grad.new_zeros((0, dim)), grad.new_zeros((0, dim))
    if want_weight:
        covered = torch.zeros(tokens + 1, dtype=torch.bool, device=grad.device)
        covered[slots] = True
        text = grad.masked_fill(covered[:-1, None], 0)
        # a frequent token collects hundreds of rows: sum in float32
        total = torch.zeros((vocab, dim), dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
        d_weight = total.index_add_(0, input_ids, text.to(total.dtype)).to(grad.dtype)
    if want_features:
        d_features = torch.cat([grad, grad.new_zeros((1, dim))]).index_select(0, slots)
    return d_weight, d_features


def _check_add(base: Tensor, grad: Tensor, input_ids: Tensor, slots: Tensor) -> None:
    _check_bwd(grad, input_ids, slots)
    expect("splice_bwd_add", "base", base, "V D", (grad.dtype,), like=grad)
    if base.shape[1] != grad.shape[1]:
        raise ValueError(f"splice_bwd_add: base has {base.shape[1]} columns, grad has {grad.shape[1]}")


def _samples_add() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(2)
    for sample in _samples():
        input_ids, weight, _, slots = sample.args
        grad = torch.randn(len(input_ids), weight.shape[1], generator=g)
        base = torch.randn(weight.shape, generator=g)
        yield Sample((base, grad, input_ids, slots), sample.label, differentiable=False)


def _cpp_add(base: Tensor, grad: Tensor, input_ids: Tensor, slots: Tensor) -> None:
    _weight_kernel(
        _cpp.extension().splice_bwd_add, base, _cpp.unit_stride(grad), input_ids.contiguous(), slots.contiguous()
    )


def _add_supports(base: Tensor, *rest: Tensor) -> str | None:
    return splice_bwd.cpp_supports(base) or (
        None if base.is_contiguous() else "its C++ kernel adds to a contiguous gradient"
    )


@define_op(
    module="splice",
    check=_check_add,
    fake=lambda *_: None,
    cpp=_cpp_add,
    cpp_supports=_add_supports,
    samples=_samples_add,
    mutates=("base",),
)
def splice_bwd_add(base: Tensor, grad: Tensor, input_ids: Tensor, slots: Tensor) -> None:
    """base [V, D] += the gradient of weight, rounded once: rows that no text token has are not touched.

    For a head that is tied to the embedding, whose gradient is there already (train/graph_passes.py).
    """
    exact = torch.promote_types(grad.dtype, torch.float32)
    covered = torch.zeros(len(grad) + 1, dtype=torch.bool, device=grad.device)
    covered[slots] = True
    text = grad.to(exact).masked_fill(covered[:-1, None], 0)
    base.copy_(base.to(exact).index_add_(0, input_ids, text))


def _setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    input_ids, weight, _, slots = inputs
    ctx.save_for_backward(input_ids, slots)
    ctx.settings = (weight.shape[0],)


def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    input_ids, slots = ctx.saved_tensors
    _, want_weight, want_features, _ = ctx.needs_input_grad
    d_weight, d_features = splice_bwd.op(grad, input_ids, slots, *ctx.settings, want_weight, want_features)
    return None, d_weight if want_weight else None, d_features if want_features else None, None


splice_fwd.op.register_autograd(_backward, setup_context=_setup_context)
