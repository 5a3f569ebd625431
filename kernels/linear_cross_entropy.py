"""Triton kernel of ops/linear_cross_entropy.py: a chunk of logits becomes its loss and, in place, their gradient.

The matrix products around it are cuBLAS's: the supervised rows are gathered, their logits made a chunk at a time, and
each chunk is turned by one program a row. The kernel reads a row twice and writes it once; the second read of a row
comes from the L2 cache.

Legend: T tokens, D width, V vocabulary, m supervised rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllava_fast.kernels._common import LAUNCH, TRITON_TYPES, CompileCase, power_of_2
from tinyllava_fast.ops.linear_cross_entropy import Args

CHUNK_BYTES = 512 << 20
"""Most memory for logits at a time: 5,461 rows of a 49,152-word vocabulary in bf16."""
BLOCK = 4096
"""Logits a program holds at a time: 16 a thread with 8 warps."""
WARPS = 8


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh(x) to 2 ulp in float32: a series near zero (Cephes tanhf), where the exponential form would cancel."""
    size = tl.abs(x)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = x + x * square * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def value_of(z: tl.tensor, softcap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """The logit, pressed into (-softcap, softcap) where CAPPED."""
    s = z.to(tl.float32)
    if CAPPED:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def cross_entropy_rows(
    logits: tl.tensor,
    labels: tl.tensor,
    loss: tl.tensor,
    vocab: tl.tensor,
    ignore_index: tl.tensor,
    softcap: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """loss[row], and logits[row] = d loss / d logits where GRADED; both 0 where the label is ignore_index.

    A label outside the vocabulary makes the loss NaN, where a wild read would not be noticed.
    """
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * vocab
    label = tl.load(labels + row)
    counts = label != ignore_index
    column = tl.arange(0, BLOCK)

    # One pass: the largest value so far, and the sum of exponentials relative to it. The label's own is left out:
    # softmax - 1, which cancels where the model is confident, is then -rest / total.
    top = float("-inf")
    rest = 0.0
    summed = 0.0
    for start in range(0, vocab, BLOCK):
        at = start + column
        s = value_of(tl.load(z + at, mask=at < vocab, other=float("-inf")), softcap, CAPPED)
        s = tl.where(at < vocab, s, float("-inf"))
        if SMOOTHED:
            summed += tl.sum(tl.where(at < vocab, s, 0.0), axis=0)
        higher = tl.maximum(top, tl.max(s, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        rest = rest * tl.exp(top - level) + tl.sum(tl.where(at == label, 0.0, tl.exp(s - level)), axis=0)
        top = higher

    known = (label >= 0) & (label < vocab)
    answer = value_of(tl.load(z + label, mask=known, other=float("nan")), softcap, CAPPED)
    hit = tl.exp(answer - top)
    total = rest + hit
    lse = tl.log(total) + top
    cost = tl.log(total) - (answer - top)
    if SMOOTHED:
        cost += smoothing * (answer - summed / vocab)
    cost += z_loss * lse * lse
    tl.store(loss + row, tl.where(counts, cost, 0.0))

    if GRADED:
        growth = 2.0 * z_loss * lse
        scale = (1.0 + growth) / total
        spread = smoothing / vocab
        at_label = (growth * hit - rest) / total + (smoothing - spread)
        for start in range(0, vocab, BLOCK):
            at = start + column
            s = value_of(tl.load(z + at, mask=at < vocab, other=0.0), softcap, CAPPED)
            d = tl.where(at == label, at_label, tl.exp(s - top) * scale - spread)
            if CAPPED:
                d *= 1.0 - (s / softcap) * (s / softcap)
            tl.store(z + at, tl.where(counts, d, 0.0).to(logits.dtype.element_ty), mask=at < vocab)


def linear_cross_entropy_fwd(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_hidden [T, D], d_weight [V, D], d_bias [V], losses [T]); unwanted: no rows.

    The gradients are those for an incoming gradient of 1. Every slot of ``supervised`` is a row of the products, those
    that are padding too, so that the host waits for nothing: give as many slots as are needed. Without them the number
    of rows is read on the host. The sum of d_weight over several chunks is kept in float32.
    """
    hidden, weight, bias, labels, supervised, ignore_index, softcap, label_smoothing, z_loss, *want = Args._make(args)
    want_hidden, want_weight, want_bias, want_losses = want
    tokens = len(hidden)
    rows = (labels != ignore_index).nonzero()[:, 0] if supervised is None else supervised
    if tokens == 0:
        rows = rows[:0]
    at = rows.clamp(max=tokens - 1)
    x, y = hidden.index_select(0, at), labels.index_select(0, at).masked_fill(rows >= tokens, ignore_index)
    (count, dim), vocab, dtype = x.shape, len(weight), weight.dtype
    loss = x.new_empty(count, dtype=torch.float32)
    chunk = max(1, min(count, CHUNK_BYTES // (vocab * weight.element_size())))
    parts = triton.cdiv(count, chunk)
    logits = x.new_empty((chunk, vocab))
    dx = x.new_empty((count if want_hidden else 0, dim))
    d_weight = weight.new_zeros((vocab if want_weight else 0, dim), dtype=torch.float32 if parts > 1 else dtype)
    d_bias = x.new_zeros(vocab if want_bias else 0, dtype=torch.float32)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        z = logits[: part.stop - start]
        torch.mm(x[part], weight.t(), out=z) if bias is None else torch.addmm(bias, x[part], weight.t(), out=z)
        graded = want_hidden or want_weight or want_bias
        _turn(z, y[part], loss[part], ignore_index, softcap, label_smoothing, z_loss, graded)
        if want_hidden:
            torch.mm(z, weight, out=dx[part])
        if want_weight and parts == 1:
            torch.mm(z.t(), x[part], out=d_weight)
        elif want_weight:
            d_weight += z.t() @ x[part]
        if want_bias:
            d_bias += z.sum(0, dtype=torch.float32)
    d_hidden = x.new_zeros((tokens + 1 if want_hidden else 0, dim))  # the last row is that of padding
    losses = loss.new_zeros(tokens + 1 if want_losses else 0)
    if want_hidden:
        d_hidden = d_hidden.index_copy_(0, rows, dx)[:tokens]
    if want_losses:
        losses = losses.index_copy_(0, rows, loss)[:tokens]
    return loss.sum(dtype=torch.float64).float(), d_hidden, d_weight.to(dtype), d_bias.to(dtype), losses


def _turn(
    z: Tensor, labels: Tensor, loss: Tensor, ignore_index: int, softcap: float, smoothing: float, z_loss: float,
    graded: bool,
) -> None:  # fmt: skip
    """The logits z [m, V] into their gradient, in place, and loss [m]."""
    with torch.cuda.device_of(z):
        cross_entropy_rows[(len(z),)](
            z, labels, loss, z.shape[1], ignore_index, softcap, smoothing, z_loss,
            CAPPED=softcap > 0, SMOOTHED=smoothing > 0, GRADED=graded, BLOCK=power_of_2(z.shape[1], 128, BLOCK),
            num_warps=WARPS, **LAUNCH,
        )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """The row kernel in every dtype, and with everything that costs it registers."""
    for dtype, extras in (
        (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, False),
        (torch.float32, True),
    ):  # fmt: skip
        kind = TRITON_TYPES[dtype]
        signature = {
            "logits": f"*{kind}", "labels": "*i64", "loss": "*fp32", "vocab": "i32:16", "ignore_index": "i32",
            "softcap": "fp32", "smoothing": "fp32", "z_loss": "fp32",
        }  # fmt: skip
        constants = {"CAPPED": extras, "SMOOTHED": extras, "GRADED": True, "BLOCK": BLOCK}
        shape = f"V=49152 {kind}" + (", softcap and smoothing" if extras else "")
        yield CompileCase("cross_entropy_rows", shape, cross_entropy_rows, signature, constants, WARPS, 3, False)
