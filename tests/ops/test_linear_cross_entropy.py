from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tinyllava_fast.ops import linear_cross_entropy
from tinyllava_fast.ops._op import force_backend

# the package exports the function under the module's name
MODULE = importlib.import_module("tinyllava_fast.ops.linear_cross_entropy")
BACKENDS = ("cpp", "reference")


def problem(t: int = 30, v: int = 90, d: int = 16, share: float = 0.5, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (t,), generator=g)
    labels[torch.rand(t, generator=g) >= share] = -100
    rows = (labels != -100).nonzero()[:, 0]
    supervised = torch.cat([rows, torch.full((t - len(rows),), t)])
    return (
        torch.randn(t, d, generator=g),
        torch.randn(v, d, generator=g),
        torch.randn(v, generator=g),
        labels,
        supervised,
    )


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss / 3, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_equals_torch(backend: str, share: float) -> None:
    hidden, weight, bias, labels, supervised = problem(share=share)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    expected = F.cross_entropy(F.linear(*leaves), labels, reduction="sum")
    with force_backend(backend):
        for slots in (supervised, None):
            loss = linear_cross_entropy(hidden, weight, labels, slots, bias=bias)
            assert loss.dtype == torch.float32 and loss.shape == ()
            torch.testing.assert_close(loss, expected)
            for got, truth in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
                torch.testing.assert_close(got, truth)
            expected = F.cross_entropy(F.linear(*leaves), labels, reduction="sum")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_terms_are_those_of_the_sum_which_stays_as_it_is(backend: str, share: float) -> None:
    hidden, weight, bias, labels, supervised = problem(share=share)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    extras = {"bias": bias, "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}
    with force_backend(backend):
        plain = linear_cross_entropy(hidden, weight, labels, supervised, **extras)
        before = grads(plain, *leaves)
        loss, losses = MODULE.linear_cross_entropy_by_token(hidden, weight, labels, supervised, **extras)
        assert torch.equal(loss, plain) and not losses.requires_grad
        assert all(map(torch.equal, grads(loss, *leaves), before))
        alone = [
            linear_cross_entropy(hidden, weight, labels, torch.tensor([at]), **extras) for at in range(len(labels))
        ]
    torch.testing.assert_close(losses, torch.stack(alone).detach())
    torch.testing.assert_close(losses.sum(), loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [0.5, 3.0, 30.0, 1e4])
def test_softcap_equals_torch(backend: str, cap: float) -> None:
    """From a cap far below the logits, where slopes vanish, to one far above, where it does nothing."""
    hidden, weight, bias, labels, supervised = problem(v=133)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    expected = F.cross_entropy(cap * torch.tanh(F.linear(*leaves) / cap), labels, reduction="sum")
    with force_backend(backend):
        loss = linear_cross_entropy(hidden, weight, labels, supervised, bias=bias, softcap=cap)
        torch.testing.assert_close(loss, expected)
        for got, truth in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
            torch.testing.assert_close(got, truth, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smooth", [0.1, 1.0])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_label_smoothing_equals_torch(backend: str, smooth: float, cap: float) -> None:
    hidden, weight, bias, labels, supervised = problem(v=133)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smooth)
    with force_backend(backend):
        loss = linear_cross_entropy(hidden, weight, labels, supervised, bias=bias, softcap=cap, label_smoothing=smooth)
        torch.testing.assert_close(loss, expected)
        for got, truth in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
            torch.testing.assert_close(got, truth, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_z_loss_is_the_squared_log_sum_exp(backend: str, smooth: float) -> None:
    hidden, weight, bias, labels, supervised = problem(v=133)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    z = 0.03 * (torch.logsumexp(logits[labels != -100], dim=-1) ** 2).sum()
    expected = z + F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smooth)
    with force_backend(backend):
        loss = linear_cross_entropy(hidden, weight, labels, supervised, bias=bias, label_smoothing=smooth, z_loss=0.03)
        torch.testing.assert_close(loss, expected)
        for got, truth in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
            torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chunks_lose_no_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """d_weight summed over 40 chunks is as exact as in one: bf16 sums would lose it."""
    hidden, weight, bias, labels, supervised = (
        x.to(dtype) if x.is_floating_point() else x for x in problem(t=120, share=0.9)
    )
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def run() -> list[Tensor]:
        loss = linear_cross_entropy(hidden, weight, labels, supervised, bias=bias)
        return [loss.detach(), *grads(loss, *leaves)]

    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    truths = [truth, *grads(truth, *exact)]
    whole = run()
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 3 * weight.shape[0] * weight.element_size())
    monkeypatch.setattr(MODULE, "VOCAB_BLOCK", 32)
    for one, many, best in zip(whole, run(), truths, strict=True):
        lost, lost_chunked = (one - best).abs().max(), (many - best).abs().max()
        assert lost_chunked <= 1.5 * lost + 1e-6 * best.abs().max()


