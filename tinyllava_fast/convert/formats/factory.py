"""TinyLLaVA Factory's finetune layout, which is its hub releases' too: its key names, its config keys.

It runs on transformers 4.40, which lacks some of what we can build, and fetches configs, tokenizer and image processor
by the hub ids in config.json; so those ids have to be given for a model that was not imported from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.convert.formats._towers import completed, plain_encoder, resized_positions
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.checkpoints.factory import PREFIXES
from tinyllava_fast.models.connectors.base import Connector
from tinyllava_fast.models.hf import LEGACY_FAMILIES, config_to_dict, legacy_text_config
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.dinov2 import RENAMED, Dinov2Tower
from tinyllava_fast.models.vision.mof import MoFTower

# Sizes that the reference's connectors have fixed.
_FIXED = {
    "resampler": {"num_heads": 8, "head_size": 64, "expansion": 4},
    "qformer": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072},
}
CONNECTORS = ("identity", "linear", "mlp", "mof_mlp", "qformer", "resampler")
_NO_VISION_KEYS = {
    "vision_use_head",
    "use_mask_token",
    "return_dict",
    "output_hidden_states",
    "chunk_size_feed_forward",
}


@FORMATS.register("factory")
class FactoryFormat(Format):
    """Every combination that TinyLLaVA Factory itself can build."""

    name = "factory"
    takes_names = True

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        lmm = model.lmm
        config = _config(model)
        vision, tower = _vision(lmm, model)
        connector, adapting = _connector(lmm)
        config |= connector | {"vision_config": vision | config.pop("names_in_vision")}
        tied = lmm.tied_names()
        llm = {k: v for k, v in lmm.llm.state_dict().items() if f"llm.{k}" not in tied}
        parts = {"llm": llm, "vision": tower, "connector": adapting}
        weights = {PREFIXES[c] + k: v.contiguous() for c, part in parts.items() for k, v in part.items()}
        save_torch_state_dict(weights, folder, max_shard_size="5GB")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        lmm.llm.generation_config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        model.processor.save_pretrained(folder)


def _config(model: Model) -> Values:
    lmm, names = model.lmm, model.names
    mixed = lmm.vision.name == "mof"
    flags = {"llm": "--llm-name", "vision": "--vision-name"} | ({"vision2": "--vision2-name"} if mixed else {})
    lacking = [flag for key, flag in flags.items() if not names.get(key)]
    if lacking:
        raise UserError(
            f"the reference fetches configs, tokenizer and image processor by hub id; give {', '.join(lacking)} ID. "
            "Parts that were trained from scratch have no id: name a folder with their config.json (of the language "
            "model also the tokenizer, of the tower the preprocessor_config.json) on the machine of the reference"
        )
    if lmm.config.image_mode not in ("square", "pad"):
        raise UserError(f"image_mode: {lmm.config.image_mode}; the reference knows square and pad")
    tokenizer = model.tokenizer
    pad = tokenizer.pad_token or tokenizer.eos_token
    prefix = "mof:" if mixed else ""
    first, second = (names.get(k, "").removeprefix(prefix) for k in ("vision", "vision2"))
    limit = tokenizer.model_max_length
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "cache_dir": None,
        "hidden_size": lmm.hidden_size,
        "vision_hidden_size": getattr(lmm.vision, "clip", lmm.vision).hidden_size,
        "vocab_size": lmm.vocab_size,
        "ignore_index": -100,
        "image_token_index": -200,
        "image_aspect_ratio": lmm.config.image_mode,
        "llm_model_name_or_path": names["llm"],
        "tokenizer_name_or_path": names.get("tokenizer", names["llm"]),
        "vision_model_name_or_path": prefix + first,
        "vision_model_name_or_path2": prefix + second if mixed else "",
        "names_in_vision": {"model_name_or_path": first, "model_name_or_path2": second if mixed else ""},
        "text_config": text_config(lmm),
        "pad_token": pad,
        "pad_token_id": tokenizer.convert_tokens_to_ids(pad),
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": limit if limit < 1 << 30 else 2048,
        "tokenizer_use_fast": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": lmm.vision.feature_select,
        "torch_dtype": str(lmm.dtype).removeprefix("torch."),
        "transformers_version": "4.40.1",
        "use_cache": True,
    } | {f"tune_type_{part}": "frozen" for part in ("llm", "vision_tower", "connector")}


def text_config(lmm: LMM) -> Values:
    """Return the language model's config with the keys of transformers 4.40."""
    values = config_to_dict(lmm.llm.config)
    kind = values["model_type"]
    if kind not in LEGACY_FAMILIES:
        raise UserError(f"llm: the reference has no {kind}; it has {', '.join(LEGACY_FAMILIES)}")
    keys: Iterable[str] = legacy_text_config({"model_type": kind})
    if kind == "openelm":  # never was in transformers: the class says what its keys are
        keys = type(lmm.llm.config).__annotations__
    rope = dict(values.get("rope_parameters") or {})
    scaling = rope.get("rope_type", "default")
    if scaling not in ("default", "linear", "dynamic"):
        raise UserError(f"llm.config.rope_parameters: rope_type {scaling!r} is not in transformers 4.40")
    known = {
        **values,
        "rope_theta": rope.get("rope_theta", values.get("rope_theta")),
        "partial_rotary_factor": rope.get("partial_rotary_factor", values.get("partial_rotary_factor")),
        "rope_scaling": None if scaling == "default" else {"type": scaling, "factor": rope["factor"]},
    }
    keys = [*keys, "bos_token_id", "eos_token_id", "pad_token_id"]
    result = {key: known[key] for key in keys if known.get(key) is not None}  # where None is meant it is the default
    if kind == "gemma":  # there the tanh form is computed whatever hidden_act says, unless this key names another
        result["hidden_activation"] = values["hidden_act"]
    return result | {"model_type": kind, "torch_dtype": str(lmm.dtype).removeprefix("torch.")}


