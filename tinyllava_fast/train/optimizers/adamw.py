"""AdamW (arXiv 1711.05101): torch's fused kernel, or one pass of ours over memory.

Masters are updated from gradients as they come and rounded into their weights in the same pass (ops/adamw.py). float32
weights, which have neither, stay with torch's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.ops.adamw import adamw, step_scalars
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, Gradients, Optimizer, OptimizerSettings, ParamGroups

MOMENTS = ("exp_avg", "exp_avg_sq")


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """torch.optim.AdamW's fused kernel. Clipping costs no pass over memory: the kernel divides by grad_scale."""

    moment_bytes = 8.0
    skips = True

    def __init__(self, groups: ParamGroups, settings: OptimizerSettings) -> None:
        super().__init__(groups, settings)
        own = [{**g, "betas": self.betas, "eps": self.eps} for g in groups]
        self._adamw = torch.optim.AdamW(own, fused=True)
        self.param_groups = cast(ParamGroups, self._adamw.param_groups)

    @classmethod
    def check(cls, engine: EngineConfig, device: torch.device, where: str) -> None:
        """Accept every engine and device."""

    @classmethod
    def build(cls, groups: ParamGroups, settings: OptimizerSettings) -> Optimizer:
        """Return the one-pass optimizer where there are masters."""
        if settings.weights:
            return FusedAdamW(groups, settings)
        return cls(groups, settings)

    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Optimizer."""
        for p, gradient in gradients.items():
            p.grad = gradient
        if clip_norm > 0:
            self._adamw.grad_scale = torch.clamp((norm + 1e-6) / clip_norm, min=1.0)  # type: ignore[attr-defined]
        self._adamw.found_inf = self.skip  # type: ignore[attr-defined]
        self._adamw.step()
        for p in gradients:
            p.grad = None

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Optimizer."""
        known = self._adamw.state.get(parameter)
        return {name: known[name] if known else torch.zeros_like(parameter) for name in MOMENTS}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """See Optimizer."""
        step = torch.tensor(float(self.steps), device=parameter.device)
        self._adamw.state[parameter] = {"step": step, **{k: t.to(parameter) for k, t in tensors.items()}}


class FusedAdamW(Optimizer):
    """AdamW in one pass over memory: gradient, clipping, moments, master, weight."""

    moment_bytes = AdamW.moment_bytes
    fused = True
    skips = True

    def __init__(self, groups: ParamGroups, settings: OptimizerSettings) -> None:
        super().__init__(groups, settings)
        self._weights = dict(settings.weights)
        self._moments: dict[Tensor, dict[str, Tensor]] = {}  # there from the first step on
        self._devices = list(dict.fromkeys(p.device for group in groups for p in group["params"]))

    @torch.no_grad()
    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Optimizer."""
        factor = torch.ones_like(norm, dtype=torch.float64)
        if clip_norm > 0:
            factor = 1.0 / torch.clamp((norm + 1e-6) / clip_norm, min=1.0).double()
        if self.skip is not None:
            factor = torch.where(self.skip > 0, torch.nan, factor)
        number = self.steps if self.skipped is None else self.steps - self.skipped
        on = {device: step_scalars(factor, self.betas, number).to(device) for device in self._devices}
        for group in self.param_groups:
            settings = (group["lr"], group["weight_decay"], *self.betas, self.eps)
            for p in group["params"]:
                if p not in self._moments:
                    self._moments[p] = self.state(p)
                exp_avg, exp_avg_sq = self._moments[p].values()
                adamw.infer(p, exp_avg, exp_avg_sq, self._weights.get(p), gradients[p], on[p.device], *settings)

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Optimizer."""
        return self._moments.get(parameter) or {name: torch.zeros_like(parameter) for name in MOMENTS}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """See Optimizer."""
        self._moments[parameter] = {name: tensors[name].to(parameter) for name in MOMENTS}
