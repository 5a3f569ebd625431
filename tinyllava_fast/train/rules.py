"""The update rules behind ``optim.type``: AdamW, torch's or in one pass of our own, and what bitsandbytes has.

All update float32 tensors: weights, or the masters of weights below float32 (train/optim.py). Masters on a CPU are
updated from gradients as they come and rounded into their weights in the same pass over memory (ops/adamw.py); float32
weights, which have neither, stay with torch's kernel. bitsandbytes' 8-bit rules keep each moment as one byte
a weight and a float32 scale for every 256 of them (arXiv 2110.02861); weights of fewer than 4,096 elements, and
embeddings, whose rows move at very different rates, keep float32 moments. Its paged rules keep moments in memory that
CUDA moves to the host when the GPU is full. On a CPU bitsandbytes 0.50 has the 8-bit rules (it widens one weight's
moments at a time), but no paging: it would warn and go on without, so that is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from tinyllava_fast.config.schema import EngineConfig, OptimConfig, OptimizerType
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.ops.adamw import adamw

Groups = list[dict[str, Any]]
Gradients = Mapping[Tensor, Tensor | None]
"""Tensor that a rule updates -> its gradient, None: zero."""
BLOCK = 256  # weights that share a scale
SMALLEST = 4096  # elements of a weight whose moments are kept in 8 bits
_SAVED = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}


class Rule(Protocol):
    """Updates float32 tensors.

    fused: takes gradients of any dtype, absent ones too, and rounds masters into their weights. The others need a
    float32 gradient of every tensor.
    """

    param_groups: list[dict[str, Any]]
    fused: bool

    @property
    def steps(self) -> int:
        """Updates done so far."""
        ...

    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """One update with gradients scaled so that their norm is at most clip_norm (0: as they are)."""
        ...

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept for one weight, by the names of a checkpoint; zero before the first step."""
        ...

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restore ``state`` of one weight, as it was after so many steps."""
        ...


def check_rule(optim: OptimConfig, engine: EngineConfig, device: torch.device, where: str) -> None:
    """Raise UserError for a rule that this engine or device does not have. where: key of the stage, for the message."""
    kind, key = optim.type, f"{where}.optim.type"
    if kind not in get_args(OptimizerType):
        raise UserError(f"{key}: {kind!r}; {nearest(kind, get_args(OptimizerType))}")
    if kind == "adamw":
        return
    import_bitsandbytes(f"{key}: {kind}")
    if engine.type == "deepspeed" and engine.zero_stage > 0:
        raise UserError(
            f"{key}: {kind} with engine.zero_stage: {engine.zero_stage}, whose flat partitions cut weights anywhere, "
            "so that scales and checkpoints would depend on the number of processes; set zero_stage: 0, or type: adamw"
        )
    if kind.startswith("paged_") and device.type == "cpu":
        raise UserError(
            f"{key}: {kind} on a CPU, where bitsandbytes has no paged memory; set type: {kind.removeprefix('paged_')}"
        )


def build_rule(
    kind: str,
    groups: Groups,
    *,
    betas: tuple[float, float],
    eps: float,
    exact: Set[Tensor] = frozenset(),
    weights: Mapping[Tensor, Tensor] | None = None,
) -> Rule:
    """The rule of optim.type over float32 tensors.

    exact: those whose moments stay float32 in the 8-bit rules. weights: master -> the weight that it is rounded into.
    """
    if kind == "adamw":
        if weights and all(p.is_cpu for p in weights):
            return FusedAdamW(groups, weights, betas=betas, eps=eps)
        return TorchAdamW(groups, betas=betas, eps=eps)
    return BitsAndBytes(kind, groups, betas=betas, eps=eps, exact=exact)


def moment_bytes(kind: str) -> float:
    """Bytes of moments a weight, of large matrices."""
    moments = 1 if "lion" in kind.split("_")[-1] else 2
    return moments * (1 + 4 / BLOCK if kind.endswith("8bit") else 4)


class TorchAdamW:
    """torch.optim.AdamW's fused kernel. Clipping costs no pass over memory: the kernel divides by grad_scale."""

    kinds = ("exp_avg", "exp_avg_sq")
    fused = False

    def __init__(self, groups: Groups, *, betas: tuple[float, float], eps: float) -> None:
        self._adamw = torch.optim.AdamW([{**g, "betas": betas, "eps": eps} for g in groups], fused=True)
        self.param_groups = self._adamw.param_groups

    @property
    def steps(self) -> int:
        """See Rule."""
        return int(next(iter(self._adamw.state.values()))["step"]) if self._adamw.state else 0

    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Rule."""
        for p, gradient in gradients.items():
            p.grad = gradient
        if clip_norm > 0:
            self._adamw.grad_scale = torch.clamp((norm + 1e-6) / clip_norm, min=1.0)  # type: ignore[attr-defined]
        self._adamw.step()
        for p in gradients:
            p.grad = None

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Rule."""
        known = self._adamw.state.get(parameter)
        return {kind: known[kind] if known else torch.zeros_like(parameter) for kind in self.kinds}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor], steps: int) -> None:
        """See Rule."""
        step = torch.tensor(float(steps), device=parameter.device)
        self._adamw.state[parameter] = {"step": step, **{k: t.to(parameter) for k, t in tensors.items()}}


