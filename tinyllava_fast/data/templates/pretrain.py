"""Caption pre-training: ``<image>caption`` and a newline, no system text, the question discarded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinyllava_fast.data.templates.base import TEMPLATES, Rendered, Template, Turns
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import UserError


@dataclass(frozen=True)
class PretrainTemplate(Template):
    """Everything after the first images is supervised, the final newline included; no end token is learnt."""

    def render(self, turns: Turns, tokenizer: Any, interleaved: bool = False) -> Rendered:
        """``<image>{answer}`` and a newline for every turn; an open answer leaves the image alone.

        interleaved: as many images as the question has markers, without its text.
        """
        counts = [question.count(IMAGE_TOKEN) if interleaved else 1 for question, _ in turns]
        pairs = zip(counts, turns, strict=True)
        text = "".join(IMAGE_TOKEN * n + ("" if answer is None else f"{answer}\n") for n, (_, answer) in pairs)
        return Rendered(text, [(len(IMAGE_TOKEN) * counts[0], len(text))])

    def with_system(self, system: str) -> Template:
        """Raise UserError."""
        raise UserError("the chat template 'pretrain' has no place for a system text; leave it out")


TEMPLATES.register("pretrain")(
    PretrainTemplate(
        eos="", system="", separator="", reference_masks="pretrain", needs_image=True, shows_questions=False
    )
)
