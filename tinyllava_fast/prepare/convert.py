"""Records written in another form, streamed: nothing is lost in silence, and nothing is left half written."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePath

from tinyllava_fast.data.formats._base import RECORD_FORMATS, base_of, find_files
from tinyllava_fast.data.formats._embedded import is_reference
from tinyllava_fast.data.formats._shapes import Shape, Shown, Whole, ending_of, extras_of, whole
from tinyllava_fast.data.progress import Progress
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import read_records
from tinyllava_fast.data.workers import chunks
from tinyllava_fast.errors import DataError, UserError, writing
from tinyllava_fast.files import atomic_file, atomic_folder
from tinyllava_fast.log import log

_PART = 256  # records between two looks at the clock


@dataclass(frozen=True)
class Converted:
    """What was written. images: each counted as often as a record shows it."""

    records: int
    images: int


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    shape: Shape | None = None,
    image_folder: str | Path | None = None,
    images: str | Path | None = None,
    embed: bool = False,
    drop: Collection[str] = (),
) -> Converted:
    """Write the records of a source to a new file (or folder) of the format ``to``.

    shape: of the entries, where the format has several. image_folder: that image paths are relative to; None: that of
    the records. images: new folder that all images are written to as files; embed: they are written into ``out``; else
    each stays what it is, a path or bytes. drop: other fields of the records that are left out.
    DataError for a record or an image that cannot be used, or that the format cannot hold. UserError for what exists.
    """
    form = RECORD_FORMATS.get(to, "--to")
    for path in (out, *([] if images is None else [images])):
        if os.path.lexists(path):
            raise UserError(f"{path}: exists; name another place, or remove it")
    if images is not None and (embed or form.always_inside):
        why = "--embed" if embed else f"--to {to}"
        raise UserError(f"--images {images}: {why} writes the images into {out}; leave out --images")
    if images is not None:
        _refuse_nested(out, images)
    folder = str(base_of(source) if image_folder is None else image_folder)
    with writing(out), ExitStack() as stack:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(atomic_folder(out) if form.is_folder else atomic_file(out))
        files = None if images is None else stack.enter_context(atomic_folder(images))
        samples = _Samples(str(source), folder, files, embed or form.always_inside, frozenset(drop))
        form.write(place, samples, shape)
    if samples.inside:
        log.info(
            "%s: %d images lie inside it; paths that stand there beside their bytes are not kept",
            source,
            samples.inside,
        )
    return Converted(samples.records, samples.images)


def _refuse_nested(out: str | Path, images: str | Path) -> None:
    """Raise UserError where one place lies in the other: each appears as a whole, and would replace the other."""
    one, two = (Path(os.path.realpath(path)) for path in (out, images))
    if one == two or one in two.parents or two in one.parents:
        raise UserError(f"--images {images}: neither it nor {out} may lie in the other; name a folder beside {out}")


class _Samples:
    """The records of a source to write, read anew each time that they are gone through.

    files: folder that images are written to. inside: their bytes are wanted.
    """

    def __init__(self, source: str, folder: str, files: Path | None, inside: bool, drop: Collection[str]) -> None:
        self._source, self._folder, self._files, self._inside = source, folder, files, inside
        self._extra = partial(extras_of, dropped=drop)
        self.records = self.images = self.inside = 0
        """Of the last time. inside: images that lie inside the source."""

    def __iter__(self) -> Iterator[Whole]:
        base, paths = base_of(self._source), find_files(Path(self._source)).paths
        size = sum(os.path.getsize(path) for path in paths if path.is_file())
        progress = Progress(self._source, size, "read")
        self.records = self.images = self.inside = 0
        for part in progress.counted(chunks(read_records(self._source, progress.opened, self._extra), _PART)):
            for record in part:
                self.records += 1
                self.images += len(record.images)
                self.inside += sum(map(is_reference, record.images))
                yield self._whole(record, base)
            progress.done()
        progress.say_last()

    def _whole(self, record: Record, base: Path) -> Whole:
        one = whole(record, self._source, base, self._folder if self._inside or self._files else None)
        if self._files is None:
            return one
        return replace(one, images=tuple(Shown(self._written(one, number)) for number in range(len(one.images))))

    def _written(self, one: Whole, number: int) -> str:
        """Write an image to a file unless it is there; return its path in the folder.

        A file keeps its path below the image folder, unless that leads out of it. Others are named after their content.
        """
        assert self._files is not None  # noqa: S101 who calls has looked
        name = os.path.normpath(one.images[number].name) if one.images[number].name else ""
        content = None
        if not name or name.startswith("..") or PurePath(name).is_absolute():
            content = one.content(number)
            digest = blake2b(content, digest_size=12).hexdigest()
            name = f"{digest}.{ending_of(one.kind(number, content))}"
        path = self._files / name
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                where = f"{one.source}: {one.record.where}"
                raise DataError(f"{where}: image: {name} lies below an image of the set; rename one") from error
            path.write_bytes(one.content(number) if content is None else content)
        return name
