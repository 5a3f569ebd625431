"""Records written again: as entries with the fields of a shape that ``_rows`` reads, each checked by reading it back.

    llava       conversations of {from, value}, image (a list of them where the record lists its images), system
    sharegpt    the same with images as a list, and the system text as the first message
    openai      messages of {role, content}, images and texts as parts

What a shape or a file cannot hold is refused: an entry that is read back as another record is never written.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from tinyllava_fast.data.formats._base import Row
from tinyllava_fast.data.formats._embedded import Embedded, picture_of
from tinyllava_fast.data.formats._rows import LISTS, record_of, used_fields
from tinyllava_fast.data.pictures import InsideFile, open_bytes
from tinyllava_fast.data.record import FaultError, Record
from tinyllava_fast.data.types import IMAGE_TOKEN, ImagePart, laid_out
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import is_text, shown
from tinyllava_fast.log import log

Shape = Literal["llava", "openai", "sharegpt"]
SHAPES: tuple[Shape, ...] = ("llava", "openai", "sharegpt")
_DROP = "remove it, or leave it out with --drop"
_ENDINGS = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "MPO": "jpg", "HEIF": "heic"}
_PART_FIELDS = ("type", "text", "image_url", "image", "url", "path")


@dataclass(frozen=True)
class ImageFile:
    """The bytes of a file that a record names."""

    path: str

    def __str__(self) -> str:
        return self.path

    def read(self) -> bytes:
        """Return its content. DataError if it cannot be read."""
        try:
            return Path(self.path).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


@dataclass(frozen=True)
class Shown:
    """An image to write. name: its path; "" for one that has none. inside: its bytes, where they are to be written."""

    name: str
    inside: InsideFile | None = None


@dataclass(frozen=True)
class Whole:
    """A record with all that is written of it. source: the file of records, for messages."""

    record: Record
    images: tuple[Shown, ...]
    source: str

    def content(self, number: int) -> bytes:
        """Return the bytes of an image. DataError that names the record."""
        inside = self.images[number].inside
        assert inside is not None  # noqa: S101 who asks has looked
        try:
            return inside.read()
        except DataError as error:
            raise DataError(f"{self.source}: {self.record.where}: image: {error}") from error

    def kind(self, number: int, content: bytes) -> str:
        """Return the name that Pillow has for the format of an image. DataError if it is none."""
        try:
            with open_bytes(content, str(self.images[number].inside)) as opened:
                return opened.format or ""
        except DataError as error:
            raise DataError(f"{self.source}: {self.record.where}: image: {error}") from error

    def text(self, number: int) -> str:
        """Return an image as text: its path, or a data URI with its bytes."""
        if self.images[number].inside is None:
            return self.images[number].name
        content = self.content(number)
        mime = Image.MIME.get(self.kind(number, content), "application/octet-stream")
        return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def whole(record: Record, source: str, base: Path, folder: str | None = None) -> Whole:
    """Return a record to write. base: see picture_of. folder: of the image paths, whose files are read; None: stay."""
    images = []
    for image in record.images:
        picture = picture_of(image, folder or "", base)
        if isinstance(picture, Embedded):
            images.append(Shown("", picture))
        else:
            images.append(Shown(image, None if folder is None else ImageFile(os.path.join(folder, image))))
    return Whole(record, tuple(images), source)


def ending_of(kind: str) -> str:
    """Return the end of the name of a file of this format of Pillow."""
    return _ENDINGS.get(kind, kind.lower() or "img")


def fields_of(record: Record, shape: Shape, images: Sequence[object], *, beside: bool = False) -> dict[str, object]:
    """Return a record as the fields of a shape. images: what stands for each. beside: none stands in a message.

    FaultError for what the shape has no place for.
    """
    row: dict[str, object] = {"id": record.id}
    if shape == "openai":
        row |= _openai(record, images, beside)
    else:
        pairs = [pair for turn in record.turns for pair in zip(("human", "gpt"), turn, strict=True)]
        said = [{"from": who, "value": text} for who, text in pairs]
        if images:
            listed = "images" if shape == "sharegpt" or beside else "image"
            row |= {listed: list(images)} if record.interleaved else {"image": images[0]}
        if record.system is not None and shape == "sharegpt":
            said.insert(0, {"from": "system", "value": record.system})
        elif record.system is not None:
            row["system"] = record.system
        row["conversations"] = said
    for name, value in (record.extra or {}).items():
        if name in row:
            raise FaultError(f"{name}: a field of the records that are written has this name; {_DROP} {name}")
        row[name] = value
    return row


def check_held(one: Whole, values: Mapping[str, object], binary: Collection[str] = ()) -> None:
    """Raise DataError, naming file, record and field, unless an entry is read back as the record that it is of.

    values: as a reader gets them; those named in ``binary`` have True in place of bytes.
    """
    record = one.record
    try:
        row = Row(dict(values), record.line, lambda _: "inside", record.place, frozenset(binary))
        again = record_of(record.index, row)
        found = replace(again, extra=extras_of(row))
    except FaultError as fault:
        raise not_held(one, str(fault)) from None
    told = (
        ("id", found.id == record.id, record.id),
        ("system", found.system == record.system, record.system),
        ("images", len(found.images) == len(record.images), len(record.images)),
        ("conversations", normal(found).turns == normal(record).turns, record.turns),
        ("image", normal(found).interleaved == normal(record).interleaved, "a list"),
    )
    for name, same, value in told:
        if not same:
            raise not_held(one, f"{name}: {shown(value)} would not be read back as it is")
    kept, extra = found.extra or {}, record.extra or {}
    for name in {**extra, **kept}:
        if not _alike(extra.get(name), kept.get(name)):
            raise not_held(one, f"{name}: {shown(extra.get(name))} would not be read back as it is; {_DROP} {name}")


def _alike(one: object, other: object) -> bool:
    """Return whether two values are the same; a number that is none (NaN) is like itself."""
    return one is other or (one == other and isinstance(one, bool) == isinstance(other, bool))


def json_of(one: Whole, values: Mapping[str, object]) -> str:
    """Return the fields of a record as JSON on one line. DataError that names the one which JSON cannot hold."""
    try:
        line = json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # a date, or another value of a table
        name = next((n for n, v in (one.record.extra or {}).items() if not _is_json(v)), "record")
        raise not_held(one, f"{name}: {error}; leave it out with --drop {name}") from None
    return line if is_text(line) else json.dumps(values)


def _is_json(value: object) -> bool:
    if value is None or isinstance(value, (str, int)):
        return True
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def not_held(one: Whole, what: str) -> DataError:
    """Return the error of a record that cannot be written."""
    text = f"{one.source}: {one.record.where}: {what}"
    return DataError(f"{text}. This format cannot hold the record: choose another --to or --shape, or remove it")


def normal(record: Record) -> Record:
    """Return the record as one that lists its images where that means the same: one image, in front of all turns."""
    question, answer = record.turns[0]
    markers = sum(text.count(IMAGE_TOKEN) for text, _ in record.turns)
    if record.interleaved or len(record.images) != 1 or markers != 1 or IMAGE_TOKEN not in question:
        return record
    first = f"{IMAGE_TOKEN}\n{question.replace(IMAGE_TOKEN, '').strip()}".strip()
    return replace(record, interleaved=True, turns=((first, answer), *record.turns[1:]))


def extras_of(row: Row, dropped: Collection[str] = (), *, strict: bool = True) -> dict[str, object] | None:
    """Return the fields of an entry that no record has, None for none; ``dropped`` ones are left out.

    strict: FaultError for what cannot be carried along: bytes that are no image, fields inside messages, and an answer
    before the first question.
    """
    values = row.values
    if not isinstance(values, dict):
        return None
    used = used_fields(values)
    found = {n: v for n, v in values.items() if v is not None and n not in used and n not in dropped}
    if strict:
        for name in found:
            if name in row.binary:
                raise FaultError(f"{name}: holds bytes that are no image of the record; {_DROP} {name}")
        for place in _unread(values):
            if (name := place.rpartition(".")[2]) not in dropped:
                raise FaultError(f"{place}: is read by nothing here, and would be lost; {_DROP} {name}")
    elif row.binary:
        found = {name: value for name, value in found.items() if name not in row.binary}
    return found or None


class JsonExtras:
    """Returns the other fields of an entry that JSON can hold. The rest is left out, and counted by field."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def __call__(self, row: Row) -> dict[str, object] | None:
        """Return them; None for none."""
        found = extras_of(row, strict=False) or {}
        values = row.values if isinstance(row.values, dict) else {}
        lost = [name for name, value in found.items() if not _is_json(value)]
        if row.binary:
            used = used_fields(values)
            self.left_out.update(n for n in row.binary if values.get(n) is not None and n not in used)
        self.left_out.update(lost)
        return {name: value for name, value in found.items() if name not in lost} or None

    def warn(self, source: str) -> None:
        """Say once what was left out, if anything was."""
        if self.left_out:
            what = ", ".join(f"{shown(name)} ({count:,} records)" for name, count in sorted(self.left_out.items()))
            log.warning("%s: fields that JSON cannot hold are left out: %s", source, what)


