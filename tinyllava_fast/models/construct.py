"""The one constructor: from an architecture to the model, with weights pretrained, drawn from a seed, or left empty."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import ConnectorPart, LLMPart, LMMConfig, VisionPart
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.hf import cast_parameters
from tinyllava_fast.models.llm.base import LLMS, LLMFamily
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision.base import VISION, VisionTower
from tinyllava_fast.models.weights_file import load_component


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The source of weights: those of a part with a path from there, the others from the seed.

    Without a seed they are left empty, for a model whose weights are loaded next.
    """

    llm: str | None = None
    """Folder, hub id or "package:NAME"."""
    gguf_file: str | None = None
    """Name of the file in ``llm``, if it is one of llama.cpp."""
    vision: str | None = None
    """Folder or hub id."""
    connector: str | None = None
    """File of safetensors."""
    seed: int | None = None


EMPTY = Weights()


def build(
    config: LMMConfig,
    weights: Weights = EMPTY,
    *,
    dtype: torch.dtype,
    feature_layer: int = -1,
    file: str | None = None,
) -> LMM:
    """Return the model of an architecture. Its config states the parts in full, defaults and pretrained keys included.

    Random weights are drawn in float32 and then cast, so they do not depend on dtype.
    feature_layer: of the tower's hidden states, the one that is read; layers above it are not built.
    file: where a finished architecture is stored, for messages, and keys that transformers does not know pass; None: it
    is a run's configuration, whose keys are held to be right.
    Raises UserError naming the key.
    """
    with reading(f"{file}: no model can be made of it") if file else nullcontext():
        family, llm = _build_llm(config.llm, weights, dtype, file)
        vision = build_tower(config.vision, weights, dtype=dtype, feature_layer=feature_layer, file=file)
        connector = _build_connector(config.connector, vision.hidden_size, llm.config.hidden_size, weights, file)
        config = replace(config, llm=family.describe(llm), vision=vision.describe(), connector=connector.describe())
        try:
            lmm = LMM(llm, vision, connector, family, config)
        except UserError as error:  # parts that do not fit each other, named as in a run's configuration
            raise UserError(f"{file}: {error}" if file else str(error)) from error
    cast_parameters(lmm, dtype)
    return lmm


def build_tower(
    part: VisionPart,
    weights: Weights = EMPTY,
    *,
    dtype: torch.dtype = torch.float32,
    feature_layer: int = -1,
    file: str | None = None,
) -> VisionTower:
    """Return the vision tower alone; arguments as of ``build``."""
    cls = VISION.get(part.type, _key(file, "vision.type"))
    options = parse_into(cls.Options, part.options, "", key=_key(file, "vision.options"))
    return cls.from_config(
        part.config,
        path=weights.vision,
        feature_layer=feature_layer,
        feature_select=part.feature_select,
        options=options,
        seed=None if weights.seed is None else weights.seed + 1,
        dtype=torch.float32 if weights.vision is None and weights.seed is not None else dtype,
        where=_key(file, "vision"),
        strict=file is None,
    )


def _build_llm(
    part: LLMPart, weights: Weights, dtype: torch.dtype, file: str | None
) -> tuple[LLMFamily, PreTrainedModel]:
    cls = LLMS.get(part.type, _key(file, "llm.type"))
    family = cls(parse_into(cls.Options, part.options, "", key=_key(file, "llm.options")))
    where = _key(file, "llm")
    if weights.llm is not None:
        return family, family.from_pretrained(
            weights.llm, gguf_file=weights.gguf_file, overrides=part.config, dtype=dtype, where=where
        )
    if file is None and not part.config:
        raise UserError(
            "model.llm: give path (pretrained) or config (random weights), e.g. config: {model_type: llama}"
        )
    dtype = dtype if weights.seed is None else torch.float32
    return family, family.from_config(part.config, seed=weights.seed, dtype=dtype, where=where, strict=file is None)


def _build_connector(
    part: ConnectorPart, vision_size: int, llm_size: int, weights: Weights, file: str | None
) -> Connector:
    cls = CONNECTORS.get(part.type, _key(file, "connector.type"))
    options = parse_into(cls.Options, part.options, "", key=_key(file, "connector.options"))
    connector = cls(vision_size, llm_size, options)
    if weights.seed is not None:
        connector.reset(torch.Generator().manual_seed(weights.seed + 2))
    if weights.connector is not None:
        load_component(connector, weights.connector, "connector")
    return connector


def _key(file: str | None, key: str) -> str:
    """Return a key of the architecture as messages name it."""
    return f"{file}: {key}" if file else f"model.{key}"
