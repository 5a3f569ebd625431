"""Texts to tokens and back, for clients that want to count."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyllava_fast.data.templates._literal import literal_prompts
from tinyllava_fast.data.templates.base import Rendered, Template, Turns


@dataclass(frozen=True)
class _Bare(Template):
    """Nothing around a text."""

    def render(self, turns: Turns, tokenizer: Any, interleaved: bool = False) -> Rendered:
        """See the base class."""
        return Rendered(turns[0][0], [])


class TextTokens:
    """Tokens of literal texts: no control token but those that the tokenizer puts around any text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)  # the engine uses its own at the same time
        self._lock = threading.Lock()

    def ids(self, text: str, around: bool = True) -> list[int]:
        """Return the ids of a text. around: with the tokens that the tokenizer puts in front of any text."""
        template = _Bare(eos=self.tokenizer.eos_token or "", adds_special_tokens=around)
        messages = [{"from": "human", "value": [text]}, {"from": "gpt", "value": None}]
        with self._lock:
            return literal_prompts(template, [messages], self.tokenizer, [False])[0]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens by their names."""
        with self._lock:
            return str(self.tokenizer.decode(list(ids)))