def _vision(lmm: LMM, model: Model) -> tuple[Values, dict[str, Tensor]]:
    vision = lmm.vision
    if isinstance(vision, MoFTower):
        if vision.dinov2.interpolation != "transformers4" and not _native(vision.dinov2):
            raise UserError(
                "vision.options.dinov2.interpolation: transformers5 is not how the reference resizes position tables; "
                "train with transformers4"
            )
        config, clip = _encoder(vision.clip)
        _, dinov2 = _encoder(vision.dinov2)
        return config, {
            f"{half}.{k}": v for half, part in (("clip", clip), ("dinov2", dinov2)) for k, v in part.items()
        }
    encoder = plain_encoder(vision)
    if encoder is None:
        raise UserError(f"vision.type: the reference has no {vision.name}; it has clip, siglip, dinov2 and mof")
    return _encoder(encoder)


def _native(dinov2: Dinov2Tower) -> bool:
    return dinov2.image_size == dinov2.config.image_size


def _encoder(vision: EncoderTower) -> tuple[Values, dict[str, Tensor]]:
    """(config, weights under the names of transformers 4) of one encoder."""
    if not isinstance(vision, Dinov2Tower):
        config, weights = completed(vision, **({"vision_use_head": True} if vision.name != "clip" else {}))
        return _plain(config), {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    resized = {} if vision.interpolation == "transformers4" or _native(vision) else {"image_size": vision.image_size}
    config, weights = completed(vision, use_mask_token=True, **resized)
    if resized:
        weights["embeddings.position_embeddings"] = resized_positions(vision)
    return _plain(config), dict(_dinov2_names(weights))


def _plain(config: Values) -> Values:
    return {k: v for k, v in config.items() if k not in _NO_VISION_KEYS and not k.startswith("_") and v is not None}


def _dinov2_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for old, new in RENAMED.items():
            name = name.replace(new, old)
        if ".mlp.gate_proj." in name:
            other = weights[name.replace("gate_proj", "up_proj")]
            renamed[name.replace("gate_proj", "weights_in")] = torch.cat([tensor, other])
        elif ".mlp.up_proj." not in name:
            renamed[name] = tensor
    return renamed


def factory_has(connector: Connector) -> bool:
    """Return whether the reference has a connector of this kind and of these fixed sizes."""
    fixed = _FIXED.get(connector.name, {})
    return connector.name in CONNECTORS and all(getattr(connector.options, k) == v for k, v in fixed.items())


def _connector(lmm: LMM) -> tuple[Values, dict[str, Tensor]]:
    """(config keys, weights under the reference's names)."""
    kind, options = lmm.connector.name, asdict(lmm.connector.options)
    state = lmm.connector.state_dict()
    for key, value in _FIXED.get(kind, {}).items():
        if options[key] != value:
            raise UserError(f"connector.options.{key}: {options[key]}; the reference's {kind} has {value}")
    keys: Values = {"connector_type": kind, "num_queries": 128, "num_resampler_layers": 3}
    if kind == "mlp":
        if options["activation"] != "gelu":
            raise UserError(f"connector.options.activation: {options['activation']}; the reference's MLPs have gelu")
        keys["connector_type"] = f"mlp{options['depth']}x_gelu"
        return keys, {k.removeprefix("layers."): v for k, v in state.items()}
    if kind == "linear":
        return keys, {k.removeprefix("linear."): v for k, v in state.items()}
    if kind == "resampler":
        return keys | {"num_queries": options["num_queries"], "num_resampler_layers": options["num_layers"]}, state
    if kind == "qformer":
        state = {
            f"bert.{k}" if k.startswith("encoder.") else k: v
            for k, v in ((k.replace("attention.attention.", "attention.self."), v) for k, v in state.items())
        }
        state["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
        return keys | {"num_queries": options["num_queries"]}, state
    if kind in ("identity", "mof_mlp"):
        return keys, state
    raise UserError(
        f"connector.type: the reference has no {kind}; it has {', '.join(CONNECTORS)}. A model with this connector "
        "stays in this toolkit's own folder, which needs no export"
    )
