"""A prompt with its pictures, ready to be run with gradients: the same tokens and pixels as the engine's.

Legend: T tokens, I image rows of the prompt, N inputs of the tower, K tower tokens, K' rows of an input, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from tinyllava_fast.data.anyres import input_boxes, tiles
from tinyllava_fast.data.images import Box, seen_box, to_pixels
from tinyllava_fast.data.objects import DecodedImage
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.scheduling.images import ImageEncoder
from tinyllava_fast.infer.scheduling.prompts import Preparer
from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW
from tinyllava_fast.infer.types import IMAGE, Request
from tinyllava_fast.models.lmm import LMM


@dataclass(frozen=True)
class Prompt:
    """A request as the model gets it.

    ids: of the prompt, IMAGE_ROW where an image row is. spans: (start, rows, picture) of each marker. inputs: how many
    inputs of the tower each picture is, and boxes what they show of it.
    """

    request: Request
    ids: list[int]
    spans: Sequence[tuple[int, int, int]]
    pictures: Sequence[Image.Image]
    boxes: Sequence[Sequence[Box]]

    @property
    def inputs(self) -> list[int]:
        """Inputs of the tower that each picture is."""
        return [len(some) for some in self.boxes]

    @property
    def question(self) -> str:
        """The text of the last message."""
        value = self.request.messages[-1]["value"]
        if isinstance(value, (list, tuple)):
            return "".join(str(part) for part in value if part is not IMAGE).strip()
        return str(value)


class Prompts:
    """Makes prompts of requests, and embeddings of prompts. lmm: plain, in eval mode."""

    def __init__(self, lmm: LMM, preparer: Preparer) -> None:
        self.lmm = lmm
        self.preparer = preparer
        self.images: ImageEncoder = preparer.images
        self.side = math.isqrt(max(lmm.vision.patch_numbers) + 1)
        """Patches a side of the tower's input."""

    def prompt(self, request: Request) -> Prompt:
        """Return the prompt of a request. Raises what is wrong with it as ``Engine.run``, UserError without images."""
        sequence = self.preparer(request)
        if sequence.error is not None:
            raise sequence.error
        if not sequence.image_spans:
            raise UserError(f"{request.named}: there is no picture to look at; give it one")
        pictures = [one.pixels for one in sequence.request.images if isinstance(one, DecodedImage)]
        spans = [(span.start, span.rows, span.image) for span in sequence.image_spans]
        return Prompt(sequence.request, sequence.prompt, spans, pictures, [self._boxes(p.size) for p in pictures])

    def asking(self, request: Request, question: str) -> Request:
        """Return the request with another last question, about the same pictures."""
        *before, last = request.messages
        value = last["value"]
        if isinstance(value, (list, tuple)):
            shown = sum(part is IMAGE for part in value)
            asked: object = [*[IMAGE, "\n"] * shown, question]
        else:
            asked = "<image>\n" * str(value).count("<image>") + question
        return replace(request, messages=[*before, {**last, "value": asked}])

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the inputs of the tower, [N, 3, H, W], in the model's dtype on its device."""
        grid, processor = self.images.grid, self.images.processor
        inputs = [one for p in pictures for one in (tiles(p, grid, processor) if grid else [p])]
        return to_pixels(inputs, processor, self.images.mode).to(self.lmm.device, self.lmm.dtype)

    def slots(self, prompt: Prompt) -> Tensor:
        """Return the position of each image row, [I], in the order of ``rows``."""
        ids = torch.tensor(prompt.ids, device=self.lmm.device)
        return (ids == IMAGE_ROW).nonzero()[:, 0]

    def rows(self, prompt: Prompt, encoded: Tensor) -> Tensor:
        """Return what is laid on the slots, [I, ...], of what belongs to each row of each input, [N, K', ...].

        A picture whose marker stands twice is there twice.
        """
        each = encoded.split(prompt.inputs)
        return torch.cat([each[picture].flatten(0, 1) for _, _, picture in prompt.spans])

    def embeds(self, prompt: Prompt, encoded: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the embeddings [T, D] of the prompt and an answer but for its last token. encoded: [N, K', D]."""
        ids = torch.tensor([*prompt.ids, *tokens[:-1]], device=self.lmm.device)
        return self.lmm.embed(ids.clamp_min(0), self.rows(prompt, encoded), self.slots(prompt))

    def _boxes(self, size: tuple[int, int]) -> list[Box]:
        if self.images.grid:
            return input_boxes(size, self.images.grid, self.images.processor)
        return [seen_box(size, self.images.processor, self.images.mode)]
