"""Optimizers of bitsandbytes: AdamW and Lion (arXiv 2302.06675) with moments in 8 bits, or in memory that CUDA pages.

The 8-bit optimizers keep each moment as one byte a weight and a float32 scale for every 256 of them (arXiv 2110.02861);
weights of fewer than 4,096 elements, and embeddings, whose rows move at very different rates, keep float32 moments. The
paged ones keep moments in memory that CUDA moves to the host when the GPU is full. On a CPU bitsandbytes 0.50 has the
8-bit optimizers (it widens one weight's moments at a time), but no paging: it would warn and go on without, so that is
refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.errors import UserError, import_optional
from tinyllava_fast.train.optimizers.base import OPTIMIZERS, Gradients, Optimizer, OptimizerSettings, ParamGroups

BLOCK = 256  # weights that share a scale
SMALLEST = 4096  # elements of a weight whose moments are kept in 8 bits
_BYTES_8BIT = 1 + 4 / BLOCK  # of a moment with its share of a scale
_SAVED = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}


class BitsAndBytes(Optimizer):
    """An optimizer of bitsandbytes. bits: of a moment. unpaged: the same without paging; "": it does not page."""

    algorithm: ClassVar[Literal["AdamW", "Lion"]]
    bits: ClassVar[Literal[8, 32]]
    unpaged: ClassVar[str] = ""

    def __init__(self, groups: ParamGroups, settings: OptimizerSettings) -> None:
        super().__init__(groups, settings)
        bnb = import_optional("bitsandbytes", f"the optimizer {type(self).__name__}").optim
        chosen = {"betas": self.betas, "is_paged": bool(self.unpaged), "min_8bit_size": SMALLEST}
        chosen["optim_bits"] = self.bits
        if self.algorithm == "AdamW":
            chosen["eps"] = self.eps
        self._rule = getattr(bnb, self.algorithm)(groups, **chosen)
        self.param_groups = self._rule.param_groups
        for index, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                self._rule.init_state(group, p, index, place)
                if p in settings.exact:  # it looks at the moments, not at optim_bits, to choose the update
                    moments = [k for k in ("state1", "state2") if k in self._rule.state[p]]
                    self._rule.state[p] = {"step": 0, **{k: torch.zeros_like(p, requires_grad=False) for k in moments}}

    @classmethod
    def check(cls, engine: EngineConfig, device: torch.device, where: str) -> None:
        """See Optimizer. Raise UserError as well where bitsandbytes is missing, or does not page on this device."""
        import_optional("bitsandbytes", where)
        super().check(engine, device, where)
        if cls.unpaged and device.type == "cpu":
            raise UserError(f"{where} on a CPU, where bitsandbytes has no paged memory; set type: {cls.unpaged}")

    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """See Optimizer."""
        for p, gradient in gradients.items():
            p.grad = gradient
        if clip_norm > 0:
            grads = [gradient for gradient in gradients.values() if gradient is not None]
            torch._foreach_mul_(grads, torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
        self._rule.step()
        for p in gradients:
            p.grad = None

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Optimizer."""
        known = self._rule.state[parameter]
        return {name: known[own] for name, own in _SAVED.items() if own in known}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """See Optimizer."""
        known = self._rule.state[parameter]
        for name, tensor in tensors.items():
            known[_SAVED[name]].copy_(tensor)
        known["step"] = self.steps


@OPTIMIZERS.register("adamw8bit")
class AdamW8bit(BitsAndBytes):
    """AdamW whose moments take a byte each."""

    algorithm, bits, moment_bytes = "AdamW", 8, 2 * _BYTES_8BIT


@OPTIMIZERS.register("paged_adamw")
class PagedAdamW(BitsAndBytes):
    """AdamW whose moments CUDA may move to the host."""

    algorithm, bits, moment_bytes, unpaged = "AdamW", 32, 8.0, "adamw"


@OPTIMIZERS.register("paged_adamw8bit")
class PagedAdamW8bit(AdamW8bit):
    """adamw8bit, paged."""

    unpaged = "adamw8bit"


@OPTIMIZERS.register("lion")
class Lion(BitsAndBytes):
    """Lion, which keeps one moment and steps by its sign."""

    algorithm, bits, moment_bytes = "Lion", 32, 4.0


@OPTIMIZERS.register("lion8bit")
class Lion8bit(BitsAndBytes):
    """Lion whose moment takes a byte."""

    algorithm, bits, moment_bytes = "Lion", 8, _BYTES_8BIT


@OPTIMIZERS.register("paged_lion8bit")
class PagedLion8bit(Lion8bit):
    """lion8bit, paged."""

    unpaged = "lion8bit"
