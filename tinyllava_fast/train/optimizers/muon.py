"""Muon (torch.optim's): matrices are updated by their momentum made orthogonal, everything else by AdamW.

Embeddings, and output heads that are tied to them, are AdamW's too, as the 8-bit rules keep them exact. With the
default adjustment an update of a matrix is as large as AdamW's, so that the learning rates of AdamW hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinyllava_fast.config.ranges import PositiveInt, ShareBelowOne
from tinyllava_fast.train.optimizers.adamw import MOMENTS
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, Gradients, Optimizer, OptimizerSettings, ParamGroups

_MOMENTUM = "momentum_buffer"


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """torch.optim.Muon on matrices beside torch.optim.AdamW on the rest."""

    moment_bytes = 4.0

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of muon."""

        momentum: ShareBelowOne = 0.95
        """Decay of the running mean of a matrix's gradient."""
        nesterov: bool = True
        """Look ahead by one more step of momentum."""
        steps: PositiveInt = 5
        """Steps of the iteration that makes the momentum orthogonal."""
        scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
        """original: by sqrt(max(1, rows / columns)); match_rms_adamw: updates as large as AdamW's."""

    def __init__(self, groups: ParamGroups, settings: OptimizerSettings) -> None:
        super().__init__(groups, settings)
        options: Muon.Options = self.options
        matrices = {p for g in groups for p in g["params"] if p.dim() == 2 and p not in settings.exact}
        muons, rest = (
            [{**group, "params": [p for p in group["params"] if (p in matrices) == wanted]} for group in groups]
            for wanted in (True, False)
        )
        self._muon: torch.optim.Muon | None = None
        self._adamw: torch.optim.AdamW | None = None
        if muons := [group for group in muons if group["params"]]:
            self._muon = torch.optim.Muon(
                muons,
                momentum=options.momentum,
                nesterov=options.nesterov,
                ns_steps=options.steps,
                adjust_lr_fn=options.scale,
            )
        if rest := [{**group, "betas": self.betas, "eps": self.eps} for group in rest if group["params"]]:
            self._adamw = torch.optim.AdamW(rest, fused=True)
        self._of_matrix = matrices

    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Optimizer."""
        if clip_norm > 0:
            factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([gradient for gradient in gradients.values() if gradient is not None], factor)
        for p, gradient in gradients.items():
            p.grad = gradient
        lrs = {group["name"]: group["lr"] for group in self.param_groups}
        for optimizer in (self._muon, self._adamw):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lrs[group["name"]]
                optimizer.step()
        for p in gradients:
            p.grad = None

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Optimizer."""
        names = (_MOMENTUM,) if parameter in self._of_matrix else MOMENTS
        known = self._of(parameter).get(parameter)
        return {name: known[name] if known else torch.zeros_like(parameter) for name in names}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """See Optimizer."""
        state: dict[str, Tensor] = {name: tensor.to(parameter.device) for name, tensor in tensors.items()}
        if parameter not in self._of_matrix:
            state["step"] = torch.tensor(float(self.steps), device=parameter.device)
        self._of(parameter)[parameter] = state

    def _of(self, parameter: Tensor) -> dict[Tensor, dict[str, Tensor]]:
        """Return the states of the optimizer that updates a tensor."""
        optimizer = self._muon if parameter in self._of_matrix else self._adamw
        assert optimizer is not None  # noqa: S101 each tensor is one of the two's
        return optimizer.state
