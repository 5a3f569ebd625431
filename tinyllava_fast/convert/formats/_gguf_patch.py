"""A tower trained without its first patch, for llama.cpp, which keeps every patch.

TinyLLaVA Factory drops the first token of every tower, which of SigLIP is a patch of the picture. The export keeps it:
the language model sees one row more than in training, and how often that changes an answer is measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from PIL import Image

from tinyllava_fast.convert.formats._base import Model
from tinyllava_fast.data.images import ImageMode, load_image
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.log import log
from tinyllava_fast.models.construct import build
from tinyllava_fast.models.lmm import LMM

_MOST, _TOKENS = 32, 32
_QUESTION = "<image>\nDescribe the image."


def keep_first_patch(model: Model, pictures: Path) -> tuple[Model, str]:
    """Return the model with its first patch, and a sentence about what that changed on the pictures of a folder.

    Raises UserError for a folder without pictures.
    """
    files = sorted(path for path in pictures.iterdir() if path.is_file()) if pictures.is_dir() else []
    images: list[Image.Image] = []
    for path in files:
        try:
            images += [load_image(path, model.lmm.config.reading)] if len(images) < _MOST else []
        except DataError as error:
            log.warning("%s; it is left out", error)
    if not images:
        raise UserError(f"--keep-first-patch {pictures}: expected a folder of pictures on which to compare answers")
    kept = replace(model, lmm=_whole(model.lmm))
    pairs = list(zip(_answers(model, images), _answers(kept, images), strict=True))
    same = sum(ours == theirs for ours, theirs in pairs)
    agree = sum(_agreeing(*pair) for pair in pairs) / sum(max(map(len, pair)) for pair in pairs)
    said = (
        f"it sees {kept.lmm.tokens_per_image} tokens a picture, and was trained on {model.lmm.tokens_per_image}, which "
        f"lack the first patch; of {len(pairs)} answers about pictures of {pictures.name}, {same} are the same, and "
        f"{100 * agree:.0f} % of their tokens come before the first difference"
    )
    log.warning("--keep-first-patch: %s", said)
    return kept, said


def _whole(lmm: LMM) -> LMM:
    """Return the same weights behind a tower that drops nothing."""
    config = replace(lmm.config, vision=replace(lmm.config.vision, feature_select="cls_patch"), has_lora=False)
    whole = build(config, dtype=lmm.dtype, file="the model with its first patch")
    whole.load_state_dict(lmm.state_dict())
    return whole.eval()


def _answers(model: Model, images: list[Image.Image]) -> list[list[int]]:
    config = model.lmm.config
    template = TEMPLATES.get(config.template, "template")
    mode = cast(ImageMode, config.image_mode)
    engine = Engine(model.lmm, model.tokenizer, model.processor, template, image_mode=mode)
    sampling = Sampling(max_new_tokens=_TOKENS)
    return [
        answer.tokens for answer in engine.answers([Request.ask(_QUESTION, [i], sampling=sampling) for i in images])
    ]


def _agreeing(ours: list[int], theirs: list[int]) -> int:
    """Return how many tokens come before the first difference."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
