"""Updates of float32 values, whatever the dtype of the weights.

A weight below float32 gets a float32 master: an update of 1e-5 is less than half a unit in the last place of a typical
bf16 weight and would be rounded away. Sums over micro-batches lose bits likewise, so the second micro-batch of a step
makes float32 sums; the gradient of a single one stays as it came, which is the same number in half the memory. float32
weights are updated in place and cost nothing extra. The arithmetic is the optimizer's (train/optimizers/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinyllava_fast.config.schema import OptimConfig
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.models.hf import cast_parameters
from tinyllava_fast.ops.adamw import dither, square_sum
from tinyllava_fast.recipes.base import ParameterGroup
from tinyllava_fast.train.engine.base import LazyTensor
from tinyllava_fast.train.optimizers.base import Group, OptimizerSettings, find_optimizer

Masters = Mapping[nn.Parameter, Tensor]
MEAN = "ema/"
"""What the names of running means begin with in the optimizer's state."""


class MasterOptimizer:
    """An optimizer with masters, float32 accumulation and clipping.

    groups: as apply_recipe returns them. names: weight -> stock name, for the saved state. masters: float32 values of
    weights below float32; one that is missing starts at its rounded weight. exact: weights whose moments stay float32
    in the 8-bit optimizers. summed: sums a tensor over processes, each of which has other rows of the weights.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        names: Mapping[nn.Parameter, str],
        optim: OptimConfig,
        *,
        masters: Masters | None = None,
        exact: Set[Tensor] = frozenset(),
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        kind, options = find_optimizer(optim)
        self._summed = summed
        self._names = dict(names)
        self._clip_norm = optim.clip_norm
        low = [p for p in names if p.dtype != torch.float32]
        known = masters or {}
        self._low: list[Tensor] = list(low)
        self._masters = [known[p] if p in known else p.detach().float() for p in low]
        # Gradients of this step: as its only micro-batch so far left them, or float32 sums.
        self._found: dict[Tensor, Tensor] = {}
        self._plain = [p for p in names if p.dtype == torch.float32]
        master_of = dict(zip(self._low, self._masters, strict=True))
        self._updated = {p: master_of.get(p, p) for p in names}  # weight -> the tensor that the optimizer updates
        own: list[Group] = [{**g, "params": [self._updated[p] for p in g["params"]]} for g in groups if g["params"]]
        kept = frozenset(updated for p, updated in self._updated.items() if p in exact)
        weights = dict(zip(self._masters, self._low, strict=True))
        chosen = OptimizerSettings(betas=optim.betas, eps=optim.eps, options=options, exact=kept, weights=weights)
        self._optimizer = kind.build(own, chosen)
        self._decay = optim.ema
        # Running means of what the optimizer updates, float32.
        self._means = {p: updated.detach().clone() for p, updated in self._updated.items()} if optim.ema else {}

    def accumulate(self) -> None:
        """Take in the gradients of one micro-batch. float32 weights accumulate by themselves."""
        fresh = {p: p.grad for p in self._low if p.grad is not None}
        again = [p for p in fresh if p in self._found]
        for p in again:
            self._found[p] = self._found[p].float()
        if again:
            torch._foreach_add_([self._found[p] for p in again], [fresh[p] for p in again])
        self._found = {**fresh, **self._found}
        for p in fresh:
            p.grad = None

    def step(self, lrs: Mapping[str, float]) -> Tensor:
        """Update once and return the gradient norm before clipping, [] float32. lrs: of each group name."""
        if not self._optimizer.fused:
            self.gradients()
        found = {updated: self._found.get(p, p.grad) for p, updated in self._updated.items()}
        norm = self._norm([gradient for gradient in found.values() if gradient is not None])
        for group in self._optimizer.param_groups:
            group["lr"] = lrs[group["name"]]
        self._optimizer.steps += 1
        self._optimizer.step(found, norm, self._clip_norm)
        if not self._optimizer.fused:
            self._round()
        for p in self._plain:
            p.grad = None
        self._found = {}
        self._average()
        return norm

    @torch.no_grad()
    def _average(self) -> None:
        """Move the means towards the weights, faster in the first steps, which would else remember the start."""
        if self._means:
            steps = self._optimizer.steps
            decay = min(self._decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(list(self._means.values()), [self._updated[p] for p in self._means], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the weights be their running means inside; afterwards they are what they were, bit for bit."""
        held = {p: p.detach().clone() for p in self._means}
        with torch.no_grad():
            for p, mean in self._means.items():
                p.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weight in held.items():
                    p.copy_(weight)

    def gradients(self) -> list[Tensor]:
        """The float32 gradients summed so far, in the order of the weights' dtypes; zero where there is none.

        No image in the whole step: zero, as a padded blank image would give.
        """
        for p, master in zip(self._low, self._masters, strict=True):
            self._found[p] = self._found[p].float() if p in self._found else torch.zeros_like(master)
        for p in self._plain:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [self._found[p] for p in self._low] + [p.grad for p in self._plain if p.grad is not None]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = self._own_norm(gradients)
        return norm if self._summed is None else self._summed(norm.square()).sqrt()

    def _own_norm(self, gradients: list[Tensor]) -> Tensor:
        if not self._optimizer.fused:
            return torch.nn.utils.get_total_norm(gradients, foreach=True)
        squares = [square_sum.infer(gradient) for gradient in gradients]
        return torch.stack(squares).sum().sqrt().float() if squares else torch.zeros(())

    @torch.no_grad()
    def _round(self) -> None:
        for p, master in zip(self._low, self._masters, strict=True):
            dither(master, p)

    def state(self) -> list[LazyTensor]:
        """Step count, moments and masters by weight name (see TrainingEngine.optimizer_state)."""
        items = [LazyTensor.of("step", torch.tensor(float(self._optimizer.steps)))]
        for p, updated in self._updated.items():
            for kind, tensor in self._optimizer.state(updated).items():
                items.append(LazyTensor.of(f"{kind}/{self._names[p]}", tensor))
            if updated is not p:
                items.append(LazyTensor.of(f"master/{self._names[p]}", updated))
        return items + [LazyTensor.of(f"{MEAN}{self._names[p]}", mean) for p, mean in self._means.items()]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore ``state()``; a master that the file lacks (a float32 run's) keeps the loaded weight's value."""
        for p, updated in self._updated.items():
            name = self._names[p]
            kept = self._optimizer.state(updated).items()
            state = {kind: checked(tensors, f"{kind}/{name}", like, like.dtype) for kind, like in kept}
            if "step" not in tensors:
                raise CheckpointError("optimizer state: 'step' is missing; the checkpoint is not one of this toolkit")
            self._optimizer.steps = int(tensors["step"])
            self._optimizer.load(updated, state)
            if updated is not p and f"master/{name}" in tensors:
                updated.copy_(checked(tensors, f"master/{name}", p))
            if p in self._means:  # a checkpoint of steps without them lets them begin here
                known = f"{MEAN}{name}" in tensors
                self._means[p].copy_(checked(tensors, f"{MEAN}{name}", p) if known else updated)
        self._round()


def lower(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """Cast the weights to dtype in place and return the float32 values of those that train and lost bits.

    Masters that start at rounded weights sit on the coarse grid: until an update crosses half of its spacing the
    weights do not move at all, and at usual learning rates that takes several steps (docs/LOG.md).
    """
    precise = {
        p: p.detach() for p in model.parameters() if p.requires_grad and p.dtype == torch.float32 and dtype != p.dtype
    }
    cast_parameters(model, dtype)
    return precise


def checked(tensors: Mapping[str, Tensor], name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """tensors[name], whose shape must be that of ``like``, and its dtype as given. Raises CheckpointError naming it."""
    if name not in tensors:
        raise CheckpointError(f"optimizer state: {name!r} is missing; the checkpoint trained other components")
    found = tensors[name]
    if found.shape != like.shape:
        raise CheckpointError(f"optimizer state: {name!r} has shape {list(found.shape)}, expected {list(like.shape)}")
    if dtype is not None and found.dtype != dtype:
        raise CheckpointError(f"optimizer state: {name!r} is {found.dtype}, expected {dtype}: optim.type was another")
    return found
