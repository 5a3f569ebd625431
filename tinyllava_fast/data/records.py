"""LLaVA-format records from a JSON list or a JSONL file: streamed, strictly checked, errors name file, line, record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import BufferedIOBase, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from tinyllava_fast.data.pictures import IMAGE_ALIASES
from tinyllava_fast.data.templates.base import MaskMode, Segment, Template, TurnMode, turns_of
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import DECODER, Fields, fault, is_text, not_utf8, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("human", "gpt")
_FIELDS = ("id", "image", "images", "conversations")
FORMAT = '{"from": "human" | "gpt", "value": text}'
_CONVERT = (
    f'Write "conversations" as a list of {FORMAT}: the role user becomes human, assistant becomes gpt, and content '
    "becomes value"
)
_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 20  # characters read at a time from a JSON list


@dataclass(frozen=True)
class Record:
    """One sample: questions and answers, about an image or not."""

    index: int
    """Position in the file, from 0."""
    id: str
    """The record's own id, or its index."""
    line: int
    """Line of the file on which the record begins, from 1."""
    images: tuple[str, ...]
    """Image paths relative to the image folder; empty for text alone."""
    interleaved: bool
    """True if the images are a list, so that each marker stays where it is and stands for its own image."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""

    @property
    def where(self) -> str:
        """The name of this record in an error."""
        return f"record {self.index} (id {self.id!r}, line {self.line})"


def read_records(path: str | Path, opened: Callable[[BufferedIOBase], object] | None = None) -> Iterator[Record]:
    """Yield the records of a file, one at a time, in order.

    A file that begins with ``[`` is a JSON list, any other one JSONL. DataError for a missing or empty file, malformed
    JSON, and any record that is not {id?, image?, conversations: [{from, value}, ...]} with human and gpt in turn.
    image: one path, or a list of paths, which may also be called images. opened: told the file, whose position is about
    where the reader is.
    """
    empty, path = True, Path(path)
    try:
        with path.open("rb") as file, TextIOWrapper(file, encoding="utf-8-sig") as stream:
            if opened is not None:
                opened(file)
            for index, (line, value) in enumerate(_values(path, stream)):
                empty = False
                yield _record(path, index, line, value)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except OSError as error:
        raise unreadable(path, error) from error
    if empty:
        raise DataError(f"{path}: holds no records; expected a JSON list of records, or one record a line")


def unreadable(path: str | Path, error: OSError) -> DataError:
    """Return the error for a file of records that cannot be read."""
    return DataError(f"{path}: cannot read the records: {error.strerror}; check the path (data.records of a run)")


def check_turns(path: str | Path, record: Record, template: Template) -> None:
    """Raise DataError, naming the file and the record, for turns that are unusable with the template."""
    listed = len(record.images) if record.interleaved else None
    if problem := template.problem(record.turns, bool(record.images), listed):
        raise DataError(f"{path}: {record.where}: conversations: {problem}")


def encode_records(
    path: str | Path,
    records: Sequence[Record],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    turns: TurnMode = "conversation",
    masks: MaskMode = "offsets",
) -> list[list[Segment]]:
    """Return the records as samples (``Template.encode``), tokenized together.

    DataError that names the file and the record for what the template refuses.
    """

    def encode(some: Sequence[Record]) -> list[list[Segment]]:
        flags = [record.interleaved for record in some]
        return template.encode([record.turns for record in some], tokenizer, turns, masks, flags)

    try:
        return encode(records)
    except UserError:
        for record in records:
            try:
                encode([record])
            except UserError as error:
                raise DataError(f"{path}: {record.where}: conversations: {error}") from error
        raise


class _Reader:
    """Decodes JSON values one after the other out of a stream, holding no more text than one value needs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""
        self.at = 0
        self.line = 1  # of the character at `counted`
        self.counted = 0
        self.decode = DECODER.raw_decode

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None  # noqa: S101 the pattern matches the empty string
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._fill():
                return ""

    def value(self) -> tuple[int, object]:
        """Return (line, value) of the next JSON value; raise JSONDecodeError if there is none."""
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._fill():
                    self.decode(self.text, self.at)  # raises again, with positions in the text now held
            else:
                self.line = self.line_at(self.at)
                self.counted = self.at
                self.at = end
                return self.line, value

    def line_at(self, position: int) -> int:
        """Return the line number of a position in the text held."""
        return self.line + self.text.count("\n", self.counted, position)

    def _fill(self) -> bool:
        """Read on, at least as much as is waiting, so that a long value costs linear time."""
        self.line = self.line_at(self.at)
        self.text = self.text[self.at :]
        self.at = self.counted = 0
        more = self.stream.read(max(_CHUNK, len(self.text)))
        self.text += more
        return bool(more)


def _values(path: Path, stream: TextIO) -> Iterator[tuple[int, object]]:
    """Yield (line, value) of every record, not yet checked."""
    reader = _Reader(stream)
    if reader.peek() == "[":
        yield from _list_values(path, reader)
        return
    stream.seek(0)
    index = 0
    for line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            yield line, DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            hint = "" if index else "; in a file that is no JSON list, each line holds one whole record"
            raise _malformed(path, line, index, fault(error, text) + hint) from None
        index += 1


def _list_values(path: Path, reader: _Reader) -> Iterator[tuple[int, object]]:
    reader.at += 1
    index = 0
    while (sign := reader.peek()) != "]":
        if index:
            if sign != ",":
                line = reader.line_at(reader.at)
                raise _malformed(path, line, index, "expected ',' or ']' after the record before; mend this record")
            reader.at += 1
            reader.peek()
        try:
            yield reader.value()
        except json.JSONDecodeError as error:
            what = f"{error.msg}; mend or remove this record"
            raise _malformed(path, reader.line_at(error.pos), index, what) from None
        except (ValueError, RecursionError) as error:
            raise _malformed(path, reader.line_at(reader.at), index, fault(error)) from None
        index += 1
    reader.at += 1
    if reader.peek():
        raise _malformed(path, reader.line_at(reader.at), index, "text after the end of the list; remove it")


def _malformed(path: Path, line: int, index: int, what: str) -> DataError:
    return DataError(f"{path}: line {line}, record {index}: malformed JSON: {what}")


def _record(path: Path, index: int, line: int, value: object) -> Record:
    try:
        return _checked(index, line, value)
    except _FaultError as fault:
        name = value.get("id", index) if isinstance(value, dict) else index
        raise DataError(f"{path}: record {index} (id {shown(str(name))}, line {line}): {fault}") from None


def _checked(index: int, line: int, value: object) -> Record:
    if not isinstance(value, dict):
        raise _FaultError(f"record: expected an object with 'conversations', got {shown(value)}")
    record = Fields(value, "", _FaultError)
    name = value.get("id")
    if name is not None and not (isinstance(name, str) and is_text(name)):
        name = record.word("id")
    images, interleaved = _images(record)
    messages = value.get("conversations")
    if messages is None:
        raise _FaultError(f"conversations: missing; {_instead_of_conversations(record)}")
    if not isinstance(messages, list) or not messages:
        record.fail("conversations", f"a list of {FORMAT}, at least one question and one answer", messages)
    before = None
    for number, message in enumerate(messages):
        who, said = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if who not in _ROLES or not isinstance(said, str) or not (said.isascii() or is_text(said)):
            _refuse(record, number, message)
        if len(message) > 2:
            _refuse_picture_in(number, message)
        if who == before:
            raise _FaultError(
                f"conversations[{number}].from: two messages of {before!r} in a row; "
                "questions (human) and answers (gpt) must alternate"
            )
        before = who
    try:
        turns = turns_of(messages)
    except DataError as error:
        raise _FaultError(f"conversations: {error}") from None
    if not turns:
        raise _FaultError("conversations: no question; add a 'human' message and its answer")
    pairs = tuple((question, answer or "") for question, answer in turns)
    return Record(index, str(index) if name is None else name, line, images, interleaved, pairs)


class _FaultError(DataError):
    """A fault of a record without its place: naming the place of every good record would be slow."""


def _images(record: Fields) -> tuple[tuple[str, ...], bool]:
    """Return the record's image paths, and True if they are a list that is not empty.

    DataError for a field that seems to be a misspelt "image".
    """
    image, images = record.values.get("image"), record.values.get("images")
    if image is not None and images is not None:
        raise _FaultError("images: given beside 'image'; keep one of them")
    if images is not None:
        paths = record.paths("images", single=False)
    elif image is not None:
        paths = record.paths("image")
    else:
        _refuse_misspelt_image(record)
        return (), False
    return tuple(paths), bool(paths) and not isinstance(image, str)


def _refuse_misspelt_image(record: Fields) -> None:
    """Raise for a picture that no known field names: training would leave it out in silence."""
    for name, value in record.values.items():
        if value is None or name in _FIELDS:
            continue
        if name in ("video", "videos"):
            raise _FaultError(f"{name}: videos cannot be read; remove this record, or name frames as images")
        if name.lower() in IMAGE_ALIASES or get_close_matches(name.lower(), ("image", "images"), cutoff=0.75):
            raise _FaultError(f"unknown field {shown(name)}; did you mean 'image'? Rename it or remove it")


def _refuse_picture_in(number: int, message: Mapping[str, object]) -> None:
    """Raise for a picture that a message names, not the record: training would leave it out in silence."""
    for name, value in message.items():
        if value is not None and name.lower() in ("image", "images", "video", "videos", *IMAGE_ALIASES):
            raise _FaultError(
                f"conversations[{number}]: it names {shown(name)}, which belongs to the record; write it beside "
                "'conversations', and put <image> into the question"
            )


def _instead_of_conversations(record: Fields) -> str:
    """Return why a record has no conversations, and the remedy."""
    if "messages" in record:
        return f"the record has 'messages', which is another format. {_CONVERT}"
    near = get_close_matches("conversations", list(record.values), n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}The record has {', '.join(map(shown, record.values)) or 'no field'}; a list of {FORMAT} is expected"


def _refuse(record: Fields, number: int, message: object) -> NoReturn:
    """Raise the fault of a message."""
    field = f"conversations[{number}]"
    if not isinstance(message, dict):
        record.fail(f"{field}.from", "'human' or 'gpt'", message)
    if "from" not in message and "role" in message:
        raise _FaultError(f"{field}: it has 'role', which is another format. {_CONVERT}")
    if message.get("from") not in _ROLES:
        record.fail(f"{field}.from", "'human' or 'gpt'", message.get("from"))
    value = message.get("value")
    if isinstance(value, str):
        raise _FaultError(f"{field}.value: contains half of a surrogate pair; mend it")
    record.fail(f"{field}.value", "text", value)
