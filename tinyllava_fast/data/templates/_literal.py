"""Prompts of what people typed: none of its characters becomes an image marker or a control token.

The template renders the conversation with a slot in place of each text, so that neither it nor the search for image
markers sees what was typed; the text then takes the place of its slot. The prompt is encoded as any other, and that is
all, unless a control token reaches into the text, or one of the template's is missing. Such a prompt is encoded anew by
a copy of the tokenizer whose control tokens have secret names: the template's are written by these names, and the text
is left with strings that the copy does not know.

Control tokens are the special tokens, every added token and the token that ends an answer. A token of white space alone
is none: some vocabularies have runs of spaces as added tokens, and they are text.

What is not prevented: words of a template that are plain text, such as ``USER:`` and ``ASSISTANT:``, have the same
tokens whoever wrote them. Nothing here reads them again, so they never begin a turn for the toolkit, but a model may
take them for one. A template with control tokens around its turns has no such weakness.

What text keeps: decoding gives it back as far as the tokenizer's decoder gives back any text. Its normalizer may alter
it, characters that it does not know become its unknown token, a template may strip the ends of a message, and a
template's control token may swallow white space beside it. The template ``pretrain`` shows no question.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Encoding

from tinyllava_fast.data.templates._controls import Controls, Token, controls_of, secret_tokenizer
from tinyllava_fast.data.templates._pieces import added_ids, encode_pieces
from tinyllava_fast.data.templates.base import Message, Template, turns_of
from tinyllava_fast.data.types import IMAGE_INDEX, IMAGE_TOKEN, ImagePart
from tinyllava_fast.errors import UserError

_KEY = secrets.token_hex(8)  # no text of a program has it by chance
_SLOT = re.compile(f"\ue000{_KEY}:([0-9]+)\ue001")  # private use: no template alters it


def is_literal(conversation: Sequence[Message]) -> bool:
    """Return whether messages hold text for ``literal_prompts``: one made of parts, or one from the system."""
    return any(isinstance(m["value"], (list, tuple)) or m.get("from") == "system" for m in conversation)


def literal_prompts(
    template: Template, conversations: Sequence[Sequence[Message]], tokenizer: Any, interleaved: Sequence[bool]
) -> list[list[int]]:
    """Return the ids of inference prompts, in which texts are literal where they are parts of a message.

    A value that is a str is the program's own, as in ``Template.prompt_batch``. A leading message from "system"
    replaces the template's system text and is literal. One from "prompt" is the whole prompt, without a template.
    UserError where the template does not show a text, and where the tokenizer leaves no way to encode one without its
    control tokens.
    """
    pairs = zip(conversations, interleaved, strict=True)
    prompts = [_pieces(template, conversation, tokenizer, flag) for conversation, flag in pairs]
    pieces = [piece for prompt in prompts for piece in prompt]
    encodings = encode_pieces(tokenizer, [text for piece in pieces for text in (piece.text, piece.plain)])
    controls = controls_of(tokenizer, template)
    front, found = added_ids(tokenizer)[0], []
    for prompt, conversation in zip(prompts, conversations, strict=True):
        ids = list(front) if template.adds_special_tokens or _is_whole(conversation) else []
        for number, piece in enumerate(prompt):
            ids += [IMAGE_INDEX] if number else []
            ids += _ids(piece, encodings[piece.text], encodings[piece.plain], controls)
        found.append(ids)
    return found


def literal_ready(template: Template, tokenizer: Any) -> None:
    """Make now what ``literal_prompts`` makes for the first text with the name of a control token.

    A tokenizer without such a copy is told of with the text that needs it.
    """
    with contextlib.suppress(UserError):
        secret_tokenizer(controls_of(tokenizer, template))


def _is_whole(conversation: Sequence[Message]) -> bool:
    """Return whether a message is a whole prompt."""
    return bool(conversation) and conversation[0].get("from") == "prompt"


@dataclass
class _Slots:
    """Texts, and what stands for each while a template renders."""

    texts: list[str] = field(default_factory=list)

    def put(self, value: str | Sequence[str | ImagePart]) -> str:
        """Return a message's value for the template: a slot for each text, a marker for each image."""
        parts = [value] if isinstance(value, str) else value
        return "".join(IMAGE_TOKEN if isinstance(part, ImagePart) else self._slot(part) for part in parts)

    def _slot(self, text: str) -> str:
        """The slot of a text, between the white space at its ends, which a template may strip."""
        core = text.strip()
        if not core:
            return text
        self.texts.append(core)
        before, after = text[: -len(text.lstrip())], text[len(text.rstrip()) :]
        return f"{before}\ue000{_KEY}:{len(self.texts) - 1}\ue001{after}"


