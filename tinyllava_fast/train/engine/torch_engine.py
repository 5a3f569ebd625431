"""Plain torch: one process, or several with whole copies of the model (ZeRO 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.recipes.base import ParameterGroup
from tinyllava_fast.train.engine.base import (
    InGroup,
    LazyTensor,
    OwnOptimizer,
    SavedState,
    plain_state,
    total,
    trainable_names,
    whole_state,
)
from tinyllava_fast.train.engine.copies import to_device
from tinyllava_fast.train.optim import MasterOptimizer, Masters


class TorchEngine(OwnOptimizer):
    """TrainingEngine of a single process. model: already on ``device`` and of its training dtype.

    cuda_graphs: gradients come out of memory that the next replay writes to, so they are copied.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParameterGroup],
        optim: OptimConfig,
        *,
        device: torch.device,
        masters: Masters | None = None,
        cuda_graphs: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device, self._cuda_graphs = device, cuda_graphs
        self.rank, self.world_size = rank, world_size
        self.waited_s: float | None = 0.0 if device.type == "cpu" else None
        self.model = model
        names = trainable_names(model, groups)
        exact = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        self._optimizer = MasterOptimizer(groups, names, optim, masters=masters, exact=exact)

    def forward_backward(self, batch: PackedBatch, scale: float) -> Tensor:
        """See TrainingEngine."""
        losses = self.model(**to_device(batch, self.device).tensors())
        if losses.requires_grad:  # a text-only pack in a stage that trains the connector alone has no gradient
            self._optimizer.scaled(total(losses) * scale).backward()
            if self._cuda_graphs:
                for p in self.model.parameters():
                    p.grad = None if p.grad is None else p.grad.clone()
            with torch.profiler.record_function("tlf.optimizer"):
                self._optimizer.accumulate()
        return losses.detach().clone() if self._cuda_graphs else losses.detach()

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Tensor:
        """See TrainingEngine."""
        losses: Tensor = type(self.model).forward(self.model, **to_device(batch, self.device).tensors())
        return total(losses)

    def averaged(self) -> AbstractContextManager[None]:
        """See TrainingEngine."""
        return self._optimizer.averaged()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See TrainingEngine."""
        return tensor

    def barrier(self) -> None:
        """See TrainingEngine."""

    def model_state(self) -> Sequence[LazyTensor]:
        """See TrainingEngine."""
        return [LazyTensor.of(name, tensor) for name, tensor in plain_state(self.model).items()]

    def optimizer_state(self) -> Sequence[LazyTensor]:
        """See TrainingEngine."""
        return self._optimizer.state()

    def saved_state(self) -> SavedState:
        """See TrainingEngine."""
        return whole_state(self)

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See TrainingEngine."""
        self._optimizer.load(tensors)

    def close(self) -> None:
        """See TrainingEngine."""
        for p in self.model.parameters():
            p.grad = None


class DataParallelEngine(InGroup, TorchEngine):
    """Every process holds the whole model and optimizer; float32 gradients are summed over them before each update."""

    def step(self, lrs: Mapping[str, float], loss: Tensor | None = None) -> Tensor:
        """See TrainingEngine."""
        known = None if loss is None else loss.detach().clone()
        tensors = self._optimizer.gradients() + ([] if known is None else [known])
        with self._waiting():
            pending = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in pending:
                work.wait()
        return super().step(lrs, known)
