"""A page of samples as training sees them: their images, and every token coloured by whether it is learnt."""

from __future__ import annotations

import random
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._embedded import picture_of
from tinyllava_fast.data.images import load_image
from tinyllava_fast.data.pictures import UPRIGHT, PictureReading
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import check_turns, encode_each, read_records, usable
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IGNORE_INDEX, IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.page import card, document, inline
from tinyllava_fast.prepare.sources import LookedAt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOTE = (
    '<span class="tokens"><span class="learnt">learnt</span> <span>only read</span> '
    '<span class="special">special token</span> <span class="picture">&lt;image&gt;</span></span>; '
    "&#8629; stands for the end of a line. The number of a token is shown under the pointer."
)


def preview(sources: Iterable[LookedAt], count: int, seed: int = 0) -> str:
    """Return an HTML page of ``count`` records of each source, a seeded draw, in their order.

    UserError for a source without a tokenizer. DataError for a record that cannot be used.
    """
    if count < 1:
        raise UserError(f"--samples {count}: give a whole number above 0")
    parts = []
    for source in sources:
        if source.tokenizer is None:
            raise UserError(f"{source.name}: tokens need a tokenizer; give --tokenizer, or a run's YAML")
        records = _drawn(source.data.records, count, seed)
        cards = "\n".join(_card(source, record, source.tokenizer) for record in records)
        head = f"{len(records)} records, drawn with seed {seed}; template {escape(source.data.template)}. {_NOTE}"
        parts.append(f'<header><h1>{escape(source.name)}</h1><p class="note">{head}</p></header>\n{cards}')
    return document("What is learnt from", "\n".join(parts))


def _drawn(records: str, count: int, seed: int) -> list[Record]:
    """Return records drawn with equal chances in one pass, in the order of the file."""
    generator, drawn = random.Random(seed), list[Record]()
    for number, record in enumerate(read_records(records)):
        if number < count:
            drawn.append(record)
        elif (place := generator.randrange(number + 1)) < count:
            drawn[place] = record
    return sorted(drawn, key=lambda record: record.index)


def _card(source: LookedAt, record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    data = source.data
    check_turns(data.records, record, source.template)
    [segments] = usable(encode_each(data.records, [record], source.template, tokenizer, data.turns, data.masks))
    labels = [label for segment in segments for label in segment.labels()]
    learnt = sum(label != IGNORE_INDEX for label in labels)
    note = f"{escape(record.where)}: {len(labels):,} tokens with one for each image, {learnt:,} of them learnt"
    pictures = "".join(_picture(source, image) for image in record.images)
    texts = "\n".join(f'<pre class="tokens">{tokens(segment, tokenizer)}</pre>' for segment in segments)
    return card(f"Record {escape(record.id)}", note, f'<div class="thumbnails">{pictures}</div>\n{texts}')


def _picture(source: LookedAt, image: str) -> str:
    data = source.data
    reading = PictureReading(data.orientation or UPRIGHT.orientation, data.background or UPRIGHT.background)
    try:
        pixels = load_image(picture_of(image, data.image_folder, base_of(data.records)), reading)
    except DataError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    return f'<img alt="" src="{inline(pixels)}">'


def tokens(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokens of a segment as HTML: each a span, whose classes say what it is."""
    special = set(tokenizer.all_special_ids)
    spans, before = [], 0
    for number, (token, label) in enumerate(zip(segment.ids, segment.labels(), strict=True)):
        kinds = ["learnt"] * (label != IGNORE_INDEX) + ["special"] * (token in special)
        if token == IMAGE_INDEX:
            text, kinds = IMAGE_TOKEN, ["picture"]
        else:
            text = _text(before if number else IMAGE_INDEX, token, special, tokenizer)
        before = token
        lines = escape(text).replace("\n", "&#8629;\n")
        spans.append(f'<span class="{" ".join(kinds)}" title="{token}">{lines}</span>')
    return "".join(spans)


def _text(before: int, token: int, special: set[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a token adds to the text; its name where that is nothing that can be shown."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if token in special:
        return name
    if before == IMAGE_INDEX or before in special:
        before_text, both = "", str(tokenizer.decode([token]))
    else:
        before_text, both = str(tokenizer.decode([before])), str(tokenizer.decode([before, token]))
    added = both.removeprefix(before_text)
    return name if not added or "\ufffd" in added else added
