"""Scaling of the loss in float16, whose smallest gradients would else be zero: torch's GradScaler for our optimizers.

GradScaler looks at the gradients of a torch optimizer. Ours are elsewhere (train/optim.py), so it is shown their norm,
which is finite exactly if none of them has overflowed: it unscales the norm, and moves the scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FIRST = 2.0**16


class LossScale:
    """The scale of a stage: halved by a step that overflows, doubled after 2,000 in a row that do not."""

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type, init_scale=FIRST)
        self._norm = nn.Parameter(torch.zeros((), device=device))
        self._shown = torch.optim.SGD([self._norm])
        self._one = torch.ones((), device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss as it goes into the backward pass."""
        return self._scaler.scale(loss)

    def factor(self) -> Tensor:
        """Return what the gradients of this step are to be multiplied by, [] float32, on the device."""
        return self._scaler.scale(self._one).reciprocal()

    def settle(self, norm: Tensor) -> Tensor:
        """Return the norm of the gradients before scaling, [] float32, and move the scale for the next step."""
        self._norm.grad = norm.detach().to(self._norm)
        self._scaler.unscale_(self._shown)
        self._scaler.update()
        return self._norm.grad

    def value(self) -> float:
        """Return the scale; it waits for the device."""
        return self._scaler.get_scale()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: the scale, and the steps since it was last changed."""
        state = self._scaler.state_dict()
        return {
            "loss_scale": torch.tensor(float(state["scale"])),
            "loss_scale_steps": torch.tensor(float(state["_growth_tracker"])),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore ``state``; one that has none, of another dtype, leaves the scale as it is."""
        if "loss_scale" not in tensors:
            return
        kept = self._scaler.state_dict()
        steps = int(tensors["loss_scale_steps"]) if "loss_scale_steps" in tensors else 0
        self._scaler.load_state_dict({**kept, "scale": float(tensors["loss_scale"]), "_growth_tracker": steps})
        self._scaler.scale(self._one)  # lets it take the values up