def test_memory_of_a_chunk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = MODULE._cpp.empty
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(MODULE._cpp, "empty", lambda *s, dtype: asked.append(s) or real(*s, dtype=dtype))
    hidden, weight, _, labels, supervised = problem(t=200, share=1.0)
    linear_cross_entropy(hidden, weight, labels, supervised)
    assert asked[0] == (11, 90)  # 4000 bytes / 360 bytes a row, not 200 rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_they_are_wanted(backend: str) -> None:
    hidden, weight, bias, labels, supervised = problem()
    with force_backend(backend):
        hidden.requires_grad_()
        linear_cross_entropy(hidden, weight, labels, supervised, bias=bias).backward()
        assert hidden.grad is not None and weight.grad is None and bias.grad is None
        assert hidden.grad[labels == -100].eq(0).all() and hidden.grad[labels != -100].ne(0).any(dim=1).all()
        with torch.no_grad():
            assert not linear_cross_entropy(hidden, weight, labels, supervised).requires_grad
        frozen = linear_cross_entropy(hidden.detach(), weight.requires_grad_(), labels, supervised)
        (d_weight,) = grads(frozen, weight)
        assert d_weight.shape == weight.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kept_graph_gives_the_same_gradient_twice(backend: str) -> None:
    """Without retain_graph the backward scales in place; with it, it may not."""
    hidden, weight, _, labels, supervised = problem()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with force_backend(backend):
        loss = linear_cross_entropy(hidden, weight, labels, supervised)
        first = torch.autograd.grad(loss / 7, leaves, retain_graph=True)
        second = torch.autograd.grad(loss / 7, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_into_a_tied_weight(backend: str) -> None:
    """Two micro-batches through one embedding that is also the head."""
    _, weight, _, labels, supervised = problem()
    weight.requires_grad_()

    def loss(weight: Tensor, seed: int, head: bool) -> Tensor:
        ids = torch.randint(0, 90, (30,), generator=torch.Generator().manual_seed(seed))
        hidden = torch.tanh(weight[ids])
        if head:
            return linear_cross_entropy(hidden, weight, labels, supervised)
        return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")

    with force_backend(backend):
        for seed in (0, 1):
            (loss(weight, seed, True) / 5).backward()
    got, weight.grad = weight.grad, None
    for seed in (0, 1):
        (loss(weight, seed, False) / 5).backward()
    torch.testing.assert_close(got, weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_and_hopeless_tokens(dtype: torch.dtype) -> None:
    """Logits of +-60: no overflow, and softmax - 1 does not cancel to garbage."""
    weight = torch.eye(4).to(dtype).requires_grad_()
    hidden = (
        torch.tensor([[60.0, 0, 0, 0], [60, 0, 0, 0], [8, 0, 0, 0], [-60, -60, -60, -60]]).to(dtype).requires_grad_()
    )
    labels = torch.tensor([0, 1, 0, 2])
    loss = linear_cross_entropy(hidden, weight, labels)
    exact = hidden.detach().double().requires_grad_()
    truth = F.cross_entropy(exact @ weight.detach().double().t(), labels, reduction="sum")
    (got,), (expected,) = torch.autograd.grad(loss, [hidden]), torch.autograd.grad(truth, [exact])
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-12)


def test_nan_reaches_the_loss() -> None:
    hidden, weight, _, labels, supervised = problem()
    hidden[supervised[0]] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels, supervised).isnan()


def test_non_contiguous_inputs() -> None:
    hidden, weight, bias, labels, supervised = problem()
    expected = linear_cross_entropy(hidden, weight, labels, supervised, bias=bias)
    wide = torch.randn(90, 40)
    wide[:, 4:20] = weight
    strided = torch.stack([bias, bias], 1)[:, 0]
    twice = [torch.stack([x, x], 1)[:, 1] for x in (labels, supervised)]
    torch.testing.assert_close(
        linear_cross_entropy(hidden.t().contiguous().t(), wide[:, 4:20], *twice, bias=strided), expected
    )


def test_results_do_not_depend_on_threads() -> None:
    hidden, weight, _, labels, supervised = problem(t=300, v=700)
    weight.requires_grad_()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = linear_cross_entropy(hidden, weight, labels, supervised)
        results.append((loss.detach(), *grads(loss, weight)))
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_one_graph_for_every_raggedness_and_inductor() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda h, w, y, s: linear_cross_entropy(h, w, y, s) / 3, fullgraph=True, backend=counter)
    for share in (0.5, 0.0, 1.0):
        hidden, weight, _, labels, supervised = problem(share=share)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        got = torch.autograd.grad(compiled(*leaves, labels, supervised), leaves)
        expected = grads(linear_cross_entropy(*leaves, labels, supervised), *leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": torch.tensor([0, 5, 1])}, r"labels\[1\] is 5, outside 0\.\.4: the vocabulary; -100 marks"),
        ({"labels": torch.tensor([0, 1, -1])}, r"labels\[2\] is -1, outside"),
        ({"supervised": torch.tensor([0, 4])}, r"supervised\[1\] is 4, outside 0\.\.3"),
        ({"hidden": torch.zeros(3, 6)}, "hidden has 6 columns, weight has 4"),
        ({"labels": torch.tensor([0])}, "3 hidden rows for 1 labels"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, "weight must be float32, got bfloat16"),
        ({"bias": torch.zeros(3)}, "bias has 3 entries for a vocabulary of 5"),
        ({"softcap": -1.0}, "softcap must not be negative, got -1.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in 0\.\.1, got 1\.5"),
        ({"z_loss": -1e-4}, "z_loss must not be negative, got -0.0001"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be float32 or bfloat16"),
    ],
)
def test_errors(change: dict[str, Any], text: str) -> None:
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.tensor([0, -100, 4]), **change}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {text}"):
        linear_cross_entropy(**given)
