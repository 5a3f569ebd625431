"""transformers' LlavaForConditionalGeneration: loads with AutoModelForImageTextToText and AutoProcessor, without us.

Logits equal ours. What has to be said differently there:
- hidden_states[-2] is read, as in every published LLaVA, so one layer that changes nothing (all weights zero: only its
  residual path is left) follows the layers we have.
- A linear connector is two linear maps with no activation between them, the second the identity.
- Gemma's factor on image rows goes into the projector's last layer, since transformers scales text rows only.
- DINOv2's position table is stored at the size that is used.
- ``<image>`` becomes a token; it and the padding rows of the vocabulary are never generated.
- An adapter that is kept apart goes to ``adapter/``, which peft loads onto the model (_llava_adapter.py).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.convert.formats._llava_adapter import write_adapter
from tinyllava_fast.convert.formats._llava_processor import build_processor, write_image_processor
from tinyllava_fast.convert.formats._towers import TOWERS, completed, plain_encoder, resized_positions
from tinyllava_fast.convert.formats.factory import factory_has
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import adapter
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.hf import config_to_dict
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.vision._encoder import EncoderTower
from tinyllava_fast.models.vision.dinov2 import Dinov2Tower

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu"}


@FORMATS.register("llava")
class LlavaFormat(Format):
    """Language models that transformers has, towers of one encoder, MLP and linear connectors."""

    name = "llava"
    keeps_adapter = True

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        lmm = model.lmm
        apart = adapter.take(lmm)
        _check_llm(lmm)
        encoder = plain_encoder(lmm.vision)
        if encoder is None:
            name = lmm.vision.name
            raise UserError(f"vision.type: {name} is no tower of transformers' llava; it takes {', '.join(TOWERS)}")
        vision, tower = _tower(encoder)
        act, projector = _projector(lmm)
        processor = build_processor(model, encoder)
        token = processor.image_token_id
        text, llm = _language_model(lmm, token)
        config = LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=token,
            image_seq_length=lmm.tokens_per_image,
            projector_hidden_act=act,
            vision_feature_layer=-2,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            tie_word_embeddings=bool(lmm.tied_names()),
        )
        config.dtype = lmm.dtype
        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(config)
        weights = {**llm, **tower, **projector}
        left = llava.load_state_dict(weights, assign=True, strict=False)
        tied = {"lm_head.weight"} if lmm.tied_names() else set()
        assert not left.unexpected_keys and set(left.missing_keys) <= tied, left  # noqa: S101 our own mapping
        llava.tie_weights()
        _set_generation(llava, model, token, text["vocab_size"])
        llava.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_image_processor(model, folder)
        if apart is not None:
            write_adapter(apart, llava, lmm.embedding_scale, folder / adapter.FOLDER)


def _check_llm(lmm: LMM) -> None:
    kind = lmm.llm.config.model_type
    if kind not in CONFIG_MAPPING_NAMES:
        raise UserError(f"llm: {kind} is not in transformers, so its llava cannot hold it; --format factory can")
    if softcap := getattr(lmm.llm.config, "final_logit_softcapping", None):
        raise UserError(f"llm.config.final_logit_softcapping: {softcap}; transformers' llava has no such step")
    _, bias = lmm.family.head(lmm.llm)
    if bias is not None and bool(bias.ne(0).any()):
        raise UserError(
            f"llm: {kind}'s output projection has a bias (lm_head.bias), transformers' llava has none: its logits "
            "would differ; --format factory keeps it"
        )


def _language_model(lmm: LMM, image_token: int) -> tuple[Values, dict[str, Tensor]]:
    """(text config, weights); a row of zeros for the image token where the vocabulary has no room for it."""
    config = config_to_dict(lmm.llm.config) | {"use_cache": True}
    embedding = lmm.family.embedding(lmm.llm).weight
    head, _ = lmm.family.head(lmm.llm)
    extra = max(0, image_token + 1 - embedding.shape[0])
    tied = lmm.tied_names()
    weights = {}
    for name, tensor in lmm.llm.state_dict().items():
        if f"llm.{name}" in tied or name == "lm_head.bias":
            continue
        if extra and tensor.data_ptr() in (embedding.data_ptr(), head.data_ptr()):
            tensor = torch.cat([tensor, tensor.new_zeros(extra, tensor.shape[1])])
        weights[name if name.startswith("lm_head.") else f"model.language_model.{name.removeprefix('model.')}"] = tensor
    return config | {"vocab_size": embedding.shape[0] + extra}, weights


def _tower(vision: EncoderTower) -> tuple[Values, dict[str, Tensor]]:
    """(vision config with one more layer, weights)."""
    if isinstance(vision, Dinov2Tower):
        config, weights = completed(vision, image_size=vision.image_size)
        weights["embeddings.position_embeddings"] = resized_positions(vision)
    else:
        config, weights = completed(vision)
    return config, {f"model.vision_tower.{name}": tensor for name, tensor in weights.items()}


def _projector(lmm: LMM) -> tuple[str, dict[str, Tensor]]:
    """(activation, weights of the two linear maps)."""
    kind, options = lmm.connector.name, asdict(lmm.connector.options)
    state = lmm.connector.state_dict()
    width, dtype = lmm.hidden_size, lmm.dtype
    unit, zero = torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    if kind == "mlp" and options["depth"] == 2:
        act = _ACTIVATIONS[options["activation"]]
        maps = [state[f"layers.{i}.{part}"] for i in (0, 2) for part in ("weight", "bias")]
    elif kind in ("mlp", "linear") and len(state) == 2:
        act, maps = "linear", [*sorted(state.values(), key=lambda t: -t.dim()), unit, zero]
    elif kind == "identity":
        act, maps = "linear", [unit, zero, unit, zero]
    else:
        settings = ", ".join(f"{name}: {value}" for name, value in options.items()) or "no options"
        other = (
            "--format factory keeps it"
            if factory_has(lmm.connector)
            else "nor has TinyLLaVA Factory with these settings: such a model stays in this toolkit's own folder, "
            "which needs no export. A model that is to be exported needs model.connector: {type: mlp2x_gelu} or linear"
        )
        raise UserError(
            f"connector: transformers' llava has no {kind} ({settings}), only two linear maps with an activation "
            f"between them; {other}"
        )
    first_weight, first_bias, weight, bias = maps
    scale = lmm.embedding_scale
    prefix = "model.multi_modal_projector."
    return act, {
        f"{prefix}linear_1.weight": first_weight,
        f"{prefix}linear_1.bias": first_bias,
        f"{prefix}linear_2.weight": weight * scale if scale != 1.0 else weight,
        f"{prefix}linear_2.bias": bias * scale if scale != 1.0 else bias,
    }


def _set_generation(llava: LlavaForConditionalGeneration, model: Model, image_token: int, rows: int) -> None:
    """End tokens as in our engine; ids past the tokenizer and the image token are never generated."""
    from tinyllava_fast.data.templates.base import TEMPLATES

    template = TEMPLATES.get(model.lmm.config.template, "template")
    ends = {template.stop_id(model.tokenizer), *model.lmm.family.stop_ids(model.lmm.llm)}
    known = largest_id(model.tokenizer)[1] + 1
    generation = llava.generation_config
    generation.eos_token_id = sorted(ends)
    generation.bos_token_id = model.tokenizer.bos_token_id
    pad = model.tokenizer.pad_token_id
    generation.pad_token_id = pad if pad is not None else min(ends)
    generation.suppress_tokens = sorted({image_token, *range(known, rows)})
    generation.use_cache = True