class FusedAdamW:
    """AdamW in one pass over memory: gradient, clipping, moments, master, weight. weights: see build_rule."""

    fused = True

    def __init__(
        self, groups: Groups, weights: Mapping[Tensor, Tensor], *, betas: tuple[float, float], eps: float
    ) -> None:
        self.param_groups = [dict(g) for g in groups]
        self.steps = 0
        self._weights, self._betas, self._eps = dict(weights), betas, eps
        self._moments: dict[Tensor, dict[str, Tensor]] = {}  # there from the first step on

    @torch.no_grad()
    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Rule."""
        factor = 1.0 / float(torch.clamp((norm + 1e-6) / clip_norm, min=1.0)) if clip_norm > 0 else 1.0
        self.steps += 1
        for group in self.param_groups:
            settings = (factor, group["lr"], group["weight_decay"], *self._betas, self._eps, self.steps)
            for p in group["params"]:
                if p not in self._moments:
                    self._moments[p] = self.state(p)
                adamw.infer(p, *self._moments[p].values(), self._weights.get(p), gradients[p], *settings)

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Rule."""
        return self._moments.get(parameter) or {kind: torch.zeros_like(parameter) for kind in TorchAdamW.kinds}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor], steps: int) -> None:
        """See Rule."""
        self._moments[parameter] = {kind: tensors[kind].to(parameter) for kind in TorchAdamW.kinds}
        self.steps = steps


class BitsAndBytes:
    """AdamW and Lion (arXiv 2302.06675) of bitsandbytes."""

    fused = False

    def __init__(
        self, kind: str, groups: Groups, *, betas: tuple[float, float], eps: float, exact: Set[Tensor]
    ) -> None:
        bnb = import_bitsandbytes(f"optim.type: {kind}").optim
        name = kind.removeprefix("paged_")
        settings: dict[str, Any] = {"betas": betas, "is_paged": name != kind, "min_8bit_size": SMALLEST}
        settings["optim_bits"] = 8 if name.endswith("8bit") else 32
        if name.startswith("lion"):
            self._rule = bnb.Lion(groups, **settings)
        else:
            self._rule = bnb.AdamW(groups, **settings, eps=eps)
        self.param_groups = self._rule.param_groups
        for index, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                self._rule.init_state(group, p, index, place)
                if p in exact:  # it looks at the moments, not at optim_bits, to choose the update
                    moments = [k for k in ("state1", "state2") if k in self._rule.state[p]]
                    self._rule.state[p] = {"step": 0, **{k: torch.zeros_like(p, requires_grad=False) for k in moments}}

    @property
    def steps(self) -> int:
        """See Rule."""
        return int(next(iter(self._rule.state.values()))["step"])

    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Rule."""
        for p, gradient in gradients.items():
            p.grad = gradient
        if clip_norm > 0:
            grads = [gradient for gradient in gradients.values() if gradient is not None]
            torch._foreach_mul_(grads, torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
        self._rule.step()
        for p in gradients:
            p.grad = None

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Rule."""
        known = self._rule.state[parameter]
        return {name: known[own] for name, own in _SAVED.items() if own in known}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor], steps: int) -> None:
        """See Rule."""
        known = self._rule.state[parameter]
        for name, tensor in tensors.items():
            known[_SAVED[name]].copy_(tensor)
        known["step"] = steps


def import_bitsandbytes(what: str) -> Any:
    """The bitsandbytes module. Raises UserError if it does not import. what: needs it, for the message."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"{what} needs bitsandbytes, which does not import ({error}); pip install 'tinyllava-fast[train]'"
        ) from None
    return bitsandbytes