@dataclass
class _Piece:
    """The text of a prompt between two images.

    plain: the same with two letters or two signs for each literal text, as its ends are, so that the template's own
    control tokens can be told. own, plain_own: half-open ranges of the characters of either that are the template's.
    """

    text: str = ""
    plain: str = ""
    own: list[tuple[int, int]] = field(default_factory=list)
    plain_own: list[tuple[int, int]] = field(default_factory=list)

    def add_own(self, text: str) -> None:
        """Append characters of the template."""
        self.own.append((len(self.text), len(self.text) + len(text)))
        self.plain_own.append((len(self.plain), len(self.plain) + len(text)))
        self.text += text
        self.plain += text

    def add_literal(self, text: str) -> None:
        """Append characters that somebody typed."""
        self.text += text
        self.plain += "".join("x" if re.match(r"\w", c) else "." for c in (text[0], text[-1]))


def _pieces(template: Template, conversation: Sequence[Message], tokenizer: Any, interleaved: bool) -> list[_Piece]:
    """The pieces of one prompt. UserError if the template does not show every text as it is."""
    slots, messages = _Slots(), list(conversation)
    if _is_whole(messages):
        return [_piece(part, slots.texts) for part in slots.put(messages[0]["value"] or "").split(IMAGE_TOKEN)]
    if messages and messages[0]["from"] == "system":
        template = template.with_system(slots.put(messages.pop(0)["value"] or ""))
    of_system = len(slots.texts)
    values = [
        m["value"] if m["value"] is None or isinstance(m["value"], str) else slots.put(m["value"]) for m in messages
    ]
    turns = turns_of([{**m, "value": value} for m, value in zip(messages, values, strict=True)])
    text = template.render(turns, tokenizer, interleaved).text
    shown = {int(number) for number in _SLOT.findall(text)}
    if not shown.issuperset(range(of_system)):
        raise UserError("the chat template of this model shows no system text; remove the message from 'system'")
    if template.shows_questions and len(shown) != len(slots.texts):
        raise UserError(
            "the chat template of this model does not show the texts of all messages as they are; shorten the "
            "conversation to one question, or choose another template"
        )
    return [_piece(part, slots.texts) for part in text.split(IMAGE_TOKEN)]


def _piece(text: str, literals: Sequence[str]) -> _Piece:
    piece = _Piece()
    for at, part in enumerate(_SLOT.split(text)):
        if at % 2:
            piece.add_literal(literals[int(part)])
        else:
            piece.add_own(part)
    return piece


def _ids(piece: _Piece, encoding: Encoding, plain: Encoding, controls: Controls) -> list[int]:
    """The ids of a piece: those of the encoding, unless a control token of it is not the template's own."""
    wanted = [token for token in controls.found(plain, piece.plain) if _is_inside(token, piece.plain_own)]
    found = controls.found(encoding, piece.text)
    if all(_is_inside(token, piece.own) for token in found) and controls.certain(found) == controls.certain(wanted):
        return list(encoding.ids)
    secret = secret_tokenizer(controls)
    text = _renamed(piece, wanted, controls, secret.names)
    anew = encode_pieces(secret, [text])[text]
    if controls.certain(controls.found(anew, text)) == controls.certain(wanted):  # each of them by its secret name
        return list(anew.ids)
    raise UserError(
        f"the tokenizer {controls.tokenizer.name_or_path!r} makes a control token of what was typed, and cannot be "
        "kept from it; rephrase the text"
    )


def _is_inside(token: Token, ranges: Sequence[tuple[int, int]]) -> bool:
    """Return whether one of the ranges, which are ascending, holds all characters of a token."""
    at = bisect_right(ranges, token.start, key=lambda own: own[0]) - 1
    return at >= 0 and token.stop <= ranges[at][1]


def _renamed(piece: _Piece, tokens: Sequence[Token], controls: Controls, names: Mapping[int, str]) -> str:
    """The text of the piece with the secret names of the template's tokens, whose places are those in ``plain``."""
    text, done, at, content = "", 0, 0, controls.contents
    for (start, _), (plain_start, plain_stop) in zip(piece.own, piece.plain_own, strict=True):
        while at < len(tokens) and tokens[at].stop <= plain_stop:
            token, at = tokens[at], at + 1
            begin, end = (place + start - plain_start for place in token.written(piece.plain, content[token.id]))
            is_written = token.id not in controls.unknown or piece.text[begin:end] == content[token.id]
            if is_written and token.id in names and begin >= done:
                text += piece.text[done:begin] + names[token.id]
                done = end
    return text + piece.text[done:]
