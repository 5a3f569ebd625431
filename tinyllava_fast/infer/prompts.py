"""From requests to token ids: template, one tokenizer call for many prompts, image rows, length checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.schedule import IMAGE_ROW, Running
from tinyllava_fast.infer.types import Message, Request

TOKENIZE_TOGETHER = 512


@dataclass(frozen=True)
class Prompts:
    """Turns requests into sequences.

    template: chat template with ``prompt_batch``. tokens_per_image: rows that one image marker becomes. context: most
    positions of the model, None if unlimited. most: largest prompt + answer that the K/V pool takes.
    """

    template: Any
    tokenizer: Any
    tokens_per_image: int
    context: int | None
    most: int

    def sequences(self, requests: Iterable[Request]) -> Iterator[Running]:
        """One sequence per request, in order, read lazily.

        Raises UserError naming the request for an image marker without an image and for a prompt that does not fit.
        """
        source = iter(requests)
        while chunk := list(islice(source, TOKENIZE_TOGETHER)):
            prompts = self.template.prompt_batch([_conversation(r) for r in chunk], self.tokenizer)
            for request, prompt in zip(chunk, prompts, strict=True):
                sequence = Running(request, expand([*prompt.prefix, *prompt.suffix], self.tokens_per_image))
                self._check_fits(sequence)
                if request.sampling.temperature > 0:
                    sequence.generator = torch.Generator().manual_seed(request.sampling.seed)
                yield sequence

    def _check_fits(self, sequence: Running) -> None:
        request, length = sequence.request, len(sequence.prompt)
        new = request.sampling.max_new_tokens
        needs = f"request {request.id!r}: {length} prompt tokens and {new} new ones"
        if self.context is not None and length + new > self.context:
            raise UserError(
                f"{needs} exceed the model's context of {self.context}; shorten the prompt or lower max_new_tokens"
            )
        if length + new > self.most:
            raise UserError(f"{needs} exceed batch_tokens; raise it to {length + new} or more")


def expand(ids: list[int], tokens_per_image: int) -> list[int]:
    """Replace each image marker by as many IMAGE_ROW entries as an image has tokens.

    >>> expand([1, -200, 5], 2)
    [1, -1, -1, 5]
    """
    rows: list[int] = []
    for i in ids:
        rows += [IMAGE_ROW] * tokens_per_image if i == IMAGE_INDEX else [i]
    return rows


def _conversation(request: Request) -> list[Message]:
    messages = request.conversation()
    if request.image is None and any(IMAGE_TOKEN in str(m["value"]) for m in messages):
        raise UserError(f"request {request.id!r}: its text holds {IMAGE_TOKEN} but it has no image; give it one")
    return messages
