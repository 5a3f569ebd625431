"""Typed reading of the files that people bring: JSON, JSONL, and the fields of their objects.

Every reader of records, questions, answers, official benchmark files and model folders goes through here, so that one
rule holds for all: text is UTF-8 (with or without a byte order mark), an object names a field once, a field has the
kind that was asked for, null counts as "not given" only where a default is allowed, and every error names the file, the
line or record, the field, what was expected and what was found.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard, TypeVar

from tinyllava_fast.errors import DataError, UserError, nearest

T = TypeVar("T")
V = TypeVar("V")


class _Required:
    """The default of a field that must be given."""


REQUIRED: Final = _Required()
_LONGEST_PATH, _LONGEST_NAME = 4095, 255
"""Of a path and of a name in it, in bytes; longer ones make the system's calls fail."""
_SURELY_SHORT = 60
"""Characters, which are at most 240 bytes."""
_EXACT = 2**53
"""Below it a float holds every whole number."""


class _RepeatedFieldError(ValueError):
    """An object that names a field twice."""


class Fields:
    """An object of a file, and where it stands.

    values: the object. where: "file, line 3", perhaps followed by the fields around it; "" if the caller adds it.
    error: the class of what is raised.

    Each reader returns the field as the kind it is named after. A field that is missing or null gives ``default`` where
    one is given, else raises. Another kind raises.
    """

    def __init__(self, values: Mapping[str, Any], where: str, error: type[UserError] = DataError) -> None:
        self.values = values
        self.where = where
        self.error = error

    @classmethod
    def of(cls, value: object, where: str, error: type[UserError] = DataError) -> Fields:
        """Return the fields of a decoded JSON value. Raises if it is no object."""
        if not isinstance(value, dict):
            raise error(f"{where}: expected a JSON object, got {shown(value)}")
        return cls(value, where, error)

    @property
    def _place(self) -> str:
        return f"{self.where}: " if self.where else ""

    def __contains__(self, name: str) -> bool:
        """Return True if the field is given and not null."""
        return self.values.get(name) is not None

    def text(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> str | T:
        """Text that can be written as UTF-8. empty: whether it may be "" or white space."""
        return self._read(name, default, lambda at, value: self._text(at, value, empty))

    def word(self, name: str, default: T | _Required = REQUIRED) -> str | T:
        """Text that is not empty, or a finite number as Python writes it: 3 is "3", and so is 3.0."""
        return self._read(name, default, self._word)

    def words(self, name: str, default: T | _Required = REQUIRED, *, single: bool = False) -> list[str] | T:
        """A list that is not empty of what ``word`` reads. single: whether one that is in no list is allowed."""

        def read(at: str, value: object) -> list[str]:
            if not isinstance(value, list) and single:
                return [self._word(at, value)]
            if not isinstance(value, list) or not value:
                self.fail(at, "a list that is not empty", value)
            return [self._word(f"{at}[{number}]", item) for number, item in enumerate(value)]

        return self._read(name, default, read)

    def paths(self, name: str, default: T | _Required = REQUIRED, *, single: bool = True) -> list[str] | T:
        """A list of paths, which may be empty. single: whether one path that is in no list is allowed."""

        def read(at: str, value: object) -> list[str]:
            if isinstance(value, str) and single:
                return [self._path(at, value)]
            if not isinstance(value, list):
                self.fail(at, "a path or a list of paths" if single else "a list of paths", value)
            return [self._path(f"{at}[{number}]", item) for number, item in enumerate(value)]

        return self._read(name, default, read)

    def path(self, name: str, default: T | _Required = REQUIRED) -> str | T:
        """A path that a file system takes, relative or absolute; whether there is such a file is not looked at."""
        return self._read(name, default, self._path)

    def identifier(self, name: str, default: T | _Required = REQUIRED) -> str | int | T:
        """Text that is not empty, or a whole number."""

        def read(at: str, value: object) -> str | int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if not isinstance(value, str):
                self.fail(at, "text or a whole number", value)
            return self._text(at, value)

        return self._read(name, default, read)

    def integer(
        self, name: str, default: T | _Required = REQUIRED, *, least: int | None = None, most: int | None = None
    ) -> int | T:
        """A whole number. least, most: the smallest and the largest that are allowed."""

        def read(at: str, value: object) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
                self.fail(at, "a whole number" + (f" of at least {least}" if least is not None else ""), value)
            if most is not None and value > most:
                self.fail(at, f"a whole number of at most {most}", value)
            return value

        return self._read(name, default, read)

    def number(self, name: str, default: T | _Required = REQUIRED, *, least: float | None = None) -> float | T:
        """A finite number. least: the smallest that is allowed."""

        def read(at: str, value: object) -> float:
            if not is_number(value) or (least is not None and value < least):
                self.fail(at, "a number" + (f" of at least {least}" if least is not None else ""), value)
            return float(value)

        return self._read(name, default, read)

    def boolean(self, name: str, default: T | _Required = REQUIRED) -> bool | T:
        """true or false."""
        return self._read(name, default, lambda at, v: v if isinstance(v, bool) else self.fail(at, "true or false", v))

    def one_of(self, name: str, choices: Sequence[str], default: T | _Required = REQUIRED) -> str | T:
        """One of some texts."""

        def read(at: str, value: object) -> str:
            if value not in choices:
                self.fail(at, "one of " + ", ".join(map(repr, choices)), value)
            return str(value)

        return self._read(name, default, read)

    def texts(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> list[str] | T:
        """A list of texts, each of which may be "". empty: whether the list may be empty."""
        value = self.items(name, default, empty=empty)
        if not isinstance(value, list):
            return value
        return [self._text(f"{name}[{number}]", item, empty=True) for number, item in enumerate(value)]

    def items(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> list[object] | T:
        """A list of anything. empty: whether it may be empty."""

        def read(at: str, value: object) -> list[object]:
            if not isinstance(value, list) or not (value or empty):
                self.fail(at, "a list" if empty else "a list that is not empty", value)
            return value

        return self._read(name, default, read)

    def mapping(self, name: str, default: T | _Required = REQUIRED) -> Fields | T:
        """An object, as Fields of its own."""

        def read(at: str, value: object) -> Fields:
            if not isinstance(value, dict):
                self.fail(at, "an object", value)
            return Fields(value, f"{self._place}{at}", self.error)

        return self._read(name, default, read)

    def mappings(self, name: str, default: T | _Required = REQUIRED, *, empty: bool = False) -> list[Fields] | T:
        """A list of objects. empty: whether the list may be empty."""
        value = self.items(name, default, empty=empty)
        if not isinstance(value, list):
            return value
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                self.fail(f"{name}[{number}]", "an object", item)
        return [Fields(item, f"{self._place}{name}[{number}]", self.error) for number, item in enumerate(value)]

    def unknown(self, known: Iterable[str]) -> dict[str, str]:
        """Fields that are not among ``known``, each with a sentence fragment that names the nearest (``nearest``)."""
        names = list(known)
        return {name: nearest(name, names) for name in self.values if name not in names}

    def fail(self, name: str, expected: str, value: object, why: str = "") -> NoReturn:
        """Raise the error of a field that is not what was expected."""
        raise self.error(f"{self._place}{name}: expected {expected}, got {shown(value)}" + (f"; {why}" if why else ""))

    def _read(self, name: str, default: T | _Required, read: Callable[[str, object], V]) -> V | T:
        """Return what ``read`` makes of the field, or the default where it stands in for a missing or null one."""
        value = self._given(name, default)
        return default if value is None else read(name, value)  # type: ignore[return-value]

    def _given(self, name: str, default: object) -> object:
        """Return the value, or None where a default stands in for a missing or null one."""
        value = self.values.get(name)
        if value is None and default is REQUIRED:
            if name in self.values:
                raise self.error(f"{self._place}{name}: is null; give it a value")
            raise self.error(f"{self._place}no field {shown(name)}; it has {_listed(self.values)}")
        return value

    def _text(self, name: str, value: object, empty: bool = False) -> str:
        if not isinstance(value, str) or not (empty or value.strip()):
            self.fail(name, "text" if empty else "text that is not empty", value)
        if not is_text(value):
            self.fail(name, "text", value, "it holds half of a surrogate pair; mend it")
        return value

    def _word(self, name: str, value: object) -> str:
        if is_number(value):
            whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
            return str(int(value) if whole else value)
        if not isinstance(value, str):
            why = 'write the word in quotation marks, e.g. "yes" or "true"' if isinstance(value, bool) else ""
            self.fail(name, "text or a number", value, why)
        return self._text(name, value)

    def _path(self, name: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "a path", value)
        if not is_text(value):
            self.fail(name, "a path", value, "it holds half of a surrogate pair; mend it")
        if "\0" in value or (len(value) > _SURELY_SHORT and _too_long(value)):
            self.fail(name, "a path", value, "no file can have this name")
        return value


def read_text(path: Path, error: type[UserError] = DataError) -> str:
    """Return the text of a UTF-8 file, without its byte order mark. Raises naming the byte that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as bad:
        raise not_utf8(path, bad, error) from None
    except OSError as bad:
        raise error(f"{path}: cannot be read: {bad.strerror}") from None


def read_json(path: Path, error: type[UserError] = DataError) -> Any:
    """Return the content of a JSON file. Raises naming the file, and the line where it is not JSON."""
    return decode(read_text(path, error), str(path), error)


def read_object(path: Path, error: type[UserError] = DataError) -> Fields:
    """Return the fields of a JSON file that holds one object. Raises if it does not."""
    return Fields.of(read_json(path, error), str(path), error)


def read_objects(path: Path, error: type[UserError] = DataError) -> list[Fields]:
    """Return the objects of a JSON file that holds a list of them, each "file, record 1". Raises if it does not."""
    value = read_json(path, error)
    if not isinstance(value, list):
        raise error(f"{path}: expected a JSON list of objects, got {shown(value)}")
    return [Fields.of(item, f"{path}, record {number}", error) for number, item in enumerate(value, 1)]


def read_jsonl(path: Path, error: type[UserError] = DataError) -> Iterator[tuple[int, Fields]]:
    """(line number from 1, fields) of a file with one JSON object a line; blank lines are skipped. Raises if not."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}", error)
    except UnicodeDecodeError as bad:
        raise not_utf8(path, bad, error) from None
    except OSError as bad:
        raise error(f"{path}: cannot be read: {bad.strerror}") from None


def _object(line: str, where: str, error: type[UserError]) -> Fields:
    try:
        return Fields.of(decode(line, where, error), where, error)
    except error as bad:
        if line.lstrip()[:1] == "{":
            raise
        raise error(f"{bad}; each line of this file is one JSON object, {{...}}") from None


def not_utf8(path: Path, bad: UnicodeDecodeError, error: type[UserError] = DataError) -> UserError:
    """Return the error of a file that is not UTF-8: the line and byte of the file, and what it seems to be instead.

    bad: what was raised while the file was read. Its own position counts from the piece that was being decoded.
    """
    place, start, data = f"{bad.reason} at byte {bad.start}", 0, b""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as line:
                place = f"{line.reason} in line {number}, byte {start + line.start} of the file"
                break
            start += len(data)
    wide = not start and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return error(f"{path}: not UTF-8 text ({'it is UTF-16' if wide else place}); save it as UTF-8")


def decode(text: str, where: str, error: type[UserError] = DataError) -> object:
    """Return the JSON value of a text. Raises naming ``where`` if it is malformed, too deep, or names a field twice."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as bad:
        raise error(f"{where}: {fault(bad, text)}") from None


def fault(bad: ValueError | RecursionError, text: str = "") -> str:
    """Return what DECODER found wrong and what to do about it. text: what it read; if it is one line, none is named."""
    if isinstance(bad, json.JSONDecodeError):
        place = f" in line {bad.lineno}" if "\n" in text.strip() else ""
        return f"not JSON ({bad.msg}{place}, character {bad.colno}); {_remedy(text)}"
    if isinstance(bad, _RepeatedFieldError):
        return str(bad)
    if isinstance(bad, RecursionError):
        return "lists or objects are nested too deep to be read; mend or remove it"
    return "a number has more digits than can be read; mend or remove it"  # the only other ValueError of json


def _remedy(text: str) -> str:
    if "\0" in text[:100]:
        return "it seems to be UTF-16 or no text at all; save it as UTF-8"
    if text.lstrip()[:1] == "<":
        return "it seems to be a web page; download the file again"
    if "\ufeff" in text:
        return "a byte order mark stands in the middle of the file; remove it"
    return "mend or remove it" if text.strip() else "it is empty; download or write it again"


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON (an ``object_pairs_hook``); refuse a field that stands twice, as one would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _RepeatedFieldError(f"the field {shown(twice)} stands twice in one object; keep one of them")
    return values


DECODER: Final = json.JSONDecoder(object_pairs_hook=unique)
"""Reads JSON for those that read value by value; they call ``fault`` for the ValueError or RecursionError it raises."""


def is_text(value: str) -> bool:
    """Return True if UTF-8 can hold it: JSON escapes can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: object) -> TypeGuard[int | float]:
    """Return True for a finite number that a float can hold; true and false are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """Return a value for a message as JSON and YAML write it, cut to a readable length, writable to any terminal."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of too many digits
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _too_long(path: str) -> bool:
    data = path.encode()
    return len(data) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in data.split(b"/"))


def _listed(names: Iterable[str]) -> str:
    """Return the names of the first few fields."""
    first = list(islice(names, 13))
    return ", ".join([*map(shown, first[:12]), *(["..."] if len(first) > 12 else [])]) or "none"
