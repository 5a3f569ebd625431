from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tinyllava_fast import hardware
from tinyllava_fast.ops import splice
from tinyllava_fast.ops._op import force_backend


def loop(ids: Tensor, weight: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """The meaning, token by token."""
    rows = [weight[i] for i in ids.tolist()]
    for r, slot in enumerate(slots.tolist()):
        if slot < len(rows):
            rows[slot] = features[r]
    return torch.stack(rows) if rows else weight.new_zeros(0, weight.shape[1])


def ragged(t: int, images: list[tuple[int, int]], dropped: int, dim: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    slots = [p for start, n in images for p in range(start, start + n)] + [t] * dropped
    features = torch.randn(len(slots), dim, generator=g)
    return torch.randint(0, 13, (t,), generator=g), torch.randn(13, dim, generator=g), features, torch.tensor(slots)


CASES = {
    "two images": ragged(40, [(3, 9), (20, 9)], 0, 24),
    "a dropped image": ragged(40, [(3, 9)], 9, 24),
    "adjacent images at both ends": ragged(18, [(0, 9), (9, 9)], 0, 5),
    "wider than a tile": ragged(30, [(1, 4)], 2, 700),
    "one token": ragged(1, [], 1, 8),
    "large enough for threads": ragged(500, [(100, 196)], 4, 200),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("threads", "kept"), [(1, False), (2, True)])
def test_equals_the_loop(case: str, backend: str, threads: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hardware._memory, "kept", kept)
    ids, weight, features, slots = CASES[case]
    torch.set_num_threads(threads)
    leaves = [weight.clone().requires_grad_(), features.clone().requires_grad_()]
    truth = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with force_backend(backend):
        out = splice(ids, *leaves, slots)
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        got = torch.autograd.grad(out, leaves, incoming)
    torch.set_num_threads(1)
    expected = loop(ids, *truth, slots)
    assert torch.equal(out, expected)
    for a, b in zip(got, torch.autograd.grad(expected, truth, incoming, allow_unused=True), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_a_frequent_token_is_summed_in_float32() -> None:
    """400 rows of 1/128 make 3.125; a bf16 sum would stall at 2."""
    ids, weight = torch.zeros(400, dtype=torch.int64), torch.zeros(3, 16, dtype=torch.bfloat16, requires_grad=True)
    for backend in ("cpp", "reference"):
        weight.grad = None
        with force_backend(backend):
            out = splice(ids, weight, weight.new_zeros(0, 16), torch.zeros(0, dtype=torch.int64))
            out.backward(torch.full_like(out, 1 / 128))
        assert weight.grad is not None and weight.grad[0].eq(3.125).all() and not weight.grad[1:].any()


def test_gradients_only_where_they_are_wanted() -> None:
    ids, weight, features, slots = CASES["two images"]
    features = features.clone().requires_grad_()
    splice(ids, weight, features, slots).sum().backward()
    assert weight.grad is None and features.grad is not None and features.grad.eq(1).all()


def test_features_are_cast_to_the_embedding() -> None:
    ids, weight, features, slots = CASES["two images"]
    features = features.clone().requires_grad_()
    out = splice(ids, weight.bfloat16(), features, slots)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert features.grad is not None and features.grad.dtype == torch.float32


def test_non_contiguous_inputs() -> None:
    ids, weight, features, slots = CASES["two images"]
    expected = splice(ids, weight, features, slots)
    wide = torch.randn(13, 60)
    wide[:, 10:34] = weight
    strided_ids, strided_slots = torch.stack([ids, ids], 1)[:, 0], torch.stack([slots, slots], 1)[:, 1]
    assert torch.equal(splice(strided_ids, wide[:, 10:34], features.t().contiguous().t(), strided_slots), expected)


def test_one_graph_for_every_raggedness() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(splice, fullgraph=True, backend=counter)
    for images, dropped in (([(3, 9), (20, 9)], 0), ([(0, 9)], 9), ([], 18)):
        ids, weight, features, slots = ragged(40, images, dropped, 24)
        weight.requires_grad_()
        out = compiled(ids, weight, features, slots)
        assert torch.equal(out, splice(ids, weight, features, slots))
        out.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.tensor([0, 13])}, r"input_ids\[1\] is 13, outside 0\.\.12: the rows of the embedding"),
        ({3: torch.tensor([-1])}, r"slots\[0\] is -1, outside 0\.\.2"),
        ({3: torch.tensor([0, 1])}, "1 feature rows for 2 slots"),
        ({2: torch.zeros(1, 5)}, "features have 5 columns, the embedding has 4; the connector must map"),
        ({0: torch.tensor([0, 1], dtype=torch.int32)}, "input_ids must be int64, got int32"),
        ({3: torch.tensor([[0]])}, r"slots must be \[R\], got shape \[1, 1\]"),
        ({3: torch.zeros(1, dtype=torch.int64, device="meta")}, "slots is on meta, the other tensors are on cpu"),
    ],
)
def test_errors(change: dict[int, Tensor], text: str) -> None:
    args = [torch.tensor([0, 1]), torch.zeros(13, 4), torch.zeros(1, 4), torch.tensor([2])]
    for at, value in change.items():
        args[at] = value
    with pytest.raises(ValueError, match=f"^splice: {text}"):
        splice(*args)
