"""Which operators make the host wait for a GPU: a dispatch mode that notes them, for tests without one.

The device "meta" stands for the GPU: its tensors have only shapes, and what asks for a number of theirs fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyllava_fast.ops._op import Op

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "is_nonzero",
    "repeat_interleave.Tensor",
)
"""Operators whose result, or its shape, is a number on the device. Indexing with a mask is a nonzero."""


class Operators(TorchDispatchMode):
    """Notes every operator called inside, and those that wait. device: the type of device that stands for the GPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.called: list[str] = []
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.called.append(name)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        if not any(t.device.type == self.device for t in inputs):
            return out
        mask = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in self._indices(args))
        if mask or name.startswith(WAITING):
            self.waiting.append(name)
        elif self.device != "cpu" and any(isinstance(t, Tensor) and t.is_cpu for t in tree_leaves(out)):
            self.waiting.append(f"{name} to the host")
        return out

    @staticmethod
    def _indices(args: Any) -> list[Tensor]:
        return [t for t in tree_leaves(args[1]) if isinstance(t, Tensor)] if len(args) > 1 else []


@pytest.fixture
def ops_are_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every op run through the dispatcher, where tensors that have only shapes find its shapes."""
    monkeypatch.setattr(Op, "infer", lambda self, *args, **kwargs: self.op(*args, **kwargs))
