"""The engine of the training loop as a protocol: the loop never learns which engine it drives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import ParameterGroup
from tinyllava_fast.tensors import Tensors

if TYPE_CHECKING:
    from tinyllava_fast.train.optim import MasterOptimizer


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is fetched when it is written, so that a gathered state never exists as a whole."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]
    """Returns it on any device. All processes must fetch, in order, and get the same, unless it is a piece."""
    first: int = 0
    """Of a piece: the row of the whole tensor that it begins with."""
    rows: int | None = None
    """Of a piece: the rows of the whole tensor; None: it is whole."""
    mine: bool = True
    """Whether this process writes it."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> LazyTensor:
        """A tensor that is there already."""
        held = tensor.detach()
        return cls(name, tuple(held.shape), held.dtype, lambda: held)


SavedState = Mapping[str, Sequence[LazyTensor]]
"""By the name of a checkpoint's file, "model" and "optimizer"."""


class TrainingEngine(Protocol):
    """Runs forward, backward and optimizer steps of one model on one process of ``world_size``.

    Gradients are *sums*: over the micro-batches of a step and over the ranks, each loss multiplied by the ``scale``
    given. With scale = 1 / (supervised tokens of the step over all ranks) the update is that of the mean token loss,
    whatever the packing, the accumulation and the number of processes. A weight that no pack of the step reaches, as
    the tower's without any image, has a gradient of zero: weight decay and momentum move it.
    """

    rank: int
    world_size: int
    device: torch.device
    waited_s: float | None
    """Seconds that this process has spent in collectives so far, waiting included; None: the engine cannot tell."""

    def forward_backward(self, batch: PackedBatch, scale: float) -> Tensor:
        """Accumulate the gradient of scale * (summed loss of the batch); returns what the model did, detached.

        That is the float32 loss sum [], or [1 + S] with those of the segments behind it.
        """
        ...

    def evaluate(self, batch: PackedBatch) -> Tensor:
        """Return the float32 loss sum of the batch [], without gradients, by the model as it is, in eval mode or not.

        It is never compiled. Between two steps only; every rank calls it equally often.
        """
        ...

    def step(self, lrs: Mapping[str, float], loss: Tensor | None = None) -> Tensor:
        """Clip, update with each group name's learning rate, clear gradients; returns the norm before clipping [].

        loss: this process's loss sum of the step []. With it, a step in which that or the norm is no finite number on
        any process changes nothing on all of them, and the norm returned is none either.
        """
        ...

    def gradient_square(self) -> Tensor:
        """Return the squared norm [] of the gradient that this process has summed so far in the step; of its rows.

        Not under DeepSpeed, which shows none.
        """
        ...

    def gradient_norms(self) -> Mapping[str, Tensor]:
        """Return the norm [] of each component's gradients in the last step; nothing where they are not known."""
        ...

    def loss_scale(self) -> float | None:
        """Return the factor of the loss in float16; None: it is not scaled."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are their running means, if optim.ema keeps any."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks (in place and returned)."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def model_state(self) -> Sequence[LazyTensor]:
        """All weights under their stock names, tied ones once."""
        ...

    def optimizer_state(self) -> Sequence[LazyTensor]:
        """Everything the optimizer knows, in a layout that depends neither on the engine nor on the number of ranks.

        "step" [] float32; in float16 "loss_scale" and "loss_scale_steps"; "exp_avg/<weight>", "exp_avg_sq/<weight>"
        and, for weights below float32, "master/<weight>";
        "ema/<weight>", the running means of optim.ema.
        """
        ...

    def saved_state(self) -> SavedState:
        """Return what a checkpoint holds of ``model_state`` and ``optimizer_state``, dealt to the processes.

        Each tensor, or each of its pieces, is ``mine`` in one process.
        """
        ...

    def load_optimizer_state(self, tensors: Tensors) -> None:
        """Restore what ``optimizer_state`` gave; every rank passes the same. Raises CheckpointError on a mismatch."""
        ...

    def close(self) -> None:
        """Free what the engine holds. The process group stays."""
        ...


class InGroup:
    """The collectives of an engine that runs in several processes."""

    waited_s: float | None = None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See TrainingEngine."""
        with self._waiting():
            torch.distributed.all_reduce(tensor)
        return tensor

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around collectives: count their time, where this process itself waits for them (not a GPU's queue)."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.waited_s is not None:
                self.waited_s += time.perf_counter() - began

    def barrier(self) -> None:
        """See TrainingEngine."""
        torch.distributed.barrier()


class OwnOptimizer:
    """An engine whose optimizer is ours, over the weights that this process updates."""

    _optimizer: MasterOptimizer

    def step(self, lrs: Mapping[str, float], loss: Tensor | None = None) -> Tensor:
        """See TrainingEngine."""
        return self._optimizer.step(lrs, loss)

    def gradient_square(self) -> Tensor:
        """See TrainingEngine."""
        return self._optimizer.square()

    def gradient_norms(self) -> Mapping[str, Tensor]:
        """See TrainingEngine."""
        return self._optimizer.norms

    def loss_scale(self) -> float | None:
        """See TrainingEngine."""
        return self._optimizer.loss_scale()


def whole_state(engine: TrainingEngine) -> SavedState:
    """Return the ``saved_state`` of an engine whose processes all have, or gather, whole tensors."""
    states = {"model": engine.model_state(), "optimizer": engine.optimizer_state()}
    return {name: dealt(items, engine.rank, engine.world_size) for name, items in states.items()}


def dealt(items: Sequence[LazyTensor], rank: int, world_size: int) -> list[LazyTensor]:
    """Deal tensors to the processes, to each those of about as many bytes; one after another, so all deal alike."""
    sizes = [item.dtype.itemsize * math.prod(item.shape) for item in items]
    share, before, found = max(sum(sizes), 1) / world_size, 0, []
    for item, size in zip(items, sizes, strict=True):
        owner = min(int((before + size / 2) / share), world_size - 1)
        found.append(replace(item, mine=owner == rank))
        before += size
    return found


def total(losses: Tensor) -> Tensor:
    """Return the loss sum [] of what ``LMM.forward`` returned."""
    return losses if losses.dim() == 0 else losses[0]


def trainable_names(model: nn.Module, groups: list[ParameterGroup]) -> dict[nn.Parameter, str]:
    """The weights of the groups with their names, in group order. Raises UserError if there are none."""
    names = {p: n for n, p in model.named_parameters()}
    found = {p: names[p] for group in groups for p in group["params"]}
    if not found:
        raise UserError("stages.*.recipe: llm, vision and connector are all frozen, so nothing would train")
    return found


def with_image(batch: PackedBatch, model: LMM) -> PackedBatch:
    """Give a pack without images a blank one that fills no slot; its gradients are zero.

    Processes must gather the same modules in the same order where weights are sharded, and reduce the same gradients.
    """
    if batch.pixel_values.shape[0]:
        return batch
    shape = (1, *batch.pixel_values.shape[1:])
    device = batch.input_ids.device
    nowhere = torch.full((model.tokens_per_image,), batch.input_ids.shape[0], device=device)
    return replace(batch, pixel_values=torch.zeros(shape, device=device), image_slots=nowhere)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their stock names, tied ones once, detached, not copied."""
    once = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {n: t.detach() for n, t in model.state_dict().items() if n in once or n not in every}
