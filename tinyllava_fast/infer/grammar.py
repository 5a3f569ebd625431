"""What an answer must look like: a JSON schema, any JSON object, a regular expression, or one of some texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from tinyllava_fast.errors import UserError
from tinyllava_fast.fields import DECODER, fault, is_text, shown

MOST_CHARACTERS = 65_536
"""Most characters of a schema, a regular expression, or all choices together."""
MOST_DEPTH = 32
"""Most lists and objects around one another in a schema."""


@dataclass(frozen=True)
class Grammar:
    """The form of an answer, for ``Sampling.grammar``. Made by the functions below; not compiled yet.

    UserError of each: for what is no JSON, no text, too long or nested too deep. What a compiler finds wrong comes with
    the request.
    """

    kind: Literal["json schema", "regex", "choice"]
    text: str

    @staticmethod
    def json_schema(schema: dict[str, Any] | bool | str) -> Grammar:
        """Answers that are JSON of this schema, a decoded one or its text, on one line with ", " and ": " between."""
        if isinstance(schema, str):
            _check_length("json schema", len(schema))
            try:
                schema = DECODER.decode(schema)
            except (ValueError, RecursionError) as error:
                raise UserError(f"json schema: {fault(error, schema)}") from None
        if not isinstance(schema, (dict, bool)):
            raise UserError(f"json schema: expected an object, got {shown(schema)}")
        _check_depth(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"json schema: not JSON ({error}); mend it") from None
        return Grammar("json schema", _checked("json schema", text))

    @staticmethod
    def json_object() -> Grammar:
        """Answers that are any JSON object."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """Answers that a regular expression matches from end to end; Rust's syntax, without look-around."""
        return Grammar("regex", _checked("regex", pattern))

    @staticmethod
    def choice(options: Sequence[str]) -> Grammar:
        """Answers that are one of some texts."""
        if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
            raise UserError(f"choice: expected a list of texts that are not empty, got {shown(options)}")
        return Grammar("choice", _checked("choice", json.dumps(list(options), ensure_ascii=False)))


def _checked(kind: str, text: str) -> str:
    """Return the text. UserError if it is none, or too long."""
    if not isinstance(text, str) or not is_text(text) or "\0" in text:
        raise UserError(f"{kind}: {shown(text)} is no text that can be written; mend it")
    _check_length(kind, len(text))
    return text


def _check_length(kind: str, length: int) -> None:
    if length > MOST_CHARACTERS:
        raise UserError(f"{kind}: it has {length} characters, and {MOST_CHARACTERS} are the most; shorten it")


def _check_depth(schema: object) -> None:
    """UserError for a schema that is nested too deep. A compiler of it could run out of stack."""
    level: list[object] = [schema]
    for _ in range(MOST_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list, tuple)))
        level = list(islice(chain.from_iterable(inner), MOST_CHARACTERS))
        if not level:
            return
    raise UserError(f"json schema: it is nested deeper than {MOST_DEPTH} lists and objects; make it flatter")
