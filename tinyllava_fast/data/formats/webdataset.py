"""WebDataset: tar archives whose neighbouring files of one stem are one record (https://github.com/webdataset).

000001.jpg  000001.json     an image, and a record as in a JSON file
000002.jpg  000002.txt      an image, and its caption
000003.a.png 000003.b.png 000003.question.txt 000003.answer.txt
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from io import BufferedIOBase
from itertools import groupby
from pathlib import Path

from tinyllava_fast.data.formats._base import RECORD_FORMATS, Broken, Head, Mark, Opened, Place, RecordFormat, Row
from tinyllava_fast.data.formats._embedded import Embedded, walk
from tinyllava_fast.data.formats._shapes import Shape, Whole, check_held, ending_of, fields_of, json_of, not_held
from tinyllava_fast.data.record import FaultError
from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import decode

_NAME = "webdataset"
_MAGIC, _MAGIC_AT = b"ustar", 257
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "ppm", "img", "image")
_BINARY = frozenset({"image"})
_TEXTS = {"txt": "caption", "text": "caption", "caption": "caption", "question": "question", "answer": "answer"}


class WebDataset(RecordFormat):
    """An uncompressed tar archive."""

    sharded = holds_images = always_inside = marks_are_bytes = True

    def matches(self, head: Head) -> bool:
        """See the base class."""
        return head.start[_MAGIC_AT:].startswith(_MAGIC)

    def rows(self, path: Path, base: Path, opened: Opened) -> Iterator[Row | Broken]:
        """See the base class."""
        return self.rows_from(path, base, opened, (0, 0))

    def rows_from(self, path: Path, base: Path, opened: Opened, mark: Mark) -> Iterator[Row | Broken]:
        """See the base class. A mark is the first byte of an entry, that of its first header, and its number."""
        try:
            with path.open("rb") as file:
                file.seek(mark[0])
                yield from self._rows(path, base, opened, file, mark[1])
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{path}: a damaged tar archive ({error}); download or write it again") from error

    def _rows(self, path: Path, base: Path, opened: Opened, file: BufferedIOBase, first: int) -> Iterator[Row | Broken]:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            opened(file)
            files = (member for member in archive if member.isreg() and not _ending(member.name).startswith("_"))
            for number, (stem, grouped) in enumerate(groupby(files, lambda member: _stem(member.name)), first):
                members = list(grouped)
                mark = (members[0].offset, number)
                try:
                    yield replace(_row(path, base, archive, number, stem, members), mark=mark)
                except DataError as error:
                    yield Broken(str(error), number + 1, mark)
                # tarfile keeps all that it has seen: gigabytes for a large archive.
                archive.members = []  # type: ignore[attr-defined]

    def image(self, path: Path, address: tuple[int, ...], place: Place) -> object:
        """See the base class. The address is the first byte of a file of the archive and the number of its bytes."""
        with path.open("rb") as file:
            file.seek(address[0])
            content = file.read(address[1])
        if len(content) < address[1]:
            raise ValueError("the archive has become shorter")
        return walk(decode(content.decode(), str(path)), place) if place else content

    def write(self, path: Path, samples: Iterable[Whole], shape: Shape | None) -> None:
        """See the base class. Of each record its images, then its JSON file."""
        with tarfile.open(path, "w") as archive:
            for number, one in enumerate(samples):
                for name, content in _members(one, f"{number:09}", shape or "llava"):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                archive.members = []  # type: ignore[attr-defined]


RECORD_FORMATS.register(_NAME)(WebDataset())


def _members(one: Whole, stem: str, shape: Shape) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of a record."""
    names = []
    for number, image in enumerate(one.images):
        content = one.content(number)
        ending = ending_of(one.kind(number, content))
        ending = ending if ending in _PICTURES else "img"
        name = f"{stem}.{number}.{ending}" if len(one.images) > 1 else f"{stem}.{ending}"
        names.append(image.name or name)
        yield name, content
    try:
        values = fields_of(one.record, shape, names, beside=True)
    except FaultError as fault:
        raise not_held(one, str(fault)) from None
    text = json_of(one, values)
    check_held(one, _described(values, {}, len(names), stem), _BINARY)
    yield f"{stem}.json", text.encode()


def _stem(name: str) -> str:
    folder, file = posixpath.split(name)
    return posixpath.join(folder, file.partition(".")[0])


def _ending(name: str) -> str:
    return posixpath.basename(name).partition(".")[2].lower()


def _row(
    path: Path, base: Path, archive: tarfile.TarFile, number: int, stem: str, members: list[tarfile.TarInfo]
) -> Row:
    """Return the files of one stem as an entry; its id is the stem."""
    beside: dict[str, object] = {}
    values: dict[str, object] = {}
    pictures, described = [], None
    for member in members:
        ending = _ending(member.name)
        last = ending.rpartition(".")[2]
        if last in _PICTURES:
            pictures.append(member)
        elif last == "json":
            described = member
            found = decode(_text(path, archive, member), f"{path}: {member.name}")
            if not isinstance(found, dict):
                raise DataError(f"{path}: {member.name}: expected a JSON object; mend or remove it")
            values = found
        elif (name := _TEXTS.get(ending.removesuffix(".txt"))) is not None:
            beside[name] = _text(path, archive, member)
    values = _described(values, beside, len(pictures), stem)
    refer = partial(_refer, path, base, pictures, described)
    return Row(values, number + 1, refer, f"{path.name}: {stem}", _BINARY)


def _described(described: dict[str, object], beside: dict[str, object], pictures: int, stem: str) -> dict[str, object]:
    """Return an entry of the fields of its JSON file and of the texts beside that; True stands for a picture."""
    values = {**described, **beside}
    values.setdefault("id", stem)
    if pictures:
        listed = pictures > 1 or "images" in values or isinstance(values.get("image"), list)
        values = {name: value for name, value in values.items() if name not in ("image", "images")}
        values["image"] = [True] * pictures if listed else True
    if "conversations" in values or "messages" in values or "question" in values:
        values.pop("caption", None)
    return values


def _refer(
    path: Path, base: Path, pictures: list[tarfile.TarInfo], described: tarfile.TarInfo | None, place: Place
) -> str:
    """Return the reference to a picture of the entry, or to a data URI in its JSON file."""
    if pictures and place[0] == "image":
        member = pictures[int(place[1]) if len(place) > 1 else 0]
        place = ()
    else:
        assert described is not None  # noqa: S101 an image that is no file of its own was named there
        member = described
    return Embedded(_NAME, str(path), (member.offset_data, member.size), place).reference(base)


def _text(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    try:
        return file.read().decode("utf-8-sig") if file is not None else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {member.name}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
