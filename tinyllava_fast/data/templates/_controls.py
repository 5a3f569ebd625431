"""The control tokens of a tokenizer, and a copy of the tokenizer that knows them by secret names only."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.errors import UserError

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SIGNS = [chr(code) for code in range(0x12000, 0x12380)]  # cuneiform: letters that no normalizer alters


class Token(NamedTuple):
    """A control token of an encoding and the characters that it covers, without white space at their ends."""

    id: int
    start: int
    stop: int

    def written(self, text: str, content: str) -> tuple[int, int]:
        """Return the range of the token's content in the text; its own range where a normalizer altered it."""
        begin = self.start - (len(content) - len(content.lstrip()))
        return (begin, begin + len(content)) if text.startswith(content, max(begin, 0)) else (self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Controls:
    """The control tokens of a tokenizer: special ones, added ones, and the one that ends an answer."""

    tokenizer: Any
    contents: Mapping[int, str]
    """The text that each stands for."""
    unknown: frozenset[int]
    """Those that may also stand for characters that the vocabulary lacks: the unknown token, bytes."""

    def found(self, encoding: Encoding, text: str) -> list[Token]:
        """Return the control tokens of a text's encoding."""
        return [
            _without_space(token, *encoding.offsets[at], text)
            for at, token in enumerate(encoding.ids)
            if token in self.contents
        ]

    def certain(self, tokens: Sequence[Token]) -> list[int]:
        """Return the ids of those tokens that stand for nothing but their own content."""
        return [token.id for token in tokens if token.id not in self.unknown]


def controls_of(tokenizer: Any, template: Template) -> Controls:
    """Return the control tokens of a tokenizer and of the template that is used with it.

    A token of white space alone is none: some vocabularies have runs of spaces as added tokens, and they are text.
    """
    try:
        end = (template.stop_id(tokenizer), template.eos or tokenizer.eos_token or "")
    except UserError:
        end = None  # it has no such token
    return _controls(tokenizer, end, tuple(sorted(tokenizer.all_special_ids)), len(tokenizer))


@lru_cache(maxsize=8)
def _controls(tokenizer: Any, end: tuple[int, str] | None, special: tuple[int, ...], size: int) -> Controls:
    """end: what ends an answer. special and size are part of the key: they change where tokens are added."""
    model = tokenizer.backend_tokenizer.model
    contents = {number: str(tokenizer.convert_ids_to_tokens(number)) for number in special}
    contents |= dict([end] if end else [])
    contents |= {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    contents = {number: content for number, content in contents.items() if content.strip()}
    unknown = {number for number, content in contents.items() if _is_byte(model, content)}
    word = model.unk_token if hasattr(model, "unk_token") else tokenizer.unk_token  # Unigram's is not told
    if word is not None:
        unknown.add(tokenizer.convert_tokens_to_ids(word))
    return Controls(tokenizer, contents, frozenset(unknown))


def _is_byte(model: Any, content: str) -> bool:
    """Return whether a token is one of those that spell a character in bytes, which a model finds by their names."""
    return _BYTE.fullmatch(content) is not None and model.token_to_id(content) is not None


def _without_space(token: int, start: int, stop: int, text: str) -> Token:
    covered = text[start:stop]
    if not covered.strip():
        return Token(token, start, stop)
    return Token(token, stop - len(covered.lstrip()), start + len(covered.rstrip()))


@dataclass(frozen=True, eq=False)
class Secret:
    """A tokenizer for ``encode_pieces`` whose control tokens are written by the names of their ids."""

    backend_tokenizer: Tokenizer
    name_or_path: str
    names: Mapping[int, str]


@lru_cache(maxsize=8)
def secret_tokenizer(controls: Controls) -> Secret:
    """Return the copy of the tokenizer; it takes a second or two for a vocabulary of 150,000.

    Tokens that spell bytes keep their names, by which the model finds them; no text is one of them.
    """
    tokenizer, model = controls.tokenizer, controls.tokenizer.backend_tokenizer.model
    names = {
        number: "".join(secrets.choice(_SIGNS) for _ in range(16))
        for number, content in controls.contents.items()
        if not _is_byte(model, content)
    }
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts |= {"truncation": None, "padding": None, "post_processor": None, "decoder": None}
    added = {token["id"]: token for token in parts["added_tokens"]}
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
    for number in controls.contents:
        token = added.pop(number, {"id": number, "special": True, **flags})
        if number in names:
            added[number] = token | {"content": names[number], "single_word": False}
    parts["added_tokens"] = [added[number] for number in sorted(added)]
    _rename(parts["model"], names)
    backend = Tokenizer.from_str(json.dumps(parts))
    if any(backend.token_to_id(token["content"]) != number for number, token in added.items()):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has control tokens that cannot be told from what is typed; "
            "use another tokenizer"
        )
    return Secret(backend, str(tokenizer.name_or_path), names)


def _rename(model: dict[str, Any], names: Mapping[int, str]) -> None:
    """Give tokens other names in the vocabulary of a model, as tokenizer.json holds it, and leave out their merges."""
    if isinstance(model["vocab"], list):  # Unigram
        for number, name in names.items():
            if number < len(model["vocab"]):
                model["vocab"][number][0] = name
        return
    renamed = {token: names[number] for token, number in model["vocab"].items() if number in names}
    model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
    model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = model["continuing_subword_prefix"] or ""
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [(a, b) for a, b in merges if not renamed.keys() & {a, b, a + b.removeprefix(prefix)}]
