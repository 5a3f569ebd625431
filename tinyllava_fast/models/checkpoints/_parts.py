"""Helpers of all layouts: components, names of tensors, connectors, processors, and the template that fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.tokenizer import has_tokenizer
from tinyllava_fast.errors import CheckpointError, UserError, nearest
from tinyllava_fast.fields import Fields
from tinyllava_fast.log import log
from tinyllava_fast.models.architecture import ConnectorPart, LLMPart, Values
from tinyllava_fast.models.checkpoints._base import Folder
from tinyllava_fast.models.checkpoints._tensors import Stored
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.described import PROCESSORS, processor_fields, read_processor
from tinyllava_fast.models.hf import LEGACY_FAMILIES
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.vision.base import VISION

# Stored names under a component that hold nothing its forward pass reads.
_IRRELEVANT = {
    "llm": r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias)|transformer\.classifier\..*",
    "vision": r"(.*\.)?(post_layernorm|layernorm|head|pooler)\..*|(.*\.)?(position_ids|mask_token)|logit_(scale|bias)",
    "connector": r"(.*\.)?position_ids",
}


def irrelevant(component: str, name: str) -> bool:
    """Return whether a stored name of a component, as its project names it, is known to be of no use."""
    return re.fullmatch(_IRRELEVANT[component], name) is not None


def under(prefix: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}


def llm_part(config: Values) -> LLMPart:
    """Return the language model of a complete transformers config."""
    kind = str(config["model_type"])
    family = LEGACY_FAMILIES.get(kind, kind)
    return LLMPart(type=family if family in LLMS else "auto", config=config)


def llm_weights(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the weights under our names; a causal LM's own names stand in every layout."""
    return {f"llm.{name}": stored for name, stored in tensors.items()}


def vision_weights(tower: str, tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """(tensors under our names, stored names left out) of a tower under transformers 4 names."""
    return _named("vision", VISION.get(tower).from_reference_names(tensors), tensors)


def connector_weights(connector: str, tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """(tensors under our names, stored names left out) of a connector under TinyLLaVA Factory's names."""
    return _named("connector", CONNECTORS.get(connector).from_reference_names(tensors), tensors)


def _named(
    component: str, renamed: Mapping[str, Stored], tensors: Mapping[str, Stored]
) -> tuple[dict[str, Stored], list[str]]:
    used = {stored.key for stored in renamed.values()}
    weights = {f"{component}.{name}": stored for name, stored in renamed.items()}
    dropped = []
    for name, stored in tensors.items():
        if stored.key in used:
            continue
        if irrelevant(component, name):
            dropped.append(stored.key)
        else:
            weights[f"{component}.{name}"] = stored  # no one expects it: it is reported with all that do not fit
    return weights, dropped


def connector_part(kind: str, config: Mapping[str, object], where: str) -> ConnectorPart:
    """Return the connector of a connector type of the LLaVA family."""
    options: Values = {}
    if kind in ("mlp", "linear", "identity"):
        name = kind
    elif match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        name, options = "mlp", {"depth": int(match[1]), "activation": "gelu"}
    elif kind in ("mof", "mof_mlp"):
        name = "mof_mlp"
    elif kind == "qformer":
        name, options = kind, {"num_queries": config.get("num_queries") or 128}
    elif kind == "resampler":
        name = kind
        options = {
            "num_queries": config.get("num_queries") or 128,
            "num_layers": config.get("num_resampler_layers") or 3,
        }
    else:
        known = ["identity", "linear", "mlp2x_gelu", "mof_mlp", "qformer", "resampler"]
        raise CheckpointError(f"{where}: unknown connector type {kind!r}; {nearest(kind, known)}")
    return ConnectorPart(type=name, options=options)


def tokenizer_source(folder: Folder, name: str | None, where: str) -> str:
    """Return the folder itself where it has tokenizer files, else the name that the checkpoint gives."""
    if has_tokenizer(folder.path):
        return str(folder.path)
    if not name:
        raise CheckpointError(f"{where}: it has no tokenizer files and names no tokenizer")
    return name


def stored_processor(tower: str, sources: Sequence[str | None]) -> BaseImageProcessor | None:
    """Return the image processor in the first local folder that has one; None without any."""
    for source in sources:
        if source and any((Path(source) / name).is_file() for name in PROCESSORS):
            processor = read_processor(VISION.get(tower), source)
            if getattr(processor, "do_pad", False):  # the image mode of the model does that
                vars(processor)["do_pad"] = False
            return processor
    return None


def processor_values(sources: Sequence[str | None]) -> Values:
    """Return the keys of the image processor that ``stored_processor`` would read."""
    found = (processor_fields(source) for source in sources if source)
    return next((dict(fields.values) for fields in found if fields is not None), {})


def image_processor(tower: str, image_size: int, sources: Sequence[str | None]) -> BaseImageProcessor:
    """Return the stored image processor, else the tower's defaults for the size."""
    stored = stored_processor(tower, sources)
    if stored is None:
        log.info("no preprocessor_config.json found; using the %s defaults at %d pixels", tower, image_size)
    return stored or VISION.get(tower).image_processor(image_size)


def fitting_template(tokenizer: PreTrainedTokenizerBase, model_type: str) -> str | None:
    """Return the chat template whose end-of-answer text is the tokenizer's end token, None if there is none.

    Of several it is the one that a family of this transformers model type names as its own.
    """
    fits = [name for name in TEMPLATES if TEMPLATES.get(name).eos and TEMPLATES.get(name).eos == tokenizer.eos_token]
    families = (LLMS.get(name) for name in LLMS)
    own = {family.template for family in families if model_type in family.model_types}
    return next((name for name in fits if name in own), next(iter(fits), None))


def need_text(config: Mapping[str, object], key: str, where: str) -> str:
    """Return a text of config.json that the layout cannot do without."""
    return _needed(config, key, where).text(key)


def need_section(config: Mapping[str, object], key: str, where: str) -> Values:
    """Return an object of config.json that the layout cannot do without."""
    return dict(_needed(config, key, where).mapping(key).values)


def _needed(config: Mapping[str, object], key: str, where: str) -> Fields:
    if config.get(key) is None:
        raise CheckpointError(f"{where}: config.json lacks {key}")
    return Fields(config, where, CheckpointError)


def image_mode(config: Mapping[str, object], where: str) -> str:
    """Return our image mode for an ``image_aspect_ratio``."""
    ratio = config.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad"):
        raise UserError(f"{where}: image_aspect_ratio {ratio!r} is not supported; known: square, pad")
    return str(ratio)
