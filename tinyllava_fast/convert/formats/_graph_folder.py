"""The files beside the graphs of a model: tokenizer, chat template, how pictures are prepared, how answers end.

Engines that run graphs make one text of a prompt and tokenize it whole, without the tokens that a tokenizer adds: the
text begins with those, and every ``<image>`` in it is repeated, once for each row of the picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tinyllava_fast.convert.formats._base import Model
from tinyllava_fast.convert.formats._chat import chat_template, plain_template
from tinyllava_fast.convert.formats._llava_processor import with_image_token
from tinyllava_fast.data.images import pixel_shape, short_edge
from tinyllava_fast.data.templates.base import Template, Turns
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.hf import config_to_dict

Tokenize = Callable[[str], list[int]]
"""A text's ids without the tokens that a tokenizer adds."""

_GLUES = ("", " ")
"""Between the last image token and the line break; see _llava_processor.py."""
_ASKED = "What is the blue shape?"
_PROBES: tuple[tuple[Turns, bool], ...] = (
    ([(f"{IMAGE_TOKEN}\n{_ASKED}", None)], False),
    ([(f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\n{_ASKED}", None)], True),
    ([(f"{IMAGE_TOKEN}\nWhat colour is it?", "It is red."), ("It's 12,345 o'clock; naïve, 中文 🙂?", None)], False),
    ([("Is it raining?", None)], False),
)
"""Turns, and whether each marker stands for an image of its own."""


@dataclass(frozen=True)
class OneText:
    """Prompts as one text. tokenizer: knows ``<image>``. front: text of the tokens that begin a prompt."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_token: int
    rows: int
    front: str
    glue: str

    def prompt(self, turns: Turns, interleaved: bool = False) -> str:
        """Return the text of a prompt, each image token repeated."""
        text = self.template.render(turns, self.tokenizer, interleaved).text
        return self.front + text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.rows + self.glue)

    def agrees(self, tokenize: Tokenize) -> bool:
        """Return whether a tokenizer makes of such texts what our prompts are."""
        return all(tokenize(self.prompt(*probe)) == self._ids(*probe) for probe in _PROBES)

    def chat_template(self) -> str:
        """Return the Jinja form, for engines that put image tokens, then a line break, before a question."""
        broken, mended = (json.dumps(f"{IMAGE_TOKEN}{glue}\n") for glue in ("", self.glue))
        prepare = f"{{%- set found.text = found.text | replace({broken}, {mended}) -%}}\n" if self.glue else ""
        return chat_template(self.template.with_system(self.front + self.template.system), image="", prepare=prepare)

    def _ids(self, turns: Turns, interleaved: bool) -> list[int]:
        [prompt] = self.template.prompt_batch([turns], self.tokenizer, [interleaved])
        image = [self.image_token] * self.rows
        return [token for part in prompt.ids for token in (image if part == IMAGE_INDEX else [part])]


def one_text(model: Model) -> OneText:
    """Return how the prompts of a model are made of one text.

    Raises UserError if no way gives the ids that we train on, or if a picture is more than one input of the tower.
    """
    if (mode := model.lmm.config.image_mode) not in ("square", "pad"):
        raise UserError(f"image_mode: {mode}; these graphs take one square image a marker: data.image_mode=square")
    template = plain_template(model.lmm.config.template)
    tokenizer = with_image_token(model.tokenizer)
    token = int(tokenizer.get_vocab()[IMAGE_TOKEN])
    plain: Tokenize = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    bos = tokenizer.bos_token or ""
    for front in ("", bos, f"{bos} "):  # SentencePiece marks the start of a text by a space
        for glue in _GLUES:
            found = OneText(template, tokenizer, token, model.lmm.tokens_per_image, front, glue)
            if replace(found, rows=2).agrees(plain):
                tokenizer.chat_template = found.chat_template()  # ours instead of the language model's
                return found
    raise UserError("tokenizer: as one text, prompts of this tokenizer do not have the ids that it was trained with")


def write_settings(model: Model, text: OneText, folder: Path) -> None:
    """Write tokenizer, configuration, the picture's preparation and the end tokens, as transformers names the files."""
    lmm = model.lmm
    text.tokenizer.save_pretrained(folder)  # with chat_template.jinja
    config = {
        "model_type": "llava",
        "image_token_index": text.image_token,
        "image_seq_length": text.rows,
        "prompt": text.front + text.template.render([("{question}", None)], text.tokenizer).text,
        "image_glue": f"{text.glue}\n",
        "text_config": config_to_dict(lmm.llm.config),
        "vision_config": {"image_size": lmm.image_size, "patch_size": _patch_size(model)},
    }
    ends = sorted({text.template.stop_id(model.tokenizer), *lmm.family.stop_ids(lmm.llm)})
    pad = model.tokenizer.pad_token_id
    generation = {
        "eos_token_id": ends,
        "bos_token_id": model.tokenizer.bos_token_id,
        "pad_token_id": ends[0] if pad is None else pad,
        "do_sample": False,
    }
    files = {"config": config, "preprocessor_config": _pictures(model), "generation_config": generation}
    for name, values in files.items():
        known = {key: value for key, value in values.items() if value is not None}
        (folder / f"{name}.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def known_tokens(model: Model) -> int:
    """Return the number of ids that the tokenizer knows: the rest of the vocabulary is padding."""
    return min(largest_id(model.tokenizer)[1] + 1, model.lmm.vocab_size)


def _pictures(model: Model) -> dict[str, object]:
    """Return how a picture becomes pixels; ``do_pad``: it is first centred on a square of the mean colour."""
    settings = vars(model.processor)
    _, height, width = pixel_shape(model.processor)
    crop = bool(settings.get("do_center_crop"))
    edge = short_edge(model.processor)[0] if crop else height
    squash = {} if crop else {"height": height, "width": width}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_pad": model.lmm.config.image_mode == "pad",
        "size": {"shortest_edge": edge, **squash},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": crop,
        "resample": int(settings["resample"]),
        "rescale_factor": model.processor.rescale_factor,
        "image_mean": list(settings["image_mean"]),
        "image_std": list(settings["image_std"]),
    }


def _patch_size(model: Model) -> int:
    """Return the side of a patch: engines want a number, though the graph alone decides how many rows there are."""
    tower = getattr(model.lmm.vision, "clip", model.lmm.vision)
    return int(getattr(getattr(tower, "config", None), "patch_size", model.lmm.image_size))
