"""Token ids to text as they come: whole characters only, nothing of a stop text, nothing ever taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class TextStream:
    """The text of one answer while it grows.

    ``push`` takes tokens and returns what can be shown for good; with what ``close`` returns the pieces add up to
    ``text``: the decoded answer without special tokens, cut before the first stop text, stripped.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self._ids: list[int] = []
        self._settled = 0  # tokens whose text is known
        self._context = 0  # tokens before it that are decoded along: some decoders strip the front of a text
        self._text = ""  # decoded so far, before stripping
        self._shown = 0

    @property
    def text(self) -> str:
        """What has been decoded up to now, stripped. After ``close``: the answer."""
        return self._text.strip()

    def push(self, token: int) -> str:
        """Add a token; returns the piece that it completes, "" if none. Sets ``stopped`` where a stop text is complete."""
        self._ids.append(token)
        before = len(self._text)
        self._text += self._new_text(final=False)
        self._cut(before)
        return self._piece(held=0 if self.stopped else self._possible_stop())

    def close(self) -> str:
        """The last piece: what was held back because it might have gone on."""
        if not self.stopped:
            before = len(self._text)
            self._text += self._new_text(final=True)
            self._cut(before)
        return self._piece(held=0)

    def _new_text(self, final: bool) -> str:
        """Text of the unsettled tokens; "" while it ends within a character, unless nothing will follow."""
        context = self._decode(self._ids[self._context : self._settled])
        whole = self._decode(self._ids[self._context :])
        if len(whole) <= len(context) or (whole.endswith(UNFINISHED) and not final):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return whole[len(context) :]

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
        """What may be shown now: never the white space at either end of the answer."""
        safe = self._text[: len(self._text) - held].rstrip()
        if not self._shown:
            self._shown = len(safe) - len(safe.lstrip())
        piece = safe[self._shown :]
        self._shown = max(self._shown, len(safe))
        return piece
