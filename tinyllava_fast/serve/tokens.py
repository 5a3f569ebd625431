"""Texts to tokens and back, for clients that want to count."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

from tinyllava_fast.data.templates._literal import literal_prompts
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Message


class TextTokens:
    """Tokens of literal texts: no control token but those that the tokenizer puts before any text."""

    def __init__(self, engine: Engine) -> None:
        self.template = engine.template
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # the engine uses its own at the same time
        self._lock = threading.Lock()

    def ids(self, text: str) -> list[int]:
        """Return the ids of a prompt without a chat template."""
        messages: list[Message] = [{"from": "prompt", "value": [text]}]
        with self._lock:
            return literal_prompts(self.template, [messages], self.tokenizer, [False])[0]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens by their names."""
        with self._lock:
            return str(self.tokenizer.decode(list(ids)))
