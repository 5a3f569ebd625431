"""The optimizers of bitsandbytes: the formula, what they keep, what a checkpoint restores, what is refused."""

import copy

import pytest
import torch
from torch import nn

from tinyllava_fast.config.schema import EngineConfig, OptimConfig
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.train.engine.base import trainable_names
from tinyllava_fast.train.optim import MasterOptimizer
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, check_optimizer

LRS = {"decay": 1e-3, "plain": 2e-3}
CPU = torch.device("cpu")


class Net(nn.Module):
    """One matrix of more than 4,096 elements, whose last block of 256 is not full, an embedding of as many, a bias."""

    def __init__(self):
        super().__init__()
        self.table, self.wide = nn.Embedding(70, 65), nn.Linear(65, 67)

    def forward(self, x):
        return torch.tanh(self.wide(self.table(x))).float().square().sum()


def make(kind, dtype=torch.float32, clip_norm=0.0):
    torch.manual_seed(0)
    net = Net().to(dtype)
    groups = [
        {"name": "decay", "params": [net.wide.weight], "lr": 0.0, "weight_decay": 0.1},
        {"name": "plain", "params": [net.wide.bias, net.table.weight], "lr": 0.0, "weight_decay": 0.0},
    ]
    optim = OptimConfig(type=kind, betas=(0.9, 0.99), eps=1e-8, clip_norm=clip_norm)
    return net, MasterOptimizer(groups, trainable_names(net, groups), optim, exact={net.table.weight})


def steps(net, optimizer, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        net(torch.randint(70, (9,), generator=g)).backward()
        optimizer.accumulate()
        optimizer.step(LRS)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_8_bits_follow_adamw(clip_norm):
    """Moments with an error of a few percent move the weights within a few percent; embeddings move exactly."""
    before = copy.deepcopy(make("adamw")[0])
    exact, optimizer = make("adamw", clip_norm=clip_norm)
    steps(exact, optimizer, 20)
    net, optimizer = make("adamw8bit", clip_norm=clip_norm)
    steps(net, optimizer, 20)
    moved, expected = net.wide.weight - before.wide.weight, exact.wide.weight - before.wide.weight
    assert 0 < (moved - expected).norm() < 0.1 * expected.norm()
    moved, expected = net.table.weight - before.table.weight, exact.table.weight - before.table.weight
    assert (moved - expected).norm() < 0.02 * expected.norm()  # its gradients come through the matrix


def test_lion_is_the_formula_of_the_paper():
    net, optimizer = make("lion")
    twin = copy.deepcopy(net)
    moments = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    g = torch.Generator().manual_seed(1)
    for _ in range(4):
        twin.zero_grad()
        twin(torch.randint(70, (9,), generator=g)).backward()
        for name, p in twin.named_parameters():
            lr, decay = (LRS["decay"], 0.1) if name == "wide.weight" else (LRS["plain"], 0.0)
            update = (0.9 * moments[name] + 0.1 * p.grad).sign()
            p.data = p.data * (1 - lr * decay) - lr * update
            moments[name] = 0.99 * moments[name] + 0.01 * p.grad
    steps(net, optimizer, 4)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("kind", "names"), [("adamw8bit", ("exp_avg", "exp_avg_sq")), ("lion8bit", ("exp_avg",))])
def test_moments_of_large_matrices_are_bytes(kind, names):
    _, optimizer = make(kind, torch.bfloat16)
    state = {i.name: i.fetch() for i in optimizer.state()}
    kinds = {name.partition("/")[0] for name in state}
    assert kinds == {"step", "master", *names, *(f"{name}_scale" for name in names)}
    for name in names:
        assert state[f"{name}/wide.weight"].dtype == torch.uint8 and len(state[f"{name}_scale/wide.weight"]) == 18
        assert state[f"{name}/table.weight"].dtype == state[f"{name}/wide.bias"].dtype == torch.float32
    assert OPTIMIZERS.get(kind).moment_bytes == len(names) * (1 + 4 / 256)


@pytest.mark.parametrize("kind", ["adamw8bit", "lion8bit", "lion"])
def test_a_restored_state_continues_bit_for_bit(kind):
    net, optimizer = make(kind, torch.bfloat16, clip_norm=1.0)
    steps(net, optimizer, 3)
    saved = {i.name: i.fetch().clone() for i in optimizer.state()}
    weights = copy.deepcopy(net.state_dict())
    steps(net, optimizer, 3, seed=2)
    other, resumed = make(kind, torch.bfloat16, clip_norm=1.0)
    other.load_state_dict(weights)
    resumed.load(saved)
    steps(other, resumed, 3, seed=2)
    assert saved["step"] == 3
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_moments_of_another_optimizer_are_refused():
    net, optimizer = make("adamw")
    steps(net, optimizer, 1)
    saved = {i.name: i.fetch() for i in optimizer.state()}
    with pytest.raises(CheckpointError, match=r"'exp_avg/wide.weight' is torch.float32, expected torch.uint8"):
        make("adamw8bit")[1].load(saved)


@pytest.mark.parametrize(
    ("kind", "engine", "device", "said"),
    [
        ("paged_adamw8bit", {}, CPU, "no paged memory; set type: adamw8bit"),
        ("adamw8bit", {"type": "deepspeed", "zero_stage": 2}, CPU, "set zero_stage: 0, or type: adamw"),
        ("adamw_8bit", {}, CPU, "did you mean 'adamw8bit'"),
    ],
)
def test_what_does_not_exist_is_refused_before_training(kind, engine, device, said):
    with pytest.raises(UserError, match=rf"stages\.x\.optim\.type: .*{said}"):
        check_optimizer(OptimConfig(type=kind), EngineConfig(**engine), device, "stages.x")


def test_what_exists_is_not():
    check_optimizer(OptimConfig(type="lion8bit"), EngineConfig(type="deepspeed", zero_stage=0), CPU, "stages.x")
    check_optimizer(OptimConfig(type="paged_adamw"), EngineConfig(), torch.device("cuda"), "stages.x")
