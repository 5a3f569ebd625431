"""The tokenizer's own chat template (jinja), as transformers renders it in its sandbox.

Supervised is what the model has to generate: an answer and its end-of-turn token. Where an answer begins is known
exactly, not searched for: from the template's ``{% generation %}`` blocks where it marks answers with them, else
because the text rendered so far, generation prompt included, must be a prefix of the whole; a prompt at inference is
then, character for character, what stood before the answer in training.
Format: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FrameType
from typing import Any, cast

from tinyllava_fast.data.templates.base import TEMPLATES, MaskMode, Rendered, Template, Turns
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import shown

_WHERE = "data.template=tokenizer"
_SPACE = re.compile(r"\s*")
_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SECONDS, _MOST = 10, 1_000_000  # to render one question; characters of it
_OTHER = "choose another data.template, or a tokenizer whose chat template marks answers with {% generation %}"


@dataclass(frozen=True)
class TokenizerTemplate(Template):
    """No system text of ours. The marker stays where it stood in the user's message."""

    given_system: str | None = None
    """Text of a first message from the system; None: the template's default."""

    def with_system(self, system: str) -> Template:
        """See the base class; a template that refuses system messages does so in ``render``."""
        return replace(self, given_system=system)

    def render(self, turns: Turns, tokenizer: Any, interleaved: bool = False) -> Rendered:
        """See the base class. Not interleaved: the first marker of a question stays, the others are removed."""
        if not interleaved:
            turns = [(_one_marker(question), answer) for question, answer in turns]
        messages = [] if self.given_system is None else [{"role": "system", "content": self.given_system}]
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        is_open = turns[-1][1] is None
        text = _text(tokenizer, messages, is_open)
        markers = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
        if text.count(IMAGE_TOKEN) != markers:
            raise UserError(
                f"{_WHERE}: the chat template shows {text.count(IMAGE_TOKEN)} of {markers} {IMAGE_TOKEN}; "
                "choose another data.template"
            )
        return Rendered(text, [] if is_open else _answers(tokenizer, messages, text))

    def check(self, tokenizer: Any, masks: MaskMode = "offsets") -> None:
        """UserError if there is no chat template, or it has no end-of-turn token."""
        if masks != "reference":  # else the base class refuses it
            self.stop_id(tokenizer)
        super().check(tokenizer, masks)

    def stop_id(self, tokenizer: Any) -> int:
        """Id of the token that follows an answer."""
        return int(tokenizer.convert_tokens_to_ids(_frame(tokenizer).stop))

    def end_id(self, tokenizer: Any) -> int | None:
        """See the base class."""
        return self.stop_id(tokenizer)


@dataclass(frozen=True)
class _Frame:
    """What a chat template puts around an answer. header: the generation prompt. stop: the end-of-turn token."""

    header: str
    stop: str


def _frame(tokenizer: Any) -> _Frame:
    return _probe(tokenizer, _source(tokenizer))