def _openai(record: Record, images: Sequence[object], beside: bool) -> dict[str, object]:
    record = normal(record)
    markers = sum(question.count(IMAGE_TOKEN) for question, _ in record.turns)
    if markers != len(images):
        raise FaultError(f"image: {len(images)} for {markers} {IMAGE_TOKEN}, where every one is shown in one place")
    messages: list[dict[str, object]] = []
    each = iter(images)

    def image() -> dict[str, object]:
        return {"type": "image"} if beside else {"type": "image_url", "image_url": {"url": next(each)}}

    def say(role: str, text: str, shows: bool) -> None:
        parts = _parts(text, f"messages[{len(messages)}].content", shows)
        whole_text = not beside and ImagePart.IMAGE not in parts
        made = [image() if isinstance(part, ImagePart) else {"type": "text", "text": part} for part in parts]
        messages.append({"role": role, "content": text if whole_text else made})

    if record.system is not None:
        say("system", record.system, False)
    for question, answer in record.turns:
        say("user", question, True)
        say("assistant", answer, False)
    return ({"images": list(images)} if beside and images else {}) | {"messages": messages}


def _parts(text: str, where: str, shows: bool) -> list[str | ImagePart]:
    """Return a text as parts, of which a reader makes lines. FaultError where that makes another text."""
    pieces = text.split(IMAGE_TOKEN) if shows else [text]
    parts: list[str | ImagePart] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(ImagePart.IMAGE)
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            parts.append(piece)
    again = "".join(IMAGE_TOKEN if isinstance(part, ImagePart) else part for part in laid_out(parts))
    if again != text:
        raise FaultError(f"{where}: {shown(text)} would be read back as {shown(again)}, for parts are lines")
    return parts


def _unread(values: Mapping[str, object]) -> Iterator[str]:
    """Yield the places inside the messages of an entry that nothing reads."""
    where = next((name for name in LISTS if values.get(name) is not None), "")
    messages = values.get(where)
    asked = False
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        at = f"{where}[{number}]"
        key = "role" if message.get("from") is None else "from"
        said = "content" if message.get("value") is None and "content" in message else "value"
        yield from (f"{at}.{n}" for n, v in message.items() if v is not None and n not in (key, said))
        if message.get(key) in ("human", "user"):
            asked = True
        elif not asked and str(message.get(key)).lower() not in ("system", "developer"):
            yield f"{at}.{said}"
        parts = message.get(said)
        for n, part in enumerate(parts if isinstance(parts, list) else []):
            if isinstance(part, dict):
                yield from (f"{at}.{said}[{n}].{x}" for x, v in part.items() if v is not None and x not in _PART_FIELDS)
                url = part.get("image_url")
                names = url if isinstance(url, dict) else {}
                yield from (f"{at}.{said}[{n}].image_url.{x}" for x, v in names.items() if v is not None and x != "url")
