"""LlavaProcessor for a model of ours: its prompts have the ids that our templates make, its pixels are ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tokenizers import AddedToken
from transformers import BaseImageProcessor, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tinyllava_fast.convert.formats._base import Model
from tinyllava_fast.convert.formats._chat import chat_template, plain_template
from tinyllava_fast.data.images import pixel_shape
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.vision._encoder import EncoderTower

SELECTIONS = {"patch": "default", "cls_patch": "full"}
# Between the image token and the line break. SentencePiece tokenizers that mark the start of a text only once need a
# space there: our prompts are tokenized piece by piece, and each piece gets that mark.
_GLUES = ("", " ")
_PROBES: tuple[list[tuple[str, str | None]], ...] = (
    [("<image>\nWhat is the blue shape?", None)],
    [("What colour is it?\n<image>", "It is red."), ("Why?", None)],
    [("Is it raining?", None)],
)


def build_processor(model: Model, vision: EncoderTower) -> LlavaProcessor:
    """Return the processor of a model and its tower. Raises UserError if none makes our ids and pixels."""
    template = plain_template(model.lmm.config.template)
    dropped = vision.num_dropped
    if dropped > 1:
        raise UserError(f"vision.feature_select: {vision.name} drops {dropped} tokens, transformers' llava one or none")
    patch = vision.config.patch_size
    prefix = vision.num_tokens + dropped - (vision.image_size // patch) ** 2
    tokenizer = with_image_token(model.tokenizer)
    for glue in _GLUES:
        processor = LlavaProcessor(
            image_processor=_image_processor(model),
            tokenizer=tokenizer,
            patch_size=patch,
            vision_feature_select_strategy=SELECTIONS[vision.feature_select],
            chat_template=chat_template(template, image=f"{IMAGE_TOKEN}{glue}\n"),
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=prefix,
        )
        if all(_agrees(processor, model, template, probe) for probe in _PROBES):
            return processor
    raise UserError("tokenizer: as one text, prompts of this tokenizer do not have the ids that it was trained with")


def write_image_processor(model: Model, folder: Path) -> None:
    """Write preprocessor_config.json, which other loaders read: transformers 5 has processor_config.json alone.

    Its ``crop_size`` is stated even where nothing is cropped: some take 336 pixels where it is missing.
    """
    made = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    _, height, width = pixel_shape(model.processor)
    settings = {"crop_size": {"height": height, "width": width}} | made["image_processor"]
    settings["processor_class"] = made["processor_class"]
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that knows ``<image>`` and is loaded from its tokenizer.json as it is, not rebuilt from the vocabulary."""
    copied = copy.deepcopy(tokenizer)
    if IMAGE_TOKEN not in copied.get_vocab():
        copied.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return copied


def _image_processor(model: Model) -> BaseImageProcessor:
    processor = model.processor
    if model.lmm.config.image_mode == "square":
        return processor
    if model.lmm.config.image_mode != "pad":
        raise UserError(f"image_mode: {model.lmm.config.image_mode}; transformers' llava has one square image a marker")
    _, height, width = pixel_shape(processor)
    settings = vars(processor)
    size = dict(settings["size"])
    if settings.get("do_center_crop") and size.get("shortest_edge") != height:
        raise UserError(f"image processor: size {size} and crop {height} cannot be combined with padding")
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        resample=settings["resample"],
        rescale_factor=processor.rescale_factor,
        image_mean=list(settings["image_mean"]),
        image_std=list(settings["image_std"]),
    )


def _agrees(processor: LlavaProcessor, model: Model, template: Template, turns: list[tuple[str, str | None]]) -> bool:
    ids: list[int] = []
    for token in template.prompt(turns, model.tokenizer).ids:
        ids += [processor.image_token_id] * model.lmm.tokens_per_image if token == IMAGE_INDEX else [token]
    messages: list[dict[str, object]] = []
    for question, answer in turns:
        content: list[dict[str, str]] = [{"type": "text", "text": question.replace(IMAGE_TOKEN, "").strip()}]
        messages.append({"role": "user", "content": [{"type": "image"}] * (IMAGE_TOKEN in question) + content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    render: Callable[..., str] = processor.apply_chat_template
    text = render(messages, add_generation_prompt=True)
    _, height, width = pixel_shape(model.processor)
    images = [Image.new("RGB", (width, height))] * text.count(IMAGE_TOKEN)
    made = processor(text=text, images=images or None, return_tensors=None)["input_ids"]
    return list(made[0] if made and isinstance(made[0], list) else made) == ids
