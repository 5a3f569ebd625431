"""A tokenizer of one's own: byte-level BPE trained on the texts of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.records import read_records
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LARGEST = 2**20  # no text has use for more; the trainer reserves memory for all of them at once
SMALLEST = len(SPECIAL) + 256  # every byte is a token, so no text is unknown
LENGTH = 2048  # tokens: what the tokenizer states as its longest text

Turns = Iterable[tuple[str, str]]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on texts, with <unk>, <s>, </s>, <pad> as ids 0 to 3; it puts <s> in front of a text.

    vocabulary: most tokens; fewer where the texts hold fewer pairs. Raises UserError if it is below 260, which the
    256 bytes and the special tokens take, or above LARGEST.
    """
    if vocabulary < SMALLEST:
        raise UserError(f"a vocabulary of {vocabulary} is too small; give {SMALLEST} (every byte is a token) or more")
    if vocabulary > LARGEST:
        raise UserError(f"a vocabulary of {vocabulary:,} is too large; give {LARGEST:,} at most")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTH,
    )


def pieces(turns: Turns) -> list[str]:
    """The texts that a conversation is tokenized as: the llama template's, cut at end tokens and image markers."""
    text = TEMPLATES.get("llama").render(list(turns), None).text
    return [piece for part in text.split("</s>") for piece in part.split(IMAGE_TOKEN)]


def texts_of(files: Iterable[str | Path]) -> Iterator[str]:
    """The texts of record files for ``train_tokenizer``. Raises DataError as ``read_records`` does."""
    for path in files:
        for record in read_records(path):
            yield from pieces(record.turns)
            if record.system is not None:
                yield record.system
