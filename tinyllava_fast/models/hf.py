"""What every wrapper of a transformers model needs: strict configs, seeded construction, safe dtype changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from tinyllava_fast.errors import UserError, nearest

# Keys that say where a config came from, not what the model is.
_VOLATILE = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "torch_dtype"}
_VOLATILE |= {"transformers_version", "quantization_config"}
_LEGACY_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "model_type", "tie_word_embeddings"}


def config_of(model_type: str | None, values: dict[str, Any], where: str, *, strict: bool = True) -> PreTrainedConfig:
    """A transformers config of a model type from its keys.

    strict: refuse keys that the config class does not have (transformers itself stores them silently).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = values.get("model_type", model_type)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        hint = nearest(str(model_type), ["llama", "qwen2", "phi", "gemma", "siglip_vision_model", "clip_vision_model"])
        raise UserError(f"{where}.model_type: {model_type!r} is not a transformers model type; {hint}, ...")
    given = {k: v for k, v in values.items() if k != "model_type"}
    cls = type(AutoConfig.for_model(model_type))
    if strict:
        check_keys(cls, given, where)
    try:
        return cls(**given)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{where}: transformers refuses this {model_type} config: {error}") from None


def check_keys(cls: type, values: dict[str, Any], where: str) -> None:
    """Raise UserError for a key that the transformers config class does not know."""
    known = {f.name for f in dataclasses.fields(cls)} | set(getattr(cls, "attribute_map", {})) | _LEGACY_KEYS
    for key in values:
        if key not in known:
            raise UserError(f"{where}.{key}: not a key of {cls.__name__}; {nearest(key, known)}")


def config_to_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Every key of the config as JSON values, defaults included: a later change of a default cannot alter a model."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in _VOLATILE}


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run the block, which fills weights from torch's global generator, under a seed and put the generator back.

    None: weights are left uninitialised, for a model whose weights are loaded next.
    """
    if seed is None:
        with no_init_weights():
            yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of floating parameters, in place; buffers such as rotary frequencies stay float32."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
