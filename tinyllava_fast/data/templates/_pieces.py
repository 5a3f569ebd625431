"""Rendered prompts to token ids, and which of the ids show the characters that are learnt.

A prompt is cut at ``<image>``; every distinct piece is tokenized once, without what a tokenizer adds to every text.
"""

from __future__ import annotations

import threading
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from operator import gt
from typing import TYPE_CHECKING, Protocol, cast

from tokenizers import Encoding, Tokenizer

from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import is_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_PROBES = ("a", "A", "0", ".", "\u2581")
_UNSEEN = ("Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs")  # control and format characters, combining marks, white space
_swapping = threading.Lock()  # one text at a time takes a tokenizer's post-processor away


@dataclass(frozen=True)
class Rendered:
    """Prompt text with literal ``<image>`` and the character ranges that are supervised."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A rendered prompt as tokens, and what became of its ranges of characters."""

    ids: list[int]
    """Token ids; IMAGE_INDEX stands for one image."""
    spans: list[tuple[int, int]]
    """Half-open ranges of supervised tokens, ascending: one for each piece that a range of characters reaches into."""
    learnt: list[list[int]]
    """The supervised ids of each range of characters."""
    lost: list[str]
    """The characters of each range that can be seen and that no token shows."""


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Rendered], *, with_front: bool) -> list[Encoded]:
    """Return every rendered prompt as tokens, all of them tokenized in one parallel call.

    with_front: begin each with the ids that the tokenizer puts before a text. DataError as for ``encode_pieces``.
    """
    cut = [item.text.split(IMAGE_TOKEN) for item in texts]
    pieces = {text: _Piece(text, found) for text, found in encode_pieces(tokenizer, chain.from_iterable(cut)).items()}
    front = added_ids(tokenizer)[0] if with_front else []
    greedy = {number for number, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
    pairs = zip(texts, cut, strict=True)
    return [_join(item.spans, [pieces[text] for text in parts], front, greedy) for item, parts in pairs]


class Backed(Protocol):
    """A tokenizer of the tokenizers library with a name for messages."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """Return what encodes."""
        ...

    @property
    def name_or_path(self) -> str:
        """Return its name."""
        ...


def encode_pieces(tokenizer: PreTrainedTokenizerBase | Backed, pieces: Iterable[str]) -> dict[str, Encoding]:
    """Return the encoding of every distinct text, without the tokens that the tokenizer adds to every text.

    One parallel call. The offsets are of the text as it is given, and a token that holds a space covers it: the
    tokenizer's post-processor, which would leave it out where ``trim_offsets`` is set, does not run.
    DataError for text that holds half of a surrogate pair, or that this tokenizer cannot encode.
    """
    distinct = list(dict.fromkeys(pieces))
    if not is_text("".join(distinct)):
        bad = next(piece for piece in distinct if not is_text(piece))
        raise DataError(f"the text {_excerpt(bad)!a} contains half of a surrogate pair; mend it")
    backend = _untrimmed(tokenizer)
    with _swapping:
        post_processor = backend.post_processor
        backend.post_processor = None
        try:
            with named_errors(tokenizer):
                return dict(zip(distinct, backend.encode_batch(distinct, add_special_tokens=False), strict=True))
        finally:
            backend.post_processor = post_processor


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and behind every text. UserError if that cannot be told."""
    backend = _untrimmed(tokenizer)
    for probe in _PROBES:
        with named_errors(tokenizer):
            whole = backend.encode(probe)
        own = [at for at, is_added in enumerate(whole.special_tokens_mask) if not is_added]
        if own:
            return whole.ids[: own[0]], whole.ids[own[-1] + 1 :]
    raise UserError(f"the tokenizer {tokenizer.name_or_path!r} makes no token of any of {_PROBES}; choose another one")


@contextmanager
def named_errors(tokenizer: PreTrainedTokenizerBase | Backed) -> Iterator[None]:
    """Raise what a tokenizer says of a text as a DataError: one without an unknown token raises a bare Exception."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} cannot encode a text: {error}; choose a tokenizer that knows "
            "every character, or that has an unknown token"
        ) from error


class Offsets:
    """The characters of a piece that each of its tokens covers.

    A tokenizer may leave characters out, most often white space; several tokens may share a character, which is then
    one of several bytes; and a token may cover nothing, where the tokenizer puts a mark of its own before a text.
    """

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        """offsets: half-open ranges of characters, one a token."""
        starts, stops = map(list, zip(*offsets, strict=True)) if offsets else ([], [])
        self.starts: list[int] = starts
        self._stops: list[int] = stops
        # Normalizers that reorder combining marks can make offsets go back by a character.
        self._last_start = list(accumulate(reversed(starts), min))[::-1] if sorted(starts) != starts else starts
        self._first_stop = list(accumulate(stops, max)) if sorted(stops) != stops else stops

    def span(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the half-open range of the tokens that reach into the characters [start, stop); None if none does.

        A token of no width belongs to the character before which it stands.

        ``ASSISTANT: red</s>``, of which `` red</s>`` is learnt; first a tokenizer whose tokens hold the space, then
        one that drops it:

        >>> Offsets([(0, 9), (9, 10), (10, 14), (14, 18)]).span(10, 18)
        (2, 4)
        >>> Offsets([(0, 9), (9, 10), (11, 14), (14, 18)]).span(10, 18)
        (2, 4)

        An answer of a space alone, dropped; and an emoji of four bytes, each a token:

        >>> Offsets([(0, 9), (9, 10)]).span(10, 11) is None
        True
        >>> Offsets([(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)]).span(1, 2)
        (1, 5)
        """
        first = bisect_right(self._first_stop, start)
        while first and self.starts[first - 1] == self._stops[first - 1] == start:
            first -= 1
        last = bisect_left(self._last_start, stop)
        return (first, last) if first < last else None

    def lost(self, text: str, start: int, stop: int, span: tuple[int, int] | None) -> str:
        """Return the characters of text[start:stop] that can be seen and that no token of its span covers, each once.

        >>> offsets = Offsets([(0, 1), (3, 4)])
        >>> offsets.lost("a -b", 0, 4, offsets.span(0, 4))
        '-'
        """
        first, last = span or (0, 0)
        starts, stops = self.starts[first:last], self._stops[first:last]
        if starts and starts[0] <= start and stops[-1] >= stop and not any(map(gt, starts[1:], stops)):
            return ""  # no gap between one token and the next
        covered = {at for a, b in zip(starts, stops, strict=True) for at in range(a, b)}
        missing = (text[at] for at in range(start, stop) if at not in covered)
        return "".join(dict.fromkeys(c for c in missing if unicodedata.category(c) not in _UNSEEN and not c.isspace()))


class _Piece:
    """A text between two images, tokenized."""

    def __init__(self, text: str, encoding: Encoding) -> None:
        self.text = text
        self.ids: list[int] = encoding.ids
        self._encoding = encoding

    @cached_property
    def offsets(self) -> Offsets:
        """The characters of each token, worked out where a piece holds an answer."""
        return Offsets(self._encoding.offsets)


def _join(ranges: Sequence[tuple[int, int]], pieces: list[_Piece], front: list[int], greedy: Container[int]) -> Encoded:
    """Concatenate the pieces with one marker an image between them, behind the ids that stand before every text.

    ranges: of characters that are learnt, in the text whose pieces these are. greedy: ids of tokens that swallow the
    white space behind them.
    """
    result = Encoded(list(front), [], [[] for _ in ranges], [""] * len(ranges))
    begin = 0
    for number, piece in enumerate(pieces):
        if number:
            result.ids.append(IMAGE_INDEX)
        shift, length = len(result.ids), len(piece.text)
        result.ids.extend(piece.ids)
        for n, (start, stop) in enumerate(ranges):
            start, stop = max(start - begin, 0), min(stop - begin, length)
            if start >= stop:
                continue
            span = piece.offsets.span(start, stop)
            result.lost[n] = piece.offsets.lost(piece.text, start, stop, span) or result.lost[n]
            if span is not None:
                first, last = span
                # a token of the prompt that swallows white space behind it, as that of an answer, is not learnt
                first += piece.ids[first] in greedy and piece.offsets.starts[first] < start
                result.spans.append((first + shift, last + shift))
                result.learnt[n].extend(piece.ids[first:last])
        begin += length + len(IMAGE_TOKEN)
    return result


def _excerpt(text: str) -> str:
    """Return the 20 characters on either side of the first one that cannot be written as UTF-8."""
    at = next(i for i, c in enumerate(text) if not is_text(c))
    return text[max(0, at - 20) : at + 20]


def _untrimmed(tokenizer: PreTrainedTokenizerBase | Backed) -> Tokenizer:
    """Return its backend, which neither cuts nor pads a text from here on."""
    backend = cast("PreTrainedTokenizerFast | Backed", tokenizer).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
