"""torch's fully sharded data parallelism (FSDP2): weights, masters and moments spread over the processes.

Each layer of tower and decoder is gathered when it runs and freed behind it; what lies between the layers is one group
more. Weights are kept and gathered in the training dtype, gradients are summed over processes in float32. Every
process updates its own rows with the optimizer of one process (train/optim.py): masters in float32, rounded by dither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes.base import ParameterGroup
from tinyllava_fast.tensors import Tensors
from tinyllava_fast.train.engine.base import (
    InGroup,
    LazyTensor,
    OwnOptimizer,
    SavedState,
    plain_state,
    total,
    trainable_names,
    with_image,
)
from tinyllava_fast.train.engine.copies import to_device
from tinyllava_fast.train.optim import MasterOptimizer, Masters

# torch 2.13 renamed both.
_GATHER = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
_SCATTER = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor


class FSDPEngine(InGroup, OwnOptimizer):
    """TrainingEngine over FSDP2. model: whole and equal in every process, of its training dtype."""

    def __init__(
        self,
        model: LMM,
        groups: list[ParameterGroup],
        optim: OptimConfig,
        *,
        device: torch.device,
        masters: Masters | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device, self.model = device, model
        self.rank, self.world_size = rank, world_size
        names = trainable_names(model, groups)
        self._shapes = {name: tuple(t.shape) for name, t in plain_state(model).items()}
        _shard(model, device, world_size)
        if device.type == "cpu":  # elsewhere the device waits, not this process
            self.waited_s = 0.0
            self._time_collectives()
        whole = {name: p for p, name in names.items()}
        self._sharded = {name: cast(DTensor, p) for name, p in model.named_parameters() if name in whole}
        # The optimizer sees this process's rows as weights of their own, which share memory with the model's.
        self._rows = {name: nn.Parameter(p.to_local().detach()) for name, p in self._sharded.items()}
        rows = {p: self._rows[name] for p, name in names.items()}
        own = {rows[p]: self._part(names[p], master) for p, master in (masters or {}).items()}
        local: list[ParameterGroup] = [{**g, "params": [rows[p] for p in g["params"]]} for g in groups]
        self._optimizer = MasterOptimizer(
            local, {rows[p]: name for p, name in names.items()}, optim, masters=own, summed=self.all_reduce_sum
        )

    def forward_backward(self, batch: PackedBatch, scale: float) -> Tensor:
        """See TrainingEngine."""
        losses: Tensor = self.model(**self._whole_pass(batch).tensors())
        self._optimizer.scaled(total(losses) * scale).backward()
        for name, p in self._sharded.items():
            if p.grad is not None:
                row, found = self._rows[name], cast(DTensor, p.grad).to_local()
                row.grad = found if row.grad is None else row.grad + found
                p.grad = None
        with torch.profiler.record_function("tlf.optimizer"):
            self._optimizer.accumulate()
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Tensor:
        """See TrainingEngine."""
        losses: Tensor = self.model(**self._whole_pass(batch).tensors())
        return total(losses)

    def _time_collectives(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # torch's base classes of these are private, so mypy knows no public one.
                module.set_custom_all_gather(_Timed(_GATHER, self._waiting))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(_Timed(_SCATTER, self._waiting))  # type: ignore[arg-type]

    def _whole_pass(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch on the device, such that every process calls the same modules with it."""
        moved = to_device(batch, self.device)
        return moved if self.world_size == 1 else with_image(moved, self.model)

    def averaged(self) -> AbstractContextManager[None]:
        """See TrainingEngine: it keeps none (check_optimizer)."""
        return nullcontext()

    def model_state(self) -> Sequence[LazyTensor]:
        """See TrainingEngine."""
        state = plain_state(self.model)
        return [
            LazyTensor(name, shape, state[name].dtype, partial(_whole, state[name]))
            for name, shape in self._shapes.items()
        ]

    def optimizer_state(self) -> Sequence[LazyTensor]:
        """See TrainingEngine."""
        return [self._gathered(item) for item in self._optimizer.state()]

    def saved_state(self) -> SavedState:
        """See TrainingEngine: each process saves its rows, so nothing is gathered."""
        model = [self._own(LazyTensor.of(n, _local(t)), n, t) for n, t in plain_state(self.model).items()]
        names = [(item, item.name.partition("/")[2]) for item in self._optimizer.state()]
        return {"model": model, "optimizer": [self._own(item, n, self._sharded.get(n)) for item, n in names]}

    def load_optimizer_state(self, tensors: Tensors) -> None:
        """See TrainingEngine: each process reads its rows alone."""
        self._optimizer.load(_Parts(tensors, self._of_this_process))

    def close(self) -> None:
        """See TrainingEngine."""
        for p in self._rows.values():
            p.grad = None

    def _gathered(self, item: LazyTensor) -> LazyTensor:
        name = item.name.partition("/")[2]
        if not name:
            return item
        like = self._sharded[name]

        def fetch() -> Tensor:
            rows = item.fetch()
            part = DTensor.from_local(
                rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
            return _whole(part)

        return LazyTensor(item.name, self._shapes[name], item.dtype, fetch)

    def _own(self, item: LazyTensor, name: str, whole: Tensor | None) -> LazyTensor:
        """Return this process's rows of a sharded tensor as it saves them; the first process saves what all have."""
        if not isinstance(whole, DTensor):
            return replace(item, mine=self.rank == 0)
        rows = self._shapes[name][0]
        mine = item.shape[0] > 0 or (rows == 0 and self.rank == 0)
        return replace(item, first=self._first_row(whole), rows=rows, mine=mine)

    def _first_row(self, whole: DTensor) -> int:
        """Return the row that this process's begin with: ``fully_shard`` cuts as torch.chunk does."""
        return min(-(-whole.shape[0] // self.world_size) * self.rank, whole.shape[0])

    def _of_this_process(self, key: str, tensors: Tensors) -> Tensor:
        """Return the rows of this process of a tensor of the optimizer's state."""
        name = key.partition("/")[2]
        if name not in self._sharded or tensors.shapes.get(key) != self._shapes[name]:
            return tensors[key]  # of the wrong shape: MasterOptimizer.load says so
        first = self._first_row(self._sharded[name])
        return tensors.rows(key, first, first + self._rows[name].shape[0]).to(self.device)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        like = self._sharded[name]
        # src_data_rank=None: every process has the whole tensor, none has to send it.
        part = distribute_tensor(whole.to(self.device), like.device_mesh, like.placements, src_data_rank=None)
        return part.to_local().clone()


class _Timed:
    """A collective as FSDP2 calls it, inside a context of ours."""

    def __init__(self, collective: Callable[..., Work | None], around: Callable[[], AbstractContextManager[None]]):
        self._collective, self._around = collective, around

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for the result."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, *args: object, **options: object
    ) -> Work | None:
        """Run the collective."""
        with self._around():
            return self._collective(output_tensor, input_tensor, *args, group=group, **options)


class _Parts(Mapping[str, Tensor]):
    """A state's tensors, of each the rows of this process."""

    def __init__(self, tensors: Tensors, part: Callable[[str, Tensors], Tensor]) -> None:
        self._tensors, self._part = tensors, part

    def __getitem__(self, name: str) -> Tensor:
        return self._part(name, self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _shard(model: LMM, device: torch.device, world_size: int) -> None:
    """Shard each layer, then the rest, over all processes."""
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: the loop has divided
            module.set_force_sum_reduction_for_comms(True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
