"""Common parts of all wrappers of transformers models: strict configs, seeded construction, safe changes of dtype."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tinyllava_fast.config.ranges import (
    Layers,
    NonNegativeFloat,
    Pixels,
    PositiveFloat,
    Range,
    Settings,
    ShareBelowOne,
    Size,
)
from tinyllava_fast.config.values import read_value
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.llm.base import LLMS

# Keys that say where a config came from, not what the model is.
_VOLATILE = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "torch_dtype"}
_VOLATILE |= {"transformers_version", "quantization_config"}
_LEGACY_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "model_type", "tie_word_embeddings"}

# What keys of a transformers config may be, whatever the family; the first that fits counts. Not named: sizes that may
# be -1 by design, such as window sizes.
_WIDTHS = "hidden_size intermediate_size ffn_hidden_size embedding_size vocab_size num_channels head_dim"
_WIDTHS += " max_position_embeddings num_attention_heads num_key_value_heads projection_dim num_query_heads"
_WIDTHS += " num_kv_heads model_dim num_patches"
_NUMBERS: list[tuple[re.Pattern[str], object]] = [
    (re.compile("image_size|patch_size"), Pixels | None),
    (re.compile("num_hidden_layers|num_transformer_layers|depth"), Layers | None),
    (re.compile(_WIDTHS.replace(" ", "|")), Size | None),
    (re.compile(r".*(dropout|_pdrop|drop_path_rate)"), ShareBelowOne | None),
    (re.compile(r".*_(eps|epsilon)|initializer_range"), NonNegativeFloat | None),
    (re.compile(r"rope_theta|mlp_ratio"), PositiveFloat | None),
    (re.compile(r"num_.*"), Annotated[int, Range(least=0, most=2**24)] | None),
]
_CUT_LAYERS = Annotated[int, Range(least=0, most=4096)] | None
"""Layers of a stored tower: one that is cut before its first layer has none."""

# The language models of TinyLLaVA Factory's checkpoints: transformers model type -> name of our family.
LEGACY_FAMILIES = {
    "gemma": "gemma",
    "llama": "tinyllama",
    "openelm": "openelm",
    "phi": "phi",
    "qwen2": "qwen2",
    "stablelm": "stablelm",
}
# Defaults of their config classes in transformers 4.40, which wrote those checkpoints and left defaults out. Stated
# here because a checkpoint must not change its meaning with a later release. OpenELM's are its own class's.
_LEGACY_COMMON = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_LEGACY_LLAMA = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "vocab_size": 32000,
}
_LEGACY_PHI = {
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu_new",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 24,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "vocab_size": 51200,
}
_LEGACY_QWEN2 = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_LEGACY_GEMMA = {
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 256000,
}
_LEGACY_STABLELM = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25,
    "qk_layernorm": False,
    "rope_scaling": None,
    "use_parallel_residual": False,
    "use_qkv_bias": False,
    "vocab_size": 50304,
}
_LEGACY_DEFAULTS: dict[str, Values] = {
    "gemma": _LEGACY_COMMON | _LEGACY_GEMMA,
    "llama": _LEGACY_COMMON | _LEGACY_LLAMA,
    "openelm": {},
    "phi": _LEGACY_COMMON | _LEGACY_PHI,
    "qwen2": _LEGACY_COMMON | _LEGACY_QWEN2,
    "stablelm": _LEGACY_COMMON | _LEGACY_STABLELM,
}


def legacy_text_config(values: Mapping[str, object], where: str = "config.json") -> Values:
    """Return the config of a language model as TinyLLaVA Factory stored it, with every default that it left out.

    values: ``text_config`` of its config.json, or such keys gathered from a flat one; ``model_type`` decides the
    class. where: the file, for messages. Keys that the class does not have are dropped, as transformers 4.40 ignored
    them. The result suits ``LLMS.get(LEGACY_FAMILIES[model_type])().from_config``. Raises UserError for another type.
    """
    model_type = values.get("model_type")
    if model_type not in LEGACY_FAMILIES:
        raise UserError(
            f"{where}: text_config.model_type: {model_type!r} is none of TinyLLaVA Factory's language models; "
            f"{nearest(str(model_type), LEGACY_FAMILIES)}"
        )
    LLMS.names()
    known = known_keys(CONFIG_MAPPING[model_type]) - _VOLATILE - {"use_cache"}
    result = _LEGACY_DEFAULTS[model_type] | {k: v for k, v in values.items() if k in known}
    if model_type == "gemma":  # 4.40 computed the tanh form unless hidden_activation named another; now hidden_act does
        result["hidden_act"] = values.get("hidden_activation") or "gelu_pytorch_tanh"
    return result


def config_of(model_type: str | None, values: Values, where: str, *, strict: bool = True) -> PreTrainedConfig:
    """Return a transformers config of a model type from its keys.

    strict: refuse keys that the config class does not have (transformers itself stores them silently).
    """
    LLMS.names()  # importing the families registers the architectures that transformers lacks
    model_type = values.get("model_type", model_type)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = nearest(str(model_type), ["llama", "qwen2", "phi", "gemma", "siglip_vision_model", "clip_vision_model"])
        raise UserError(f"{where}.model_type: {model_type!r} is not a transformers model type; {hint}, ...")
    given = {k: v for k, v in values.items() if k != "model_type"}
    cls = CONFIG_MAPPING[model_type]
    if strict:
        check_keys(cls, given, where)
    else:
        check_numbers(cls, given, where, cut=True)
    with reading(f"{where}: transformers refuses this {model_type} config", UserError):
        return cls(**given)


def check_keys(cls: type, values: Mapping[str, object], where: str) -> None:
    """Raise UserError for a key that the transformers config class does not know, or a number that makes no sense."""
    known = known_keys(cls)
    for key in values:
        if key not in known:
            raise UserError(f"{where}.{key}: not a key of {cls.__name__}; {nearest(key, known)}")
    check_numbers(cls, values, where)


def check_numbers(cls: type, values: Mapping[str, object], where: str, *, cut: bool = False) -> None:
    """Raise UserError for a size that no model has, a dropout that is no share, and the like, by whatever name.

    A class's own default passes. nan and infinity are refused at any depth. cut: the config may be that of a tower
    whose layers above the one that is read are left out, which may be all of them.
    """
    read_value(Settings, values, "", where)
    names = {own: common for common, own in getattr(cls, "attribute_map", {}).items()}  # GPT-2's n_head, and the like
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for key, value in values.items():
        name = names.get(key, key)
        if name in defaults and defaults[name] is value:
            continue
        hint = next((hint for pattern, hint in _NUMBERS if pattern.fullmatch(name)), None)
        if cut and name == "num_hidden_layers":
            hint = _CUT_LAYERS
        if hint is not None:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                read_value(hint, item, "", f"{where}.{key}")


def known_keys(cls: type) -> set[str]:
    """Return the keys of a transformers config class, those that it still accepts from older releases included."""
    return {f.name for f in dataclasses.fields(cls)} | set(getattr(cls, "attribute_map", {})) | _LEGACY_KEYS


def config_to_dict(config: PreTrainedConfig) -> Values:
    """Every key of the config as JSON values, defaults included: a later change of a default cannot alter a model."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in _VOLATILE}


def load_pretrained(
    cls: type[PreTrainedModel | AutoModelForCausalLM], source: str, **settings: object
) -> tuple[PreTrainedModel, list[str]]:
    """(model, names of the weights that the files lack) of a folder or hub id. settings: of ``from_pretrained``."""
    load: Callable[..., object] = cls.from_pretrained
    loaded = load(source, output_loading_info=True, **settings)
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    return model, sorted(report["missing_keys"])


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run the block, which fills weights from torch's global generator, under a seed and put the generator back.

    None: weights are left uninitialized, for a model whose weights are loaded next.
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
