"""The update rules behind ``optim.type``: torch's fused AdamW, and what bitsandbytes has.

Both see float32 weights with float32 gradients (train/optim.py). bitsandbytes' 8-bit rules keep each moment as one byte
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

Groups = list[dict[str, Any]]
BLOCK = 256  # weights that share a scale
SMALLEST = 4096  # elements of a weight whose moments are kept in 8 bits
_SAVED = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}


class Rule(Protocol):
    """Updates float32 tensors from their ``grad``."""

    param_groups: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Updates done so far."""
        ...

    def step(self, norm: Tensor, clip_norm: float) -> None:
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
    kind: str, groups: Groups, *, betas: tuple[float, float], eps: float, exact: Set[Tensor] = frozenset()
) -> Rule:
    """The rule of optim.type over float32 tensors. exact: those whose moments stay float32 in the 8-bit rules."""
    if kind == "adamw":
        return TorchAdamW(groups, betas=betas, eps=eps)
    return BitsAndBytes(kind, groups, betas=betas, eps=eps, exact=exact)


def moment_bytes(kind: str) -> float:
    """Bytes of moments a weight, of large matrices."""
    moments = 1 if "lion" in kind.split("_")[-1] else 2
    return moments * (1 + 4 / BLOCK if kind.endswith("8bit") else 4)


class TorchAdamW:
    """torch.optim.AdamW's fused kernel. Clipping costs no pass over memory: the kernel divides by grad_scale."""

    kinds = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: Groups, *, betas: tuple[float, float], eps: float) -> None:
        self._adamw = torch.optim.AdamW([{**g, "betas": betas, "eps": eps} for g in groups], fused=True)
        self.param_groups = self._adamw.param_groups

    @property
    def steps(self) -> int:
        """See Rule."""
        return int(next(iter(self._adamw.state.values()))["step"]) if self._adamw.state else 0

    def step(self, norm: Tensor, clip_norm: float) -> None:
        """See Rule."""
        if clip_norm > 0:
            self._adamw.grad_scale = torch.clamp((norm + 1e-6) / clip_norm, min=1.0)  # type: ignore[attr-defined]
        self._adamw.step()

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """See Rule."""
        known = self._adamw.state.get(parameter)
        return {kind: known[kind] if known else torch.zeros_like(parameter) for kind in self.kinds}

    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor], steps: int) -> None:
        """See Rule."""
        step = torch.tensor(float(steps), device=parameter.device)
        self._adamw.state[parameter] = {"step": step, **{k: t.to(parameter) for k, t in tensors.items()}}


class BitsAndBytes:
    """AdamW and Lion (arXiv 2302.06675) of bitsandbytes."""

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

    def step(self, norm: Tensor, clip_norm: float) -> None:
        """See Rule."""
        if clip_norm > 0:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
        self._rule.step()

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
