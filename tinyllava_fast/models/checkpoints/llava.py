"""Folders of transformers' LlavaForConditionalGeneration, llava-hf's among them, under its names of any release.

Two things differ from ours: its output projection has no bias, and Gemma's scaling applies to text rows only, so that
a projector in such a folder makes rows that are scaled already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlavaConfig, PreTrainedConfig

from tinyllava_fast.errors import CheckpointError, nearest
from tinyllava_fast.models.architecture import ConnectorPart, LMMConfig, Values, VisionPart
from tinyllava_fast.models.checkpoints import _parts, _towers
from tinyllava_fast.models.checkpoints._base import LAYOUTS, Checkpoint, Folder, Layout, Sources
from tinyllava_fast.models.checkpoints._tensors import Stored
from tinyllava_fast.models.hf import config_to_dict

SELECTIONS = {"default": "patch", "full": "cls_patch"}
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
SCALED = ("gemma", "gemma2")  # language models whose embedding module multiplies by sqrt(hidden_size)
_PROJECTOR = {"linear_1": "0", "linear_2": "2"}


@LAYOUTS.register("llava")
class Llava(Layout):
    """config.json with nested text_config and vision_config; safetensors or torch files, whole or in shards."""

    name = "llava"
    holds = "transformers' LlavaForConditionalGeneration: config.json (llava) with text_config and vision_config"

    def recognizes(self, folder: Folder) -> bool:
        """See the base class. LLaVA-1.5's own folders are flat."""
        return folder.config.get("model_type") == "llava" and "text_config" in folder.config

    def open(self, folder: Folder, sources: Sources) -> Checkpoint:
        """See the base class."""
        where = str(folder.path / "config.json")
        config = _config(folder.config, where)
        llm, tower, projector, unknown = _sort(folder.tensors())
        text = config_to_dict(config.get_text_config())
        rows = 1 / math.sqrt(text["hidden_size"]) if text["model_type"] in SCALED else 1.0
        connector, adapting = _connector(config, projector, rows, where)
        vision = _vision(config, where)
        tower, left_out = _parts.vision_weights(vision.type, tower)
        if text["model_type"] == "phi":
            llm.setdefault("lm_head.bias", Stored.of("no lm_head.bias", torch.zeros(text["vocab_size"])))
        sources_of_processor = [str(folder.path), sources.vision]
        return Checkpoint(
            layout=self.name,
            config=LMMConfig(
                llm=_parts.llm_part(text),
                vision=vision,
                connector=connector,
                image_mode="pad" if _parts.processor_values(sources_of_processor).get("do_pad") else "square",
            ),
            weights={**_parts.llm_weights(llm), **tower, **adapting},
            ignored=left_out,
            tokenizer=_parts.tokenizer_source(folder, sources.llm, where),
            processor_sources=sources_of_processor,
            unknown=unknown,
        )


def _config(values: Values, where: str) -> LlavaConfig:
    try:
        return LlavaConfig.from_dict(values)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{where}: transformers refuses this llava config: {error}") from None


def _sort(
    tensors: Mapping[str, Stored],
) -> tuple[dict[str, Stored], dict[str, Stored], dict[str, Stored], list[str]]:
    """(language model, tower, projector, names of none of them), each under its own names.

    Before transformers 4.52 the language model was whole: language_model.model.layers, language_model.lm_head; since
    then the parts are under model. and the head beside it.
    """
    llm: dict[str, Stored] = {}
    tower: dict[str, Stored] = {}
    projector: dict[str, Stored] = {}
    unknown = []
    for key, stored in tensors.items():
        name = key.removeprefix("model.")
        if name.startswith(("language_model.model.", "language_model.lm_head.", "lm_head.")):
            llm[name.removeprefix("language_model.")] = stored
        elif name.startswith("language_model."):
            llm["model." + name.removeprefix("language_model.")] = stored
        elif name.startswith("vision_tower."):
            tower[name.removeprefix("vision_tower.")] = stored
        elif name.startswith("multi_modal_projector."):
            projector[name.removeprefix("multi_modal_projector.")] = stored
        else:
            unknown.append(key)
    return llm, tower, projector, unknown


def _vision(config: LlavaConfig, where: str) -> VisionPart:
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        if len(layer) != 1:
            raise CheckpointError(
                f"{where}: vision_feature_layer {layer}: features of several layers are not supported"
            )
        layer = layer[0]
    values = _towers.truncated(config_to_dict(cast("PreTrainedConfig", config.vision_config)), layer, where)
    kind = _towers.tower_type(values, where)
    select = SELECTIONS[config.vision_feature_select_strategy]
    if select == "patch" and values.get("num_register_tokens"):
        raise CheckpointError(f"{where}: vision_feature_select_strategy 'default' would keep this tower's registers")
    return VisionPart(type=kind, config=values, feature_select=select)


def _connector(
    config: LlavaConfig, tensors: Mapping[str, Stored], rows: float, where: str
) -> tuple[ConnectorPart, dict[str, Stored]]:
    """(connector, weights) of the projector, its output multiplied by ``rows``."""
    found = {f"{_PROJECTOR[k.split('.')[0]]}.{k.split('.')[-1]}": v for k, v in tensors.items()}
    if not config.multimodal_projector_bias:
        for index in "02":
            zeros = torch.zeros(config.get_text_config().hidden_size)
            found[f"{index}.bias"] = Stored.of("no projector bias", zeros)
    if rows != 1.0:
        for name in ("2.weight", "2.bias"):
            found[name] = _map(found[name], lambda t: t * rows)
    act = config.projector_hidden_act
    if act == "linear":
        weights, _ = _parts.connector_weights("linear", _product(found))
        return ConnectorPart(type="linear"), weights
    if act not in ACTIVATIONS:
        raise CheckpointError(f"{where}: projector_hidden_act {act!r}; {nearest(act, [*ACTIVATIONS, 'linear'])}")
    weights, _ = _parts.connector_weights("mlp", found)
    return ConnectorPart(type="mlp", options={"depth": 2, "activation": ACTIVATIONS[act]}), weights


def _product(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Two linear maps with nothing between them as one."""
    first, second = found["0.weight"], found["2.weight"]

    def weight() -> Tensor:
        return (second.read().float() @ first.read().float()).to(first.dtype)

    def bias() -> Tensor:
        return (second.read().float() @ found["0.bias"].read().float() + found["2.bias"].read().float()).to(first.dtype)

    return {
        "weight": replace(first, shape=(second.shape[0], first.shape[1]), read=weight),
        "bias": replace(found["2.bias"], read=bias),
    }


def _map(stored: Stored, change: Callable[[Tensor], Tensor]) -> Stored:
    return replace(stored, read=lambda: change(stored.read()))
