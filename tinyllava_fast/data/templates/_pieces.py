"""Texts to tokens, without what a tokenizer adds to every text; and the tokens of a range of characters."""

from __future__ import annotations

import threading
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import gt
from typing import Any

from tokenizers import Encoding

from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import is_text

_PROBES = ("a", "A", "0", ".", "\u2581")
_UNSEEN = ("Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs")  # control and format characters, combining marks, white space
_swapping = threading.Lock()  # one text at a time takes a tokenizer's post-processor away


def encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> dict[str, Encoding]:
    """Return the encoding of every distinct text, without the tokens that the tokenizer adds to every text.

    One parallel call. The offsets are of the text as it is given, and a token that holds a space covers it: the
    tokenizer's post-processor, which would leave it out where ``trim_offsets`` is set, does not run.
    DataError for text that holds half of a surrogate pair, or that this tokenizer cannot encode.
    """
    distinct = list(dict.fromkeys(pieces))
    for piece in distinct:
        if not is_text(piece):
            raise DataError(f"the text {_excerpt(piece)!a} contains half of a surrogate pair; mend it")
    backend = _untrimmed(tokenizer)
    with _swapping:
        post_processor = backend.post_processor
        backend.post_processor = None
        try:
            with named_errors(tokenizer):
                return dict(zip(distinct, backend.encode_batch(distinct, add_special_tokens=False), strict=True))
        finally:
            backend.post_processor = post_processor


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
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
def named_errors(tokenizer: Any) -> Iterator[None]:
    """What a tokenizer says of a text, as a DataError: one without an unknown token raises a bare Exception."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} cannot encode a text: {error}; choose a tokenizer that knows "
            "every character, or that has an unknown token"
        ) from error


class Offsets:
    """Which characters of a piece each of its tokens covers.

    A tokenizer may leave characters out, most often white space; several tokens may share a character, which is then
    one of several bytes; and a token may cover nothing, where the tokenizer puts a mark of its own before a text.
    """

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        """offsets: half-open ranges of characters, one a token."""
        starts, stops = map(list, zip(*offsets, strict=True)) if offsets else ([], [])
        self._starts: list[int] = starts
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
        while first and self._starts[first - 1] == self._stops[first - 1] == start:
            first -= 1
        last = bisect_left(self._last_start, stop)
        return (first, last) if first < last else None

    def lost(self, text: str, start: int, stop: int) -> str:
        """Return the characters of text[start:stop] that can be seen and that no token covers, each once.

        >>> Offsets([(0, 1), (3, 4)]).lost("a -b", 0, 4)
        '-'
        """
        first, last = self.span(start, stop) or (0, 0)
        starts, stops = self._starts[first:last], self._stops[first:last]
        if starts and starts[0] <= start and stops[-1] >= stop and not any(map(gt, starts[1:], stops)):
            return ""  # no gap between one token and the next
        covered = {at for a, b in zip(starts, stops, strict=True) for at in range(a, b)}
        missing = (text[at] for at in range(start, stop) if at not in covered)
        return "".join(dict.fromkeys(c for c in missing if unicodedata.category(c) not in _UNSEEN and not c.isspace()))


def _excerpt(text: str) -> str:
    """The 20 characters on either side of the first one that cannot be written as UTF-8."""
    at = next(i for i, c in enumerate(text) if not is_text(c))
    return text[max(0, at - 20) : at + 20]


def _untrimmed(tokenizer: Any) -> Any:
    """Its backend, which neither cuts nor pads a text from here on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
