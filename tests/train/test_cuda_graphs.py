"""The parts of engine.cuda_graphs that need no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyllava_fast.config.schema import EngineConfig, OptimConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.train import graph_passes
from tinyllava_fast.train.compile import CompiledForward
from tinyllava_fast.train.engine import launch
from tinyllava_fast.train.engine.torch_engine import TorchEngine

MEMORY = np.zeros(3, np.float32)


class Replayed(torch.autograd.Function):
    """Its gradient is always the same memory, as a replayed graph's is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return (weight * factor).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(MEMORY).copy_(grad * ctx.factor), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, factor: Tensor) -> Any:
        return Replayed.apply(self.weight, factor)


class Batch:
    def __init__(self, factor: float) -> None:
        self.factor = torch.tensor(factor)

    def to(self, device: torch.device) -> Batch:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {"factor": self.factor}


def test_gradients_leave_the_memory_that_is_replayed() -> None:
    norms = {}
    for copies in (False, True):
        net = Net()
        groups = [{"name": "all", "params": [net.weight], "lr": 0.0, "weight_decay": 0.0}]
        device = torch.device("cpu")
        optim = OptimConfig(betas=(0.9, 0.99), eps=1e-8, clip_norm=0.0)
        engine = TorchEngine(net, groups, optim, device=device, cuda_graphs=copies)
        for factor in (1.0, 2.0):
            engine.forward_backward(Batch(factor), 1.0)  # type: ignore[arg-type]
        norms[copies] = float(engine.step({"all": 0.0}))
    assert norms[True] == pytest.approx(3 * 3**0.5) and norms[False] != pytest.approx(norms[True])


@pytest.mark.parametrize(
    ("cuda", "settings", "message"),
    [
        (False, {"compile": True}, "the device is a CPU, which has none"),
        (True, {}, "engine.compile: False; set compile to true or auto"),
        (True, {"compile": "regional"}, "engine.compile: regional; set"),
        (True, {"compile": "auto", "type": "deepspeed", "zero_stage": 2}, "set engine.zero_stage: 0"),
    ],
)
def test_refusals(cuda: bool, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(UserError, match=message):
        launch.start_process(EngineConfig(cuda_graphs=True, threads=1, **settings))


def test_inductor_is_asked_and_a_cpu_runs_as_before() -> None:
    assert graph_passes.options(cuda_graphs=True)["triton.cudagraphs"] is True
    assert graph_passes.options()["triton.cudagraphs"] is False

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).sum()

    net = Double()
    compiled = CompiledForward(net, cuda_graphs=True)
    assert [float(net(x=torch.full((2,), value))) for value in (1.0, 3.0)] == [4.0, 12.0]
    assert compiled.graphs == 1 and compiled.recompiles == 0
    compiled.close()
    torch.compiler.reset()
