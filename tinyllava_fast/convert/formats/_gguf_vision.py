"""Tower and connector as llama.cpp's mmproj file.

Two of its projector types compute a ViT and two linear maps with a GELU between them: ``mlp`` for a tower with a
class token (CLIP), ``janus_pro`` for one without (SigLIP). They differ in the colour that they pad with, which is each
tower's mean. One linear map alone goes through the same graph: gelu(x) - gelu(-x) = x. ``pixel_shuffle`` has a type of
its own (_gguf_shuffle.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import gguf
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.convert.formats._gguf_shuffle import KIND, check_shuffle, shuffle_tensors, surroundings
from tinyllava_fast.convert.formats._towers import plain_encoder
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision._encoder import EncoderTower

_ACTIVATIONS = {"quick_gelu": None, "gelu": "use_gelu", "gelu_pytorch_tanh": "use_gelu"}
_TYPES = {"clip": ("mlp", ("mm.0", "mm.2")), "siglip": ("janus_pro", ("mm.0", "mm.1"))}
"""By tower: projector type, names of its two linear maps."""
_COLOURS = {"clip": [122, 116, 104], "siglip": [127, 127, 127]}


def shuffles(lmm: LMM) -> bool:
    """Return whether the model has the connector that merges patches."""
    return lmm.connector.name == "pixel_shuffle"


def check_vision(lmm: LMM) -> None:
    """Raise UserError naming the field of a tower, connector or image mode that llama.cpp lacks."""
    tower = _tower(lmm)
    if not shuffles(lmm):
        _maps(lmm)
    elif tower.name == "siglip":
        check_shuffle(asdict(lmm.connector.options)["factor"])
    else:
        raise UserError(f"vision.type: {tower.name}; llama.cpp merges the patches of siglip towers alone")
    if lmm.config.image_mode not in ("square", "pad"):
        raise UserError(f"image_mode: {lmm.config.image_mode}; llama.cpp has one square image a marker for this tower")


def describe_vision(lmm: LMM, processor: BaseImageProcessor, writer: gguf.GGUFWriter) -> None:
    """Add the settings of the tower, the projector and how pictures are prepared."""
    tower = _tower(lmm)
    config = tower.config
    kind = KIND if shuffles(lmm) else _TYPES[tower.name][0]
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind)
    writer.add_vision_projection_dim(lmm.hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(tower.num_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    # The output of the last layer, which is all that our tower has.
    writer.add_array("clip.vision.feature_layer", [tower.num_layers])
    if _ACTIVATIONS[config.hidden_act]:
        writer.add_vision_use_gelu(True)
    settings = vars(processor)
    writer.add_vision_image_mean([float(value) for value in settings["image_mean"]])
    writer.add_vision_image_std([float(value) for value in settings["image_std"]])
    _say_pixels(lmm, tower, [int(255 * value) for value in settings["image_mean"]])


def vision_tensors(lmm: LMM, template: Template, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of tower and connector under llama.cpp's names."""
    tower = _tower(lmm)
    yield from _named(tower)
    if shuffles(lmm):
        ends = lmm.family.embedding(lmm.llm).weight[list(surroundings(template, tokenizer))]
        yield from shuffle_tensors(lmm.connector.state_dict()["linear.weight"], *ends)
        return
    _, names = _TYPES[tower.name]
    for name, (weight, bias) in zip(names, _maps(lmm), strict=True):
        yield f"{name}.weight", weight
        yield f"{name}.bias", bias


def drops_patch(lmm: LMM) -> bool:
    """Return whether the tower leaves out the first patch, as TinyLLaVA Factory does where there is no class token."""
    encoder = plain_encoder(lmm.vision)
    return encoder is not None and encoder.name == "siglip" and encoder.num_dropped == 1


def _tower(lmm: LMM) -> EncoderTower:
    encoder = plain_encoder(lmm.vision)
    if encoder is None or encoder.name not in _TYPES:
        raise UserError(f"vision.type: {lmm.vision.name}; llama.cpp's LLaVA has {' and '.join(_TYPES)} towers")
    if encoder.config.hidden_act not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"vision.config.hidden_act: {encoder.config.hidden_act}; llama.cpp has {known}")
    if encoder.config.intermediate_size == encoder.hidden_size:
        raise UserError(
            f"vision.config.intermediate_size: {encoder.hidden_size}, like hidden_size; llama.cpp takes such a file "
            "for an old one and exchanges the two maps of its feed-forward layers"
        )
    patches = (encoder.image_size // encoder.config.patch_size) ** 2
    if encoder.num_tokens != patches:
        keep = "; to keep it, give --keep-first-patch" if drops_patch(lmm) else ""
        raise UserError(
            f"vision.feature_select: {encoder.feature_select} gives {encoder.num_tokens} tokens, llama.cpp the "
            f"{patches} patches alone{keep}"
        )
    return encoder


def _named(tower: EncoderTower) -> list[tuple[str, Tensor]]:
    """Return the tower's tensors under llama.cpp's names, which transformers' names lead to."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, tower.num_layers)
    named = []
    for name, tensor in tower.state_dict().items():
        known = table.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"vision.{name}: llama.cpp has no such tensor")
        named.append((known, tensor))
    return named


def _maps(lmm: LMM) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of the two linear maps. Raises UserError for a connector that is something else."""
    kind, options = lmm.connector.name, asdict(lmm.connector.options)
    state = lmm.connector.state_dict()
    if kind == "mlp" and options["depth"] == 2 and options["activation"] == "gelu":
        return [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in (0, 2)]
    if kind in ("mlp", "linear") and len(state) == 2:
        weight, bias = sorted(state.values(), key=lambda tensor: -tensor.dim())
        return _through_gelu(weight, bias)
    if kind == "identity":
        return _through_gelu(torch.eye(lmm.hidden_size, dtype=lmm.dtype), torch.zeros(lmm.hidden_size, dtype=lmm.dtype))
    settings = ", ".join(f"{name}: {value}" for name, value in options.items()) or "no options"
    raise UserError(
        f"connector: llama.cpp has no {kind} ({settings}) that takes a picture as ours does, only one linear map, or "
        "two with a gelu between them: model.connector: {type: mlp2x_gelu} or linear"
    )


def _through_gelu(weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return two maps with a GELU between them that compute one: [1, -1] gelu([x; -x]) = x."""
    unit = torch.eye(len(bias), dtype=bias.dtype)
    both = torch.cat([weight, -weight]), torch.cat([bias, -bias])
    return [both, (torch.cat([unit, -unit], dim=1), torch.zeros_like(bias))]


def _say_pixels(lmm: LMM, tower: EncoderTower, mean: list[int]) -> None:
    """Warn of pictures that llama.cpp prepares otherwise: it pads to a square, with one colour for each tower."""
    colour = [0, 0, 0] if shuffles(lmm) else _COLOURS[tower.name]
    if tower.name == "clip":
        log.warning(
            "vision.type: clip; llama.cpp since May 2025 puts the class token behind the patches instead of before "
            "them (its issue 25814), so until that is mended it answers otherwise than this model; siglip's are right"
        )
    if lmm.config.image_mode == "square":
        log.warning(
            "image_mode: square; llama.cpp pads a picture that is not square where this model's training %s it: send "
            "square ones, or train with data.image_mode=pad",
            "squashed" if tower.name == "siglip" else "cropped",
        )
    elif mean != colour:
        log.warning("image processor: pads with the colour %s, llama.cpp with %s", mean, colour)
