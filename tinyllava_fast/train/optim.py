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
from tinyllava_fast.train.loss_scale import LossScale
from tinyllava_fast.train.optimizers.base import Gradients, Group, OptimizerSettings, find_optimizer

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
        self._scale = LossScale(low[0].device) if any(p.dtype == torch.float16 for p in low) else None
        # Names of the components, and of each gradient the number of its own.
        components = [name.partition(".")[0] for name in names.values()]
        self._components = list(dict.fromkeys(components))
        self._component_of = {p: self._components.index(c) for p, c in zip(names, components, strict=True)}
        self.norms: dict[str, Tensor] = {}
        """Gradient norm of each component in the last step, [] float32, before clipping."""
        self._owner: tuple[list[int], Tensor] | None = None  # of the gradients of the last step
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

    @torch.no_grad()
    def square(self) -> Tensor:
        """Return the squared norm of the gradients so far, [] on their device; without a loss scale."""
        found = [gradient for p in self._updated if (gradient := self._found.get(p, p.grad)) is not None]
        if not found:
            return torch.zeros(())
        if self._optimizer.fused:
            whole = torch.stack([square_sum.infer(gradient) for gradient in found]).sum()
        else:
            whole = torch.stack(torch._foreach_norm(found, 2, torch.float32)).double().square().sum()
        return whole if self._scale is None else whole * self._scale.factor().double().square()

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss as it goes into the backward pass: in float16 it is scaled."""
        return loss if self._scale is None else self._scale.scaled(loss)

    def loss_scale(self) -> float | None:
        """Return the factor of the loss in float16; it waits for the device. None: it is not scaled."""
        return None if self._scale is None else self._scale.value()

    def step(self, lrs: Mapping[str, float], loss: Tensor | None = None) -> Tensor:
        """Update once and return the gradient norm before clipping, [] float32. lrs: of each group name.

        loss: the step's loss sum [], of this process where ``summed`` is given, else of all. With it, and in float16, a
        step whose loss or norm is no finite number changes nothing, and its norm is none either.
        """
        if not self._optimizer.fused or self._scale is not None:
            self.gradients()
        found = {updated: self._found.get(p, p.grad) for p, updated in self._updated.items()}
        norm = self._norm([gradient for gradient in found.values() if gradient is not None], loss)
        if self._scale is not None:
            factor = self._scale.factor()
            torch._foreach_mul_([gradient for gradient in found.values() if gradient is not None], factor)
            self.norms = {name: part * factor for name, part in self.norms.items()}
            norm = self._scale.settle(norm)
        guarded = loss is not None or self._scale is not None
        if self._update(found, norm, lrs, guarded):
            self._average()
        for p in self._plain:
            p.grad = None
        self._found = {}
        return norm

    def _update(self, found: Gradients, norm: Tensor, lrs: Mapping[str, float], guarded: bool) -> bool:
        """Let the optimizer update, and return whether it was told to. guarded: not if the norm is no number."""
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = lrs[group["name"]]
        optimizer.skip = None
        if guarded and optimizer.skips and not self._means:
            # The kernel looks at it, so that the host need not wait for the norm.
            optimizer.skip = (~norm.isfinite()).float()
            optimizer.skipped = optimizer.skip if optimizer.skipped is None else optimizer.skipped + optimizer.skip
        elif guarded and not bool(norm.isfinite()):
            return False
        optimizer.steps += 1
        optimizer.step(found, norm, self._clip_norm)
        if not optimizer.fused:
            self._round()
        return True

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

    def _norm(self, gradients: list[Tensor], loss: Tensor | None) -> Tensor:
        """Return the norm of the gradients, nan where the loss is no finite number; note those of the components."""
        if not gradients:
            norm, squares = torch.zeros(()), torch.zeros(0)
        elif self._optimizer.fused and gradients[0].is_cpu:
            squares = torch.stack([square_sum.infer(gradient) for gradient in gradients])
            norm = squares.sum().sqrt().float()
        else:
            norms = _norms(gradients)
            norm, squares = torch.linalg.vector_norm(norms), norms.square()
        parts = squares.new_zeros(len(self._components)).index_add_(0, self._owners(squares), squares)
        if self._summed is not None:
            own = [norm.square()[None], parts] + ([] if loss is None else [loss.detach().to(parts)[None]])
            over = self._summed(torch.cat(own))
            norm, parts = over[0].sqrt(), over[1 : len(parts) + 1]
            loss = None if loss is None else over[-1]
        self.norms = dict(zip(self._components, parts.sqrt().float().unbind(), strict=True))
        return norm if loss is None else torch.where(loss.isfinite(), norm, torch.nan)

    def _owners(self, like: Tensor) -> Tensor:
        """Return the number of the component of each gradient that is there, on the device of ``like``."""
        present = [self._component_of[p] for p in self._updated if p in self._found or p.grad is not None]
        if self._owner is None or self._owner[0] != present:
            self._owner = present, torch.tensor(present, dtype=torch.int64, device=like.device)
        return self._owner[1]

    @torch.no_grad()
    def _round(self) -> None:
        for p, master in zip(self._low, self._masters, strict=True):
            dither(master, p)

    def state(self) -> list[LazyTensor]:
        """Step count, moments and masters by weight name (see TrainingEngine.optimizer_state)."""
        if self._optimizer.skipped is not None:
            self._optimizer.steps -= int(self._optimizer.skipped)
            self._optimizer.skipped = None
        items = [LazyTensor.of("step", torch.tensor(float(self._optimizer.steps)))]
        scale = {} if self._scale is None else self._scale.state()
        items += [LazyTensor.of(name, tensor) for name, tensor in scale.items()]
        for p, updated in self._updated.items():
            for kind, tensor in self._optimizer.state(updated).items():
                items.append(LazyTensor.of(f"{kind}/{self._names[p]}", tensor))
            if updated is not p:
                items.append(LazyTensor.of(f"master/{self._names[p]}", updated))
        return items + [LazyTensor.of(f"{MEAN}{self._names[p]}", mean) for p, mean in self._means.items()]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore ``state()``; a master that the file lacks (a float32 run's) keeps the loaded weight's value."""
        if self._scale is not None:
            self._scale.load(tensors)
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


def _norms(gradients: list[Tensor]) -> Tensor:
    """The norm of each gradient [N], float32, in one call a dtype."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        places = [place for place, gradient in enumerate(gradients) if gradient.dtype == dtype]
        alike = [gradients[place] for place in places]
        # else those of bfloat16 gradients come in bfloat16
        norms = (
            torch._foreach_norm(alike) if dtype == torch.float32 else torch._foreach_norm(alike, dtype=torch.float32)
        )
        found |= dict(zip(places, norms, strict=True))
    return torch.stack([found[place] for place in range(len(gradients))])


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
