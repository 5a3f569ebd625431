"""The description of a model: its parts, and how it was trained. config.json of a model folder holds it, key by key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tinyllava_fast.data.pictures import REFERENCE, PictureReading

Values = dict[str, Any]  # JSON


@dataclass(frozen=True, kw_only=True)
class LLMPart:
    """A language model."""

    type: str
    """Registered name of its family."""
    config: Values
    """Its transformers config."""
    options: Values = field(default_factory=dict)
    """Settings of the family alone."""


@dataclass(frozen=True, kw_only=True)
class VisionPart:
    """A vision tower."""

    type: str
    """Registered name."""
    config: Values
    """Its transformers config. It ends at the layer that is read."""
    feature_select: str | None = None
    """Tokens that are kept: patch or cls_patch. None: the tower's default."""
    options: Values = field(default_factory=dict)
    """Settings of the tower alone."""


@dataclass(frozen=True, kw_only=True)
class ConnectorPart:
    """A connector, whose widths are those of tower and language model."""

    type: str
    """Registered name."""
    options: Values = field(default_factory=dict)
    """Settings of the connector alone."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The parts of a model, from which models/construct.py builds it without the files that it was made from."""

    llm: LLMPart
    vision: VisionPart
    connector: ConnectorPart


@dataclass(frozen=True, kw_only=True)
class LMMConfig(Architecture):
    """The architecture, and how prompts and images were made in training."""

    template: str = "llama"
    image_mode: str = "square"
    image_grid: list[tuple[int, int]] = field(default_factory=list)
    """Resolutions (width, height) of anyres."""
    reading: PictureReading = REFERENCE
    """Of pictures. Folders that say nothing were trained the reference's way."""
    turns: str = "conversation"
    origin: dict[str, str] = field(default_factory=dict)
    """Names of an imported model's parts: {llm, vision, ...}."""
    has_lora: bool = False
    """LoRA layers in the model, and in a folder beside its weights (models/adapter.py)."""
