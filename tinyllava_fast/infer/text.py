"""Token ids to text as they come: whole characters only, nothing of a stop text, nothing ever taken back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token that is one byte of a character
_TIDIED = 8  # characters: tidying looks no further ahead than from the first to the last of " n ' t"


class TextStream:
    """The text of one answer while it grows.

    ``push`` takes tokens and returns what can be shown for good; with what ``close`` returns the pieces add up to
    ``text``: the decoded answer without special tokens, cut before the first stop text, stripped.

    Two things can still change what is decoded, so their text waits: a run of byte tokens, all of which become
    UNFINISHED if the run is not UTF-8 in the end, and the last characters where the tokenizer tidies spaces
    (``clean_up_tokenization_spaces``), which takes them out before a full stop that follows.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self._tidies = _tidies(tokenizer)
        self._ids: list[int] = []
        self._settled = 0  # tokens whose text no later token changes
        self._context = 0  # tokens before it that are decoded along: some decoders strip the front of a text
        self._text = ""  # decoded so far, before stripping
        self._stable = 0  # characters of it that no later token changes
        self._shown = 0

    @property
    def text(self) -> str:
        """Return what has been decoded up to now, stripped. After ``close``: the answer."""
        return self._text.strip()

    def push(self, token: int) -> str:
        """Add a token; returns the piece that it completes, "" if none. ``stopped`` tells of a complete stop text."""
        self._ids.append(token)
        self._extend(final=False)
        return self._piece(held=0 if self.stopped else self._possible_stop())

    def close(self) -> str:
        """The last piece: what was held back because it might have gone on."""
        if not self.stopped:
            self._extend(final=True)
        return self._piece(held=0)

    def _extend(self, final: bool) -> None:
        """Decode the text as it stands with the last token, and end it before a stop text."""
        before = self._stable
        if self._tidies:
            self._tidied_text(final)
        else:
            self._new_text(final)
        self._cut(before)

    def _new_text(self, final: bool) -> None:
        """Add the text of the unsettled tokens; nothing while it ends within a character, unless it ends there."""
        self._text = self._text[: self._stable]
        context = self._decode(self._ids[self._context : self._settled])
        whole = self._decode(self._ids[self._context :])
        if len(whole) <= len(context) or (whole.endswith(UNFINISHED) and not final):
            return
        self._text += whole[len(context) :]
        if final or not self._in_bytes():
            self._context, self._settled = self._settled, len(self._ids)
            self._stable = len(self._text)

    def _tidied_text(self, final: bool) -> None:
        """Decode all tokens together: tidying looks at the characters on either side of a space."""
        whole = self._decode(self._ids)
        if whole.endswith(UNFINISHED) and not final:
            return
        self._text = whole
        if final or not self._in_bytes():
            self._stable = len(whole) if final else max(self._stable, len(whole) - _TIDIED)

    def _in_bytes(self) -> bool:
        """Return whether the last token is a byte, which the next one may join."""
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(self._ids[-1]))) is not None

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _cut(self, before: int) -> None:
        """End the text before the earliest stop text that reaches past ``before``."""
        found = []
        for stop in self.stop:
            at = self._text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append(at)
        if found:
            self._text, self.stopped = self._text[: min(found)], True
            self._stable = len(self._text)

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _piece(self, held: int) -> str:
        """Return what may be shown now: never the white space at either end of the answer."""
        safe = self._text[: min(self._stable, len(self._text) - held)].rstrip()
        if not self._shown:
            self._shown = len(safe) - len(safe.lstrip())
        piece = safe[self._shown :]
        self._shown = max(self._shown, len(safe))
        return piece


def _tidies(tokenizer: Any) -> bool:
    """Return whether ``decode`` takes spaces out; transformers does not for BPE, unless it is forced to."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return forced or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"
