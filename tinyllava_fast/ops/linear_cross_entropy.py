"""The head and its loss without a [tokens, vocabulary] tensor.

    rows  = supervised positions                            z = hidden[rows] weightᵀ + bias
    s     = z          (softcap c > 0: c tanh(z / c))       ds/dz = 1      (1 - (s / c)²)
    loss  = sum over rows of  lse - (1 - e) s[label] - e mean(s) + x lse²            lse = logsumexp(s)
    dz    = (softmax(s) (1 + 2 x lse) - (1 - e) onehot(label) - e / V) ds/dz
    d_hidden[rows] = dz weight      d_weight = dzᵀ hidden[rows]      d_bias = sum over rows of dz

e is the label smoothing (Szegedy et al., arXiv 1512.00567), x the weight of the z-loss, which keeps the logits from
drifting (Chowdhery et al., arXiv 2204.02311); both are 0 by default, which leaves lse - s[label].

The gradients are made in the forward pass, while the logits of a chunk of rows are at hand; the backward pass only
scales them by the incoming scalar. Legend: T tokens, D hidden size, V vocabulary, M slots of ``supervised``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._check import FLOATS, expect, expect_range
from tinyllava_fast.ops._op import Context, Sample, define_op
from tinyllava_fast.ops.gemm import product

CHUNK_BYTES = 128 << 20
"""Most memory for logits at a time: 1,365 rows of a 49,152-word vocabulary in bf16, so one chunk for most packs."""
VOCAB_BLOCK = 2048
"""Rows of d_weight that are summed at a time when there are several chunks: stays in the cache."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    supervised: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The SUM over supervised tokens of the cross entropy of ``hidden @ weight.T + bias``.

    hidden: [T, D] float. weight: [V, D], same dtype. bias: [V]. labels: [T] int64, 0..V-1 or ignore_index.
    supervised: [M] int64, ascending distinct positions, entries == T are padding; None: every position whose label is
    not ignore_index. softcap: c > 0 presses each logit into (-c, c) by c tanh(z / c), as Gemma 2 does; 0: none.
    label_smoothing: e in 0..1, the share of the target that is spread evenly over the vocabulary, as in
    torch.nn.functional.cross_entropy. z_loss: weight >= 0 of the squared log-sum-exp that each row adds (PaLM: 1e-4).
    Returns a float32 scalar (float64 for float64 inputs); 0 with zero gradients when nothing is supervised. Gradients
    are computed only for those of hidden, weight and bias that require them. Raises ValueError for shapes, dtypes and,
    on a CPU, labels out of range.
    """
    scalars = (ignore_index, softcap, label_smoothing, z_loss)
    return _forward(hidden, weight, bias, labels, supervised, scalars, want_losses=False)[0]


def linear_cross_entropy_by_token(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    supervised: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` with its terms: (the sum, the loss of each position [T]).

    Arguments and errors as there; the sum is the same bit for bit. The losses are of the sum's dtype, 0 where nothing
    is supervised, and have no gradient.
    """
    scalars = (ignore_index, softcap, label_smoothing, z_loss)
    loss, *_, losses = _forward(hidden, weight, bias, labels, supervised, scalars, want_losses=True)
    return loss, losses


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    supervised: Tensor | None,
    scalars: tuple[int, float, float, float],
    *,
    want_losses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    graded = torch.is_grad_enabled()
    want = [graded and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    ignore_index, *floats = scalars
    numbers = (ignore_index, *map(float, floats))
    return linear_cross_entropy_fwd.op(hidden, weight, bias, labels, supervised, *numbers, *want, want_losses)


class Args(NamedTuple):
    """The arguments of linear_cross_entropy_fwd."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    supervised: Tensor | None
    ignore_index: int
    softcap: float
    label_smoothing: float
    z_loss: float
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    want_losses: bool


def _check(*args: object) -> None:
    op, given = "linear_cross_entropy", Args._make(args)
    hidden, weight, bias, labels, supervised = given[:5]
    expect(op, "hidden", hidden, "T D", FLOATS)
    expect(op, "weight", weight, "V D", (hidden.dtype,), like=hidden)
    expect(op, "labels", labels, "T", (torch.int64,), like=hidden)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden has {hidden.shape[1]} columns, weight has {weight.shape[1]}")
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"{op}: {hidden.shape[0]} hidden rows for {labels.shape[0]} labels")
    if bias is not None:
        expect(op, "bias", bias, "V", (hidden.dtype,), like=hidden)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{op}: bias has {bias.shape[0]} entries for a vocabulary of {weight.shape[0]}")
    if supervised is not None:
        expect(op, "supervised", supervised, "M", (torch.int64,), like=hidden)
    if given.softcap < 0:
        raise ValueError(f"{op}: softcap must not be negative, got {given.softcap}")
    if not 0 <= given.label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in 0..1, got {given.label_smoothing}")
    if given.z_loss < 0:
        raise ValueError(f"{op}: z_loss must not be negative, got {given.z_loss}")


def _check_values(*args: object) -> None:
    op, given = "linear_cross_entropy", Args._make(args)
    labels, supervised, ignore_index = given.labels, given.supervised, given.ignore_index
    known = labels.masked_fill(labels == ignore_index, 0)
    expect_range(
        op, "labels", known, 0, given.weight.shape[0] - 1, f"the vocabulary; {ignore_index} marks unsupervised tokens"
    )
    if supervised is not None:
        expect_range(op, "supervised", supervised, 0, labels.shape[0], "positions, or the number of tokens as padding")


def _rows(labels: Tensor, supervised: Tensor | None, ignore_index: int) -> Tensor:
    """[m] positions that count. A data-dependent shape, which is why it lives inside the op."""
    if supervised is None:
        return (labels != ignore_index).nonzero()[:, 0]
    rows = supervised[supervised < labels.shape[0]]
    return rows[labels[rows] != ignore_index]


def _samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def case(
        label: str,
        t: int,
        v: int,
        d: int,
        share: float,
        *,
        slots: bool,
        bias: bool,
        want: str = "hwb",
        cap: float = 0.0,
        smooth: float = 0.0,
        z_loss: float = 0.0,
    ) -> Sample:
        hidden, weight = torch.randn(t, d, generator=g), torch.randn(v, d, generator=g)
        labels = torch.randint(0, v, (t,), generator=g)
        labels[torch.rand(t, generator=g) >= share] = -100
        supervised = None
        if slots:
            rows = (labels != -100).nonzero()[:, 0]
            supervised = torch.cat([rows, torch.full((t - len(rows),), t)])
        b = torch.randn(v, generator=g) if bias else None
        flags = ("h" in want, "w" in want, "b" in want and bias, "l" in want)
        args = (hidden, weight, b, labels, supervised, -100, cap, smooth, z_loss, *flags)
        return Sample(args, label, differentiable="w" in want)

    yield case("5 % supervised", 61, 37, 16, 0.05, slots=True, bias=False)
    yield case("half, bias", 33, 129, 24, 0.5, slots=True, bias=True)
    yield case("all, no slots", 7, 50, 9, 1.0, slots=False, bias=False)
    yield case("nothing supervised", 5, 11, 8, 0.0, slots=True, bias=True)
    yield case("one token", 1, 2, 1, 1.0, slots=False, bias=True)
    yield case("no token", 0, 3, 4, 1.0, slots=True, bias=False)
    yield case("frozen head", 12, 20, 8, 0.6, slots=True, bias=True, want="h")
    yield case("loss alone", 12, 20, 8, 0.6, slots=False, bias=True, want="")
    yield case("softcap", 26, 131, 16, 0.5, slots=True, bias=True, cap=3.0)
    yield case("softcap, loss alone", 9, 70, 12, 0.6, slots=False, bias=False, want="", cap=30.0)
    yield case("smoothed labels", 21, 67, 8, 0.7, slots=True, bias=True, smooth=0.1)
    yield case("z-loss", 14, 70, 8, 0.7, slots=False, bias=False, z_loss=0.05)
    yield case("all three", 19, 133, 16, 0.5, slots=True, bias=True, cap=5.0, smooth=0.3, z_loss=0.01)
    yield case("losses", 23, 40, 8, 0.5, slots=True, bias=True, want="hwbl", cap=4.0, smooth=0.2, z_loss=0.02)
    yield case("losses alone", 10, 30, 8, 0.7, slots=False, bias=False, want="l")
    yield case("losses, nothing supervised", 4, 9, 8, 0.0, slots=True, bias=False, want="hwl")
    yield case("smoothed, nothing supervised", 3, 11, 8, 0.0, slots=True, bias=True, smooth=0.2, z_loss=0.1)


def _fake(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Args._make(args)
    hidden, weight = given.hidden, given.weight
    return (
        hidden.new_empty((), dtype=_loss_dtype(hidden)),
        hidden.new_empty(hidden.shape if given.want_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if given.want_weight else (0, weight.shape[1])),
        weight.new_empty(weight.shape[:1] if given.want_bias else (0,)),
        hidden.new_empty(hidden.shape[:1] if given.want_losses else (0,), dtype=_loss_dtype(hidden)),
    )


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _spread(losses: Tensor, rows: Tensor, positions: int) -> Tensor:
    """Losses of rows as losses of all positions, 0 elsewhere."""
    return losses.new_zeros(positions).index_copy_(0, rows, losses)


def _cpp_fwd(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Args._make(args)
    hidden, weight, bias, labels = given.hidden, given.weight, given.bias, given.labels
    want_hidden, want_weight, want_bias = given.want_hidden, given.want_weight, given.want_bias
    rows = _rows(labels, given.supervised, given.ignore_index)
    x, y = hidden.index_select(0, rows), labels.index_select(0, rows)
    (count, dim), vocab, dtype = x.shape, weight.shape[0], weight.dtype
    loss = torch.empty(count, dtype=torch.float64)
    dx = x.new_empty((count if want_hidden else 0, dim))
    most = max(1, CHUNK_BYTES // (vocab * weight.element_size()))
    parts = -(-count // most)
    chunk = max(1, -(-count // max(1, parts)))  # of one size: not a last one of few rows
    z = logits = _cpp.empty(chunk, vocab, dtype=dtype)
    d_weight = _Sum(vocab if want_weight else 0, dim, dtype=dtype, parts=parts)
    d_bias = torch.zeros(vocab if want_bias else 0, dtype=torch.float32)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        z = logits[: part.stop - start]
        torch.mm(x[part], weight.t(), out=z) if bias is None else torch.addmm(bias, x[part], weight.t(), out=z)
        graded = want_hidden or want_weight or want_bias
        _cpp.extension().cross_entropy_rows(
            *(z.data_ptr(), y[part].data_ptr(), loss[part].data_ptr(), len(z), vocab),
            *(_cpp.DTYPE_CODES[dtype], graded, given.softcap, given.label_smoothing, given.z_loss),
        )
        if want_hidden:
            torch.mm(z, weight, out=dx[part])
        if want_weight:
            d_weight.add_product(z, x[part])
        if want_bias:
            d_bias += z.sum(0, dtype=torch.float32)
    del logits, z  # before d_weight is rounded into memory of its own
    d_hidden = x.new_zeros(hidden.shape if want_hidden else (0, dim))
    if want_hidden:
        d_hidden.index_copy_(0, rows, dx)
    losses = _spread(loss.float(), rows, len(hidden)) if given.want_losses else torch.empty(0)
    return loss.sum().float(), d_hidden, d_weight.result(), d_bias.to(dtype), losses


class _Sum:
    """d_weight [V, D] as a sum of products over the chunks, rounded to its dtype once."""

    def __init__(self, vocab: int, dim: int, *, dtype: torch.dtype, parts: int) -> None:
        self.single = parts == 1
        self.dtype = dtype
        allocate = _cpp.empty if self.single else _cpp.zeros
        self.total = allocate(vocab, dim, dtype=torch.float32 if parts > 1 else dtype)

    def add_product(self, z: Tensor, x: Tensor) -> None:
        """Add zᵀ x; z: [m, V], x: [m, D]."""
        if self.single:
            torch.mm(z.t(), x, out=self.total)
            return
        for start in range(0, len(self.total), VOCAB_BLOCK):
            block = slice(start, start + VOCAB_BLOCK)
            self.total[block] += product(z[:, block].t(), x)

    def result(self) -> Tensor:
        """The sum in its dtype."""
        return self.total.to(self.dtype)


@define_op(
    module="linear_cross_entropy",
    check=_check,
    check_values=_check_values,
    fake=_fake,
    cpp=_cpp_fwd,
    cpp_supports=_cpp.runs(torch.float32, torch.bfloat16),
    triton_supports=_cpp.runs(torch.float32, torch.bfloat16, torch.float16, kernel="Triton"),
    samples=_samples,
)
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    supervised: Tensor | None,
    ignore_index: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_losses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_hidden [T, D], d_weight [V, D], d_bias [V], losses [T]); unwanted: no rows.

    The gradients are those for an incoming gradient of 1.

    The backward pass may scale the three in place: take the loss alone, as linear_cross_entropy() does.
    """
    exact = _loss_dtype(hidden)
    rows = _rows(labels, supervised, ignore_index)
    x, y = hidden.index_select(0, rows), labels.index_select(0, rows)
    logits = torch.nn.functional.linear(x, weight, bias).to(exact)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum", label_smoothing=label_smoothing)
    dz = torch.softmax(logits, dim=-1)
    if z_loss:
        loss = loss + z_loss * (lse**2).sum()
        dz *= 1 + 2 * z_loss * lse
    dz.scatter_add_(1, y[:, None], torch.full_like(y, label_smoothing - 1, dtype=exact)[:, None])
    if label_smoothing:
        dz -= label_smoothing / weight.shape[0]
    if softcap:
        dz *= 1 - (logits / softcap) ** 2
    dz = dz.to(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        hidden.new_zeros((0, hidden.shape[1])),
        weight.new_zeros((0, weight.shape[1])),
        weight.new_zeros(0),
    )
    if want_hidden:
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, rows, dz @ weight)
    if want_weight:
        d_weight = dz.t() @ x
    if want_bias:
        d_bias = dz.sum(0, dtype=exact).to(weight.dtype)
    losses = logits.new_zeros(0)
    if want_losses:
        each = torch.nn.functional.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
        losses = _spread(each + z_loss * lse[:, 0] ** 2, rows, len(hidden))
    return loss, d_hidden, d_weight, d_bias, losses


def _setup_context(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or a [V, D] tensor of zeros would arrive for the unused output d_weight


def _backward(ctx: Context, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    # Plain products: Inductor fuses them into whatever consumes the gradients (a tied embedding adds its own). In eager
    # mode in place, unless the graph is kept for another backward: 8 ms instead of 34 ms for 49,152 x 576 in fresh
    # memory (docs/LOG.md). While tracing, saved tensors are of a subclass.
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    scaled = [
        None if not need else d.mul_(grad) if type(d) is Tensor and not keep else d * grad
        for d, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    return (*scaled, *(None,) * 10)


linear_cross_entropy_fwd.op.register_autograd(_backward, setup_context=_setup_context)
