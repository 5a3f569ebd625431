"""Typed reading of the files that people bring: JSON, JSONL, and the fields of their objects.

Every reader of records, questions, answers, official benchmark files and model folders goes through here, so that one
rule holds for all: text is UTF-8 (with or without a byte order mark), an object names a field once, a field has the
kind that was asked for, null counts as "not given" only where a default is allowed, and every error names the file, the
line or record, the field, what was expected and what was found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from tinyllava_fast.errors import DataError, UserError, nearest

T = TypeVar("T")


class _Required:
    """The default of a field that must be given."""


REQUIRED: Final = _Required()


class _RepeatedFieldError(ValueError):
    """An object that names a field twice."""


class Fields:
    """An object of a file, and where it stands.

    values: the object. where: "file, line 3", or a path with a dotted prefix. error: the class of what is raised.

    Each reader returns the field as the kind it is named after. A field that is missing or null gives ``default`` where
    one is given, else raises. Any other kind raises.
    """

    def __init__(self, values: Mapping[str, Any], where: str, error: type[UserError] = DataError) -> None:
        self.values = values
        self.where = where
        self.error = error

    @classmethod
    def of(cls, value: Any, where: str, error: type[UserError] = DataError) -> Fields:
        """The fields of a decoded JSON value. Raises if it is no object."""
        if not isinstance(value, dict):
            raise error(f"{where}: expected a JSON object, got {shown(value)}")
        return cls(value, where, error)

    def __contains__(self, name: str) -> bool:
        """Whether the field is given and not null."""
        return self.values.get(name) is not None

    def text(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> str | T:
        """Text that can be written as UTF-8. empty: whether "" is allowed."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if not isinstance(value, str) or not (value or empty):
            self.fail(name, "text" if empty else "text that is not empty", value)
        if not is_text(value):
            self.fail(name, "text", value, "it holds half of a surrogate pair; mend it")
        return value

    def identifier(self, name: str, default: T | _Required = REQUIRED) -> str | int | T:
        """Text that is not empty, or a whole number."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, str) or not value:
            self.fail(name, "text or a whole number", value)
        return self.text(name)

    def integer(self, name: str, default: T | _Required = REQUIRED, *, least: int | None = None) -> int | T:
        """A whole number. least: the smallest that is allowed."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            self.fail(name, "a whole number" + (f" of at least {least}" if least is not None else ""), value)
        return value

    def number(self, name: str, default: T | _Required = REQUIRED, *, least: float | None = None) -> float | T:
        """A finite number. least: the smallest that is allowed."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if not _is_number(value) or (least is not None and value < least):
            self.fail(name, "a number" + (f" of at least {least}" if least is not None else ""), value)
        return float(value)

    def boolean(self, name: str, default: T | _Required = REQUIRED) -> bool | T:
        """true or false."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def one_of(self, name: str, choices: Sequence[str], default: T | _Required = REQUIRED) -> str | T:
        """One of some texts."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if value not in choices:
            self.fail(name, "one of " + ", ".join(map(repr, choices)), value)
        return str(value)

    def texts(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> list[str] | T:
        """A list of texts. empty: whether the list may be empty."""
        value = self.items(name, default, empty=empty)
        if not isinstance(value, list):
            return value
        for number, item in enumerate(value):
            if not isinstance(item, str) or not is_text(item):
                self.fail(f"{name}[{number}]", "text", item)
        return value

    def items(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> list[Any] | T:
        """A list of anything. empty: whether it may be empty."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if not isinstance(value, list) or not (value or empty):
            self.fail(name, "a list" if empty else "a list that is not empty", value)
        return value

    def mapping(self, name: str, default: T | _Required = REQUIRED) -> Fields | T:
        """An object, as Fields of its own."""
        value = self._given(name, default)
        if value is None:
            return default  # type: ignore[return-value]
        if not isinstance(value, dict):
            self.fail(name, "an object", value)
        return Fields(value, f"{self.where}: {name}", self.error)

    def mappings(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> list[Fields] | T:
        """A list of objects. empty: whether the list may be empty."""
        value = self.items(name, default, empty=empty)
        if not isinstance(value, list):
            return value
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                self.fail(f"{name}[{number}]", "an object", item)
        return [Fields(item, f"{self.where}: {name}[{number}]", self.error) for number, item in enumerate(value)]

    def unknown(self, known: Iterable[str]) -> dict[str, str]:
        """Fields that are not among ``known``, each with a sentence fragment that names the nearest (``nearest``)."""
        names = list(known)
        return {name: nearest(name, names) for name in self.values if name not in names}

    def fail(self, name: str, expected: str, value: Any, why: str = "") -> NoReturn:
        """Raise the error of a field that is not what was expected."""
        raise self.error(f"{self.where}: {name}: expected {expected}, got {shown(value)}" + (f"; {why}" if why else ""))

    def _given(self, name: str, default: object) -> Any:
        """The value, or None where a default stands in for a missing or null one."""
        value = self.values.get(name)
        if value is None and default is REQUIRED:
            if name in self.values:
                raise self.error(f"{self.where}: {name}: is null; give it a value")
            raise self.error(f"{self.where}: no field {name!r}; it has {', '.join(map(repr, self.values)) or 'none'}")
        return value


def read_text(path: Path, error: type[UserError] = DataError) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises naming the file and the byte that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as bad:
        raise error(f"{path}: not UTF-8 text ({bad.reason} at byte {bad.start}); save it as UTF-8") from None
    except OSError as bad:
        raise error(f"{path}: cannot be read: {bad.strerror}") from None


def read_json(path: Path, error: type[UserError] = DataError) -> Any:
    """The content of a JSON file. Raises naming the file, and the line where it is not JSON."""
    return decode(read_text(path, error), str(path), error)


def read_jsonl(path: Path, error: type[UserError] = DataError) -> Iterator[tuple[int, Fields]]:
    """(line number from 1, fields) of a file with one JSON object a line; blank lines are skipped. Raises if not."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    value = decode(line, where, error)
                    if not isinstance(value, dict):
                        raise error(f"{where}: {type(value).__name__} instead of a JSON object")
                    yield number, Fields(value, where, error)
    except UnicodeDecodeError as bad:
        raise error(f"{path}: not UTF-8 text ({bad.reason} at byte {bad.start}); save it as UTF-8") from None
    except OSError as bad:
        raise error(f"{path}: cannot be read: {bad.strerror}") from None


def decode(text: str, where: str, error: type[UserError] = DataError) -> Any:
    """A JSON value out of text. Raises naming ``where`` if it is malformed, nested too deep, or names a field twice."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except _RepeatedFieldError as bad:
        raise error(f"{where}: {bad}") from None
    except json.JSONDecodeError as bad:
        place = f" in line {bad.lineno}" if "\n" in text.strip() else ""
        raise error(f"{where}: not JSON ({bad.msg}{place}, character {bad.colno}); mend or remove it") from None
    except (ValueError, RecursionError) as bad:  # an integer of more digits than Python reads; nesting
        raise error(f"{where}: not JSON that can be read ({type(bad).__name__}: {bad})") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` that refuses a field that stands twice, of which one would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedFieldError(f"the field {twice!r} stands twice in one object; keep one of them")
    return values


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON escapes can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value for a message, cut to a readable length, writable to any terminal."""
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
