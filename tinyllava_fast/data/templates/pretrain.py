"""Caption pre-training: ``<image>caption`` and a newline, no system text, the question discarded."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllava_fast.data.templates.base import TEMPLATES, Rendered, Template, Turns
from tinyllava_fast.data.types import IMAGE_TOKEN


@dataclass(frozen=True)
class PretrainTemplate(Template):
    """Everything after the first image is supervised, the final newline included; no end token is learnt."""

    def render(self, turns: Turns) -> Rendered:
        """``<image>{answer}`` and a newline for every turn; an open answer leaves the image alone."""
        text = "".join(IMAGE_TOKEN + ("" if answer is None else f"{answer}\n") for _, answer in turns)
        return Rendered(text, [(len(IMAGE_TOKEN), len(text))])


# Independent turns share no prefix here: the token after the image is supervised, and a prefix carries no label.
TEMPLATES.register("pretrain")(
    PretrainTemplate(eos="", system="", separator="", reference_masks="pretrain", needs_image=True, shares_prefix=False)
)