@lru_cache(maxsize=8)
def _probe(tokenizer: Any, source: str) -> _Frame:
    """Read off a conversation of one turn. ``source`` is part of the key: a tokenizer's template may be replaced."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    with _time_limit(tokenizer):
        begin, prompt = (_text(tokenizer, [question], is_open) for is_open in (False, True))
        whole = _text(tokenizer, [question, answer], False)
    if max(map(len, (begin, prompt, whole))) > _MOST:
        raise UserError(
            f"{_WHERE}: the chat template makes more than {_MOST:,} characters of one short question; mend it, or "
            "choose another data.template"
        )
    if "answer" not in whole:
        raise UserError(
            f"{_WHERE}: the chat template does not show an answer as it is given: it alters the text of messages, or "
            "wants them as lists of parts; choose another data.template"
        )
    header = prompt[len(begin) :] if prompt.startswith(begin) else ""
    end = whole.rfind("answer") + len("answer")
    end = _SPACE.match(whole, end).end()  # type: ignore[union-attr]
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    stop = max((n for n in names if n.strip() and whole.startswith(n, end)), key=len, default=None)
    if stop is None:
        raise UserError(
            f"{_WHERE}: the chat template ends an answer with {shown(whole[end:])}, which begins with no special "
            "token of the tokenizer, so the model could not learn to stop; choose another data.template"
        )
    return _Frame(header, stop)


def _answers(tokenizer: Any, messages: Sequence[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """The character range of each answer, end-of-turn token included."""
    frame = _frame(tokenizer)
    before = len(messages) % 2  # a message from the system
    answers = [m["content"] for m in messages[before + 1 :: 2]]
    for number, answer in enumerate(answers):
        if frame.stop in answer:
            raise DataError(f"answer {number} contains the template's own {frame.stop!r}; rewrite or remove it")
    if _BLOCK.search(_source(tokenizer)):
        starts = _marked_starts(tokenizer, messages, text, frame)
        spans = [_span(text, start, answer, frame.stop) for start, answer in zip(starts, answers, strict=False)]
        if len(starts) == len(answers) and None not in spans:
            return [span for span in spans if span is not None]
    found = []
    for number, answer in enumerate(answers):
        prompt = _text(tokenizer, messages[: before + 2 * number + 1], True)
        if not text.startswith(prompt):
            raise UserError(
                f"{_WHERE}: the prompt for answer {number} is no prefix of the rendered conversation: the template "
                "alters earlier turns, or its generation prompt is not what it puts before an answer; set "
                f"data.turns=independent if only earlier turns are altered, else {_OTHER}"
            )
        span = _span(text, len(prompt), answer, frame.stop)
        if span is None:
            raise UserError(
                f"{_WHERE}: the chat template does not show answer {number} unchanged and followed by {frame.stop!r} "
                f"in a conversation of {len(answers)} turns; change the answer"
                f"{', set data.turns=independent' if len(answers) > 1 else ''}, or {_OTHER}"
            )
        found.append(span)
    return found


def _marked_starts(tokenizer: Any, messages: Sequence[dict[str, str]], text: str, frame: _Frame) -> list[int]:
    """Where the ``{% generation %}`` blocks begin, after the generation prompt if a block includes it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _named_errors(tokenizer):
        rendered = render_jinja_template(
            [list(messages)],
            chat_template=_source(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    # ([text], [[(start, stop) of each block]]); its annotation says str
    _, blocks = cast("tuple[list[str], list[list[tuple[int, int]]]]", rendered)
    starts = [b + len(frame.header) if text.startswith(frame.header, b) else b for b, _ in blocks[0]]
    return [start for start in starts if text.endswith(frame.header, 0, start)]


def _span(text: str, start: int, answer: str, stop: str) -> tuple[int, int] | None:
    """From ``start`` to the end of the token behind the answer; None if anything but white space is in between."""
    at = _SPACE.match(text, start).end()  # type: ignore[union-attr]
    content = answer.strip()
    end = _SPACE.match(text, at + len(content)).end()  # type: ignore[union-attr]
    if not text.startswith(content, at) or not text.startswith(stop, end):
        return None
    return start, end + len(stop)


def _one_marker(question: str) -> str:
    head, marker, tail = question.partition(IMAGE_TOKEN)
    return head + marker + tail.replace(IMAGE_TOKEN, "").rstrip() if IMAGE_TOKEN in tail else question


def _source(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(
            f"{_WHERE}: the tokenizer has no chat template ({error}); choose a template of the toolkit, "
            "or give the tokenizer folder a chat_template.jinja"
        ) from None


def _text(tokenizer: Any, messages: Sequence[dict[str, str]], is_open: bool) -> str:
    source = _source(tokenizer)
    with _named_errors(tokenizer):
        rendered = tokenizer.apply_chat_template(
            list(messages), chat_template=source, tokenize=False, add_generation_prompt=is_open
        )
    return str(rendered)


@contextmanager
def _named_errors(tokenizer: Any) -> Iterator[None]:
    """Any error of a chat template as a UserError: it is a program of whoever made the tokenizer, run in a sandbox."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = str(error) or type(error).__name__
        raise UserError(
            f"{_WHERE}: the chat template of tokenizer {tokenizer.name_or_path!r} refuses the conversation: {what}; "
            "mend the template, or choose another data.template"
        ) from error


@contextmanager
def _time_limit(tokenizer: Any) -> Iterator[None]:
    """End what runs inside after _SECONDS: a template has no endless loop, but loops in loops take as good as for ever.

    The interpreter asks at every line, so only code in Python is ended.
    """
    end = time.monotonic() + _SECONDS

    def look(frame: FrameType, event: str, arg: object) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes longer than {_SECONDS} seconds")
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        with _named_errors(tokenizer):
            yield
    finally:
        sys.settrace(before)


TEMPLATES.register("tokenizer")(
    TokenizerTemplate(eos="", system="", separator="", reference_masks="none", adds_special_tokens=False)
)
