"""Vision towers of checkpoints: which of ours they are, what their configs leave out, where their weights are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tinyllava_fast.errors import CheckpointError, UserError, nearest
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.checkpoints._base import Folder
from tinyllava_fast.models.checkpoints._tensors import Stored
from tinyllava_fast.models.sources import ask_hub
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.base import VISION, VisionTower
from tinyllava_fast.models.vision.dinov2 import BACKBONE_KEYS

# Keys of a stored config that say where it came from, not what the tower is.
_PROVENANCE = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
_PROVENANCE |= {"model_name_or_path", "model_name_or_path2"}
_PROVENANCE |= BACKBONE_KEYS
# Configs of towers that checkpoints name without describing them, from their hub repositories.
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_DINOV2 = {
    "patch_size": 14,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
_PUBLISHED: dict[str, Values] = {
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "openai/clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "facebook/dinov2-large": _DINOV2
    | {
        "model_type": "dinov2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
    },
}
# Class defaults of transformers 4.40, which nested configs of its time leave out.
_LEGACY_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_LEGACY_VISION: dict[str, Values] = {
    "clip_vision_model": _LEGACY_VIT
    | {
        "intermediate_size": 3072,
        "patch_size": 32,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": _LEGACY_VIT
    | {"intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "dinov2": _LEGACY_VIT | _DINOV2,
}


def tower_type(config: Mapping[str, object], where: str) -> str:
    """Return our tower for a transformers vision config."""
    known = {kind: name for name in sorted(VISION, reverse=True) for kind in _model_types(VISION.get(name))}
    kind = str(config.get("model_type"))
    if kind not in known:
        raise CheckpointError(f"{where}: no vision tower for model_type {kind!r}; {nearest(kind, known)}")
    return known[kind]


def _model_types(tower: type[VisionTower]) -> list[str]:
    return tower.model_types() if issubclass(tower, EncoderTower) else []


def legacy_vision_config(config: Mapping[str, object], where: str) -> Values:
    """Return a nested vision config with the defaults that it leaves out."""
    kind = str(config.get("model_type"))
    if kind not in _LEGACY_VISION:
        raise CheckpointError(f"{where}: vision_config.model_type: {kind!r}; {nearest(kind, _LEGACY_VISION)}")
    return _LEGACY_VISION[kind] | dict(config)


def truncated(config: Mapping[str, object], feature_layer: int, where: str) -> Values:
    """Return the vision config without provenance, ending at the layer that is read."""
    values: Values = {k: v for k, v in config.items() if k not in _PROVENANCE}
    layers = int(values.setdefault("num_hidden_layers", 12))
    kept = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= kept <= layers:
        raise CheckpointError(f"{where}: feature layer {feature_layer} of a tower with {layers} layers")
    return values | {"num_hidden_layers": kept}


def tower_config(name: str, override: str | None, where: str, flag: str) -> Values:
    """Return the full transformers vision config of a tower that a checkpoint only names.

    From the override if given, a local folder, a built-in table of published towers, or the hub, in that order.
    """
    source = override or name
    path = Path(source)
    if path.is_dir():
        values = Folder(path).config
        return dict(values.get("vision_config", values))
    if source in _PUBLISHED:
        return dict(_PUBLISHED[source])
    from transformers import AutoConfig

    try:
        ask_hub(source, where)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        raise CheckpointError(
            f"{where}: its vision tower {source!r} is neither a folder, nor a published one that we know, nor on the "
            f"hub within reach, and the checkpoint does not hold its config; give a folder: {flag} FOLDER"
        ) from None
    return dict(getattr(config, "vision_config", config).to_dict())


def layer_number(name: str) -> int | None:
    """Return the layer of a tower that a tensor belongs to."""
    match = re.search(r"(?:^|\.)encoder\.layers?\.(\d+)\.", name)
    return int(match[1]) if match else None


def pretrained_tower(tower: str, name: str, override: str | None, where: str) -> dict[str, Stored]:
    """Weights under transformers' names of a tower that the checkpoint does not hold: from its own folder or hub id."""
    source = override or name
    cls = VISION.get(tower)
    try:
        loaded = cls.from_config({}, path=source, feature_layer=-1, feature_select=None, where=where)
    except UserError as error:
        raise CheckpointError(
            f"{where}: the checkpoint has no weights of its vision tower {name!r}, and {source!r} has none either "
            f"({error}); give a folder with that tower: --vision FOLDER"
        ) from None
    return {key: Stored.of(f"{source}: {key}", tensor) for key, tensor in loaded.state_dict().items()}
