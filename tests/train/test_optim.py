import copy

import pytest
import torch
from torch import nn

from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.ops.adamw import dither
from tinyllava_fast.train.engine.base import plain_state, trainable_names
from tinyllava_fast.train.optim import MasterOptimizer, lower


class Net(nn.Module):
    """Two matrices and an optional path, as the connector of a text-only pack."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.side = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, x, use_side=True):
        y = self.b(torch.tanh(self.a(x)))
        return (y + self.side(x) if use_side else y).float().square().sum()


def make(dtype=torch.float32, clip_norm=0.0, seed=0, lr=0.01):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    groups = [
        {"name": "decay", "params": [net.a.weight, net.b.weight, net.side.weight], "lr": lr, "weight_decay": 0.1},
        {"name": "plain", "params": [net.a.bias, net.b.bias, net.side.bias], "lr": lr, "weight_decay": 0.0},
    ]
    optim = OptimConfig(betas=(0.9, 0.99), eps=1e-8, clip_norm=clip_norm)
    optimizer = MasterOptimizer(groups, trainable_names(net, groups), optim)
    return net, groups, optimizer


def backward(net, optimizer, x, **options):
    net(x, **options).backward()
    optimizer.accumulate()


LRS = {"decay": 0.01, "plain": 0.02}


def torch_steps(net, groups, batches, clip_norm, lrs=LRS):
    """The same with torch's own pieces; returns the norms."""
    adamw = torch.optim.AdamW([dict(g) for g in groups], betas=(0.9, 0.99), eps=1e-8)
    norms = []
    for micro in batches:
        adamw.zero_grad()
        for x in micro:
            net(x).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), clip_norm or float("inf")))
        for group in adamw.param_groups:
            group["lr"] = lrs[group["name"]]
        adamw.step()
    return torch.stack(norms)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_float32_equals_torch_adamw_with_clipping(clip_norm):
    net, _, optimizer = make(clip_norm=clip_norm)
    twin, twin_groups, _ = make()
    batches = [[torch.randn(4, 6), torch.randn(4, 6)] for _ in range(5)]
    norms = []
    for micro in batches:
        for x in micro:
            backward(net, optimizer, x)
        norms.append(optimizer.step(LRS))
    torch.testing.assert_close(torch.stack(norms), torch_steps(twin, twin_groups, batches, clip_norm))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert p.grad is None


def test_bf16_follows_its_float32_masters_and_not_their_rounding():
    """Updates far below a bf16 unit in the last place must add up."""
    tiny = dict.fromkeys(LRS, 1e-5)
    net, _, optimizer = make(torch.bfloat16)
    before = copy.deepcopy(net.state_dict())
    master = dict((i.name, i.fetch().clone()) for i in optimizer.state())["master/a.weight"]
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    for _ in range(40):
        backward(net, optimizer, x)
        optimizer.step(tiny)
    moved = dict((i.name, i.fetch()) for i in optimizer.state())["master/a.weight"]
    assert (moved - master).abs().mean() > 2e-4
    assert not torch.equal(net.a.weight, before["a.weight"])
    dither(moved, rounded := torch.empty_like(net.a.weight))
    assert torch.equal(net.a.weight, rounded)
    assert net.a.weight.grad is None


