"""The update in one pass: torch's AdamW, its rounding, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinyllava_fast.ops._op import force_backend
from tinyllava_fast.ops.adamw import CHUNK, adamw, dither, square_sum, step_scalars

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
SIZE = 3 * CHUNK + 77


def state(size: int = SIZE) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(size, generator=g)
    return p, torch.zeros(size), torch.zeros(size), p.bfloat16()


def gradients(steps: int, dtype: torch.dtype, size: int = SIZE) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=g).to(dtype) for _ in range(steps)]


def run(tensors: tuple[Tensor, ...], grads: list[Tensor], factor: float = 1.0, decay: float = 0.1) -> None:
    for step, grad in enumerate(grads, 1):
        scalars = step_scalars(factor, SETTINGS["betas"], step)
        adamw.infer(*tensors, grad, scalars, SETTINGS["lr"], decay, *SETTINGS["betas"], SETTINGS["eps"])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("factor", "decay"), [(1.0, 0.0), (0.125, 0.1)])
def test_equals_torchs_adamw_in_float64(backend: str, factor: float, decay: float) -> None:
    tensors, grads = state(), gradients(6, torch.bfloat16)
    exact = tensors[0].double().requires_grad_()
    optimizer = torch.optim.AdamW([exact], weight_decay=decay, **SETTINGS)
    for grad in grads:
        exact.grad = grad.double() * factor
        optimizer.step()
    with force_backend(backend):
        run(tensors, grads, factor, decay)
    p, m, v, weight = tensors
    torch.testing.assert_close(p.double(), exact.detach(), rtol=0, atol=3e-6)
    for moment, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
        torch.testing.assert_close(moment.double(), optimizer.state[exact][name], rtol=1e-6, atol=1e-7)
    rounded = torch.empty_like(weight)
    dither(p, rounded)
    assert torch.equal(weight, rounded)


def test_small_updates_move_their_share_of_the_weights() -> None:
    """Rounding to the nearest would leave all of these where they are."""
    grid = torch.linspace(-2, 2, SIZE).bfloat16().float()
    above = torch.where(grid < 0, -1, 1) * torch.full_like(grid, float("inf"))
    step = (torch.nextafter(grid.bfloat16(), above.bfloat16()).float() - grid).abs()
    weight = torch.empty(SIZE, dtype=torch.bfloat16)
    for share in (0.0, 0.1, 0.5, 0.9):
        dither(grid + share * above.sign() * step, weight)
        moved = weight.float() != grid
        assert abs(float(moved.float().mean()) - share) < 0.01
        assert torch.equal(weight.float()[moved], (grid + above.sign() * step)[moved])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 0.0])
def test_rounding_keeps_what_is_no_number_of_the_grid(value: float) -> None:
    p, weight = torch.full((SIZE,), value), torch.empty(SIZE, dtype=torch.bfloat16)
    dither(p, weight)
    assert torch.equal(weight, p.bfloat16()) or weight.isnan().all()


def test_a_gradient_may_come_in_either_dtype_and_layout() -> None:
    """A bf16 gradient is the same number as the float32 sum of one term, so the bits are the same."""
    grads = gradients(3, torch.bfloat16)
    low, high, strided = state(), state(), state()
    run(low, grads)
    run(high, [g.float() for g in grads])
    run(strided, [torch.stack([g, g], 1)[:, 0] for g in grads])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(low, high, strided, strict=True))


def test_no_gradient_is_a_gradient_of_zeros() -> None:
    (first,), given, absent = gradients(1, torch.bfloat16), state(), state()
    run(given, [first, torch.zeros_like(first)])
    run(absent, [first, None])  # type: ignore[list-item]
    assert all(torch.equal(a, b) for a, b in zip(given, absent, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_factor_that_is_no_number_leaves_the_step_out(backend: str) -> None:
    tensors, (grad,) = state(), gradients(1, torch.bfloat16)
    before = [t.clone() for t in tensors]
    with force_backend(backend):
        run(tensors, [grad], factor=float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_threads_change_no_bit() -> None:
    (grad,) = gradients(1, torch.bfloat16)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tensors = state()
        run(tensors, [grad])
        found.append((*tensors, square_sum.infer(grad)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rounding_meets_unaligned_weights() -> None:
    p, m, v, _ = state(1000)
    weight = torch.zeros(1003, dtype=torch.bfloat16)[3:]
    run((p, m, v, weight), gradients(1, torch.float32, 1000))
    dither(p, rounded := torch.empty(1000, dtype=torch.bfloat16))
    assert torch.equal(weight, rounded)


def test_a_norm_of_many_small_numbers_is_exact() -> None:
    x = torch.full((1 << 20,), 1 / 256, dtype=torch.bfloat16)
    assert square_sum.infer(x) == 16.0
    for strange in (torch.inf, torch.nan):
        x[70] = strange
        assert not square_sum.infer(x).isfinite()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({1: torch.zeros(3)}, r"exp_avg must be float of p's shape \[4\], got torch.float32 \[3\]"),
        ({1: torch.zeros(4).double()}, "p is torch.float32, its moments are torch.float64"),
        ({4: torch.zeros(4, dtype=torch.int64)}, "grad must be float"),
        ({5: torch.ones(3)}, r"scalars must be \[3\] float64, got torch.float32 \[3\]"),
    ],
)
def test_errors(change: dict[int, object], text: str) -> None:
    args = [*(torch.zeros(4) for _ in range(3)), torch.zeros(4).bfloat16(), torch.zeros(4)]
    args += [step_scalars(1.0, (0.9, 0.99), 1), 1e-3, 0.0, 0.9, 0.99, 1e-8]
    for at, value in change.items():
        args[at] = value
    with pytest.raises(ValueError, match=f"^adamw: {text}"):
        adamw.op(*args)
