"""The contract of optimizers and their registry.

An optimizer updates float32 tensors: weights, or the masters of weights below float32. Accumulation, masters and
checkpoints are not its business (train/optim.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.config.schema import EngineConfig, OptimConfig
from tinyllava_fast.config.values import place
from tinyllava_fast.errors import UserError
from tinyllava_fast.registry import Registry

Gradients = Mapping[Tensor, Tensor | None]
"""Tensor that the optimizer updates -> its gradient, None: zero."""


class Group(TypedDict):
    """Tensors that share settings."""

    name: str
    params: list[Tensor]
    lr: float
    weight_decay: float


ParamGroups = list[Group]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The settings that an optimizer is built with. betas, eps: of ``optim``."""

    betas: tuple[float, float]
    eps: float
    options: object = None
    """The optimizer's own ``Options``; None: their defaults."""
    exact: Set[Tensor] = frozenset()
    """Tensors whose moments stay float32 in an optimizer that keeps moments in fewer bits: embeddings."""
    weights: Mapping[Tensor, Tensor] = field(default_factory=dict)
    """Master -> the weight below float32 that it is rounded into."""


class Optimizer(ABC):
    """Updates the float32 tensors of its groups.

    moment_bytes: bytes that it keeps for a weight of a large matrix, for reports. fused: ``step`` takes gradients of
    any dtype, absent ones too, and rounds masters into their weights; without it, gradients are float32 and complete,
    and the caller rounds. skips: ``step`` reads ``skip`` and ``skipped``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of this optimizer alone."""

    moment_bytes: ClassVar[float]
    fused: ClassVar[bool] = False
    skips: ClassVar[bool] = False

    def __init__(self, groups: ParamGroups, settings: OptimizerSettings) -> None:
        self.param_groups: ParamGroups = [group.copy() for group in groups]
        """The groups; the caller sets each ``lr`` before a step."""
        self.options: Any = settings.options if settings.options is not None else self.Options()
        self.betas, self.eps = settings.betas, settings.eps
        self.steps = 0
        """Number of the update at hand, from 1; the caller counts."""
        self.skip: Tensor | None = None
        """1 where the step at hand has to change nothing, else 0, [] float32 on the device; None: it is a step."""
        self.skipped: Tensor | None = None
        """Steps that ``steps`` counts and that changed nothing, the one at hand included, [] float32; None: none."""

    @classmethod
    def check(cls, engine: EngineConfig, device: torch.device, where: str) -> None:
        """Raise UserError for an engine or a device that cannot run it. where: key and name, for the message."""
        if engine.type == "fsdp":
            raise UserError(
                f"{where} with engine.type: fsdp, which cuts weights into rows, so that scales and checkpoints would "
                "depend on the number of processes; set engine.type: ddp, or type: adamw"
            )
        if engine.type == "deepspeed" and engine.zero_stage > 0:
            raise UserError(
                f"{where} with engine.zero_stage: {engine.zero_stage}, whose flat partitions cut weights anywhere, "
                "so that scales and checkpoints would depend on the number of processes; set zero_stage: 0, or type: "
                "adamw"
            )

    @classmethod
    def build(cls, groups: ParamGroups, settings: OptimizerSettings) -> Optimizer:
        """Return the optimizer; of several implementations, the one for these tensors."""
        return cls(groups, settings)

    @abstractmethod
    def step(self, gradients: Gradients, norm: Tensor, clip_norm: float) -> None:
        """Update once. norm: of all gradients, [] float32; they are scaled to at most clip_norm (0: left as is)."""

    @abstractmethod
    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what is kept for one tensor, by the names of a checkpoint ("exp_avg"); zero before the first step."""

    @abstractmethod
    def load(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Restore ``state`` of one tensor, as it was after ``self.steps`` updates."""


OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", "tinyllava_fast.train.optimizers")


def find_optimizer(optim: OptimConfig, stage: str = "stages.*", file: str = "") -> tuple[type[Optimizer], object]:
    """Return the registered optimizer and its options. Raise UserError for an unknown name or option.

    stage: key of the stage, file: of the configuration or "", for messages.
    """
    found = OPTIMIZERS.get(optim.type, place(file, f"{stage}.optim.type"))
    return found, parse_into(found.Options, optim.options, file, key=f"{stage}.optim.options")


def check_optimizer(optim: OptimConfig, engine: EngineConfig, device: torch.device, stage: str) -> None:
    """Raise UserError for an optimizer that this engine or device does not have, and for means that it cannot keep."""
    if optim.on_nonfinite == "skip" and engine.type == "deepspeed" and engine.sharding:
        raise UserError(
            f"{stage}.optim.on_nonfinite: skip with engine.type: deepspeed, which updates the weights before the norm "
            "is known; set engine.type: ddp or fsdp, or on_nonfinite: fail"
        )
    if optim.ema and engine.sharding:
        sharded = "engine.type: fsdp" if engine.type == "fsdp" else f"engine.zero_stage: {engine.zero_stage}"
        raise UserError(
            f"{stage}.optim.ema with {sharded}, which holds a part of the weights in each "
            "process; set engine.type: ddp, or ema: 0"
        )
    found, _ = find_optimizer(optim, stage)
    found.check(engine, device, f"{stage}.optim.type: {optim.type}")
