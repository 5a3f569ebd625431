"""The reference's label masks, faults included: for results that must equal TinyLLaVA Factory's (``masks: reference``).

It counts tokens of separately tokenized rounds, corrects the counts by constants for a family of tokenizers, and masks
the whole sample where the counts do not add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllava_fast.data.templates._pieces import added_ids, encode_pieces
from tinyllava_fast.data.types import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinyllava_fast.data.templates.base import Template


def reference_spans(
    template: Template, tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]
) -> list[tuple[int, int]]:
    """Supervised token ranges of a prompt as the reference computes them; none where it masks everything."""
    count = _Counter(tokenizer)
    if template.reference_masks == "pretrain":
        return _runs([False] * min(count(IMAGE_TOKEN), len(ids)) + [True] * (len(ids) - count(IMAGE_TOKEN)))
    keep = [True] * len(ids)
    bos = 0 if template.reference_masks == "generic" else 1
    eos = 1 if bos else len(tokenizer.encode(template.eos))
    keep[:bos] = [False] * bos
    current = bos
    for number, part in enumerate(text.split(template.eos)):
        halves = part.split(template.separator)
        if not part or len(halves) != 2:
            break
        length = count(part) + eos - bos
        instruction = count(halves[0] + template.separator) - 1 - bos
        if number and template.reference_masks == "llama" and tokenizer.init_kwargs.get("legacy") is False:
            length, instruction = length - 1, instruction - 1
        stop = min(current + instruction, len(ids))
        keep[current:stop] = [False] * (stop - current)
        current += length
    keep[current:] = [False] * len(keep[current:])
    total = sum(i != tokenizer.pad_token_id for i in ids)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        total += text.count(template.eos)
    if current < tokenizer.model_max_length and current != total:
        return []
    return _runs(keep)


class _Counter:
    """Number of ids of a text, each piece around ``<image>`` tokenized by its own call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.front = len(added_ids(tokenizer)[0])

    def __call__(self, text: str) -> int:
        pieces = text.split(IMAGE_TOKEN)
        encodings = encode_pieces(self.tokenizer, pieces)
        return self.front + sum(len(encodings[p].ids) for p in pieces) + len(pieces) - 1


def _runs(keep: list[bool]) -> list[tuple[int, int]]:
    """Half-open ranges of True."""
    edges = [i for i, (a, b) in enumerate(zip([False, *keep], [*keep, False], strict=True)) if a != b]
    return list(zip(edges[0::2], edges[1::2], strict=True))