def test_bf16_micro_batches_are_summed_in_float32():
    net, _, optimizer = make(torch.bfloat16)
    parts = []
    for x in torch.randn(8, 4, 6, dtype=torch.bfloat16):
        net(x).backward()
        parts.append(net.a.weight.grad.float().clone())
        optimizer.accumulate()
    exact = torch.stack(parts).sum(0)
    total = optimizer.gradients()[0]
    torch.testing.assert_close(total, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_without_gradient_counts_as_zero(dtype):
    """First micro-batch without the side path, then a whole step without it: as if its gradient were zero."""
    net, _, optimizer = make(dtype)
    x, y = torch.randn(2, 4, 6, dtype=dtype)
    backward(net, optimizer, x, use_side=False)
    backward(net, optimizer, y)
    optimizer.step(LRS)
    before = net.side.bias.detach().clone()
    backward(net, optimizer, x, use_side=False)
    optimizer.step(LRS)
    state = {i.name: i.fetch() for i in optimizer.state()}
    assert state["step"] == 2
    assert not torch.equal(net.side.bias, before)  # momentum still moves it
    assert torch.isfinite(net.side.bias).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_bit_for_bit(dtype):
    net, _, optimizer = make(dtype, clip_norm=1.0)
    batches = torch.randn(6, 4, 6, dtype=dtype)
    for x in batches[:3]:
        backward(net, optimizer, x)
        optimizer.step(LRS)
    saved = {i.name: i.fetch().clone() for i in optimizer.state()}
    weights = copy.deepcopy(net.state_dict())
    for x in batches[3:]:
        backward(net, optimizer, x)
        optimizer.step(LRS)
    other, _, resumed = make(dtype, clip_norm=1.0, seed=5)
    other.load_state_dict(weights)
    resumed.load(saved)
    for x in batches[3:]:
        backward(other, resumed, x)
        resumed.step(LRS)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_before_the_first_step_is_zero():
    _, _, optimizer = make()
    state = {i.name: i.fetch() for i in optimizer.state()}
    assert state["step"] == 0 and not state["exp_avg/a.weight"].any()
    assert not any(name.startswith("master/") for name in state)


def test_load_names_what_does_not_fit():
    net, _, optimizer = make()
    saved = {i.name: i.fetch() for i in optimizer.state()}
    lacking = {k: v for k, v in saved.items() if k != "exp_avg/b.bias"}
    with pytest.raises(CheckpointError, match=r"'exp_avg/b\.bias' is missing"):
        optimizer.load(lacking)
    with pytest.raises(CheckpointError, match=r"'exp_avg/b\.bias' has shape \[7\], expected \[3\]"):
        optimizer.load({**saved, "exp_avg/b.bias": torch.zeros(7)})
    with pytest.raises(CheckpointError, match="'step' is missing"):
        optimizer.load({k: v for k, v in saved.items() if k != "step"})
    assert net is not None


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="all frozen"):
        trainable_names(Net(), [])


def test_plain_state_lists_tied_weights_once():
    net = Net()
    net.tied = nn.Linear(6, 5)
    net.tied.weight = net.a.weight
    net.register_buffer("kept", torch.ones(2))
    net.register_buffer("dropped", torch.ones(2), persistent=False)
    names = set(plain_state(net))
    assert "a.weight" in names and "tied.weight" not in names and "tied.bias" in names
    assert "kept" in names and "dropped" not in names


def test_masters_keep_what_the_cast_rounds_away():
    torch.manual_seed(0)
    net = Net()
    exact = {p: p.detach().clone() for p in net.parameters()}
    net.side.weight.requires_grad_(False)
    masters = lower(net, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())
    assert net.side.weight not in masters and len(masters) == len(exact) - 1
    groups = [{"name": "all", "params": list(masters), "lr": 0.0, "weight_decay": 0.0}]
    names = trainable_names(net, groups)
    optim = OptimConfig(betas=(0.9, 0.99), eps=1e-8, clip_norm=0.0)
    optimizer = MasterOptimizer(groups, names, optim, masters=masters)
    saved = {t.name: t.fetch() for t in optimizer.state() if t.name.startswith("master/")}
    assert all(torch.equal(saved[f"master/{names[p]}"], exact[p]) for p in masters)
    assert any(not torch.equal(exact[p], p.detach().float()) for p in masters)  # rounding did lose something


def test_lowering_to_float32_changes_nothing():
    net = Net()
    before = {p: p.data_ptr() for p in net.parameters()}
    assert lower(net, torch.float32) == {}
    assert all(p.data_ptr() == at for p, at in before.items())
