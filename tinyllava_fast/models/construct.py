"""From the description of an architecture to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.hf import config_of, config_to_dict
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.lmm import LMM, LMMConfig
from tinyllava_fast.models.vision.base import VISION, VisionTower

T = TypeVar("T")


def describe(lmm: LMM) -> LMMConfig:
    """The LMMConfig that rebuilds this model's architecture."""
    return LMMConfig(
        llm={
            "type": lmm.family.name,
            "config": config_to_dict(lmm.llm.config),
            "options": asdict(lmm.family.options),
        },
        vision=lmm.vision.to_config(),
        connector=lmm.connector.to_config(),
    )


def skeleton(config: LMMConfig, dtype: torch.dtype, where: str) -> LMM:
    """The architecture with uninitialized weights. Raises UserError for a config that makes none."""
    with reading(f"{where}: no model can be made of it"):
        llm_class = LLMS.get(config.llm["type"], f"{where}: llm.type")
        family = llm_class(_options(llm_class.Options, config.llm, where, "llm.options"))
        stored = config_of(None, config.llm["config"], f"{where}: llm.config", strict=False)
        llm = family.build(stored, seed=None, dtype=dtype, where=f"{where}: llm")
        vision = tower_skeleton(config, dtype, where)
        kind = CONNECTORS.get(config.connector["type"], f"{where}: connector.type")
        options = _options(kind.Options, config.connector, where, "connector.options")
        connector = kind(vision.hidden_size, llm.config.hidden_size, options).to(dtype)
        try:
            return LMM(llm, vision, connector, family, config)
        except UserError as error:  # parts that do not fit each other, named as in a run's configuration
            raise UserError(f"{where}: {error}") from error


def _options(cls: type[T], part: Mapping[str, Any], where: str, key: str) -> T:
    """Return the options of a part. Raise UserError for a key or value that the component does not take."""
    return parse_into(cls, part.get("options") or {}, where, key=key)


def tower_skeleton(config: LMMConfig, dtype: torch.dtype, where: str) -> VisionTower:
    """The vision tower with uninitialized weights."""
    tower = VISION.get(config.vision["type"], f"{where}: vision.type")
    return tower.from_config(
        config.vision["config"],
        feature_layer=-1,
        feature_select=config.vision["feature_select"],
        options=_options(tower.Options, config.vision, where, "vision.options"),
        seed=None,
        dtype=dtype,
        where=f"{where}: vision",
        strict=False,
    )
