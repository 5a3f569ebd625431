"""Records of a source, in whatever format it has: read one at a time, strictly checked, tokenized by the template."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._base import Broken, Files, Mark, Opened, Row, find_files
from tinyllava_fast.data.formats._rows import record_of
from tinyllava_fast.data.record import FaultError, Record
from tinyllava_fast.data.templates.base import MaskMode, Segment, Template, TurnMode
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.fields import shown
from tinyllava_fast.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Extra = Callable[[Row], Mapping[str, object] | None]
"""Returns the other fields of an entry that a record is to keep; FaultError for those that it cannot."""


def _ignore(_: BufferedIOBase) -> None:
    """Do without the position of the reader."""


class Refused(DataError):  # noqa: N818 a record that may be left out, not the end of reading
    """A record that cannot be used.

    what: the field and the reason. path: its source. where: its place there; "" if ``what`` says all. kind: of fault,
    for the list of those that were left out.
    """

    def __init__(self, what: str, path: str = "", where: str = "", kind: str = "record") -> None:
        super().__init__(what, path, where, kind)  # all of them, so that it passes from process to process
        self.what, self.path, self.where, self.kind = what, path, where, kind

    def __str__(self) -> str:
        """Return the whole message."""
        return f"{self.path}: {self.where}: {self.what}" if self.where else self.what


def read_records(path: str | Path, opened: Opened = _ignore, extra: Extra | None = None) -> Iterator[Record]:
    """Yield the records of a source, one at a time, in order.

    path: a file, a folder of shards, or a pattern such as shards/train-*.parquet. What it holds is told by its content
    (formats/). DataError for what is missing, empty or malformed, and for the first record that cannot be used. opened:
    told the file that is read, whose position is about where the reader is. extra: makes the ``extra`` of a record.
    """
    for record in read_refusing(path, opened, extra):
        if isinstance(record, Refused):
            raise record
        yield record


def read_refusing(path: str | Path, opened: Opened = _ignore, extra: Extra | None = None) -> Iterator[Record | Refused]:
    """Yield the records of a source as ``read_records`` does, and a Refused in place of each that cannot be used.

    DataError where reading cannot go on.
    """
    files, index = _files(Path(path)), 0
    for file in files.paths:
        for _, record in read_file(path, files, file, index, opened=opened, extra=extra):
            yield record
            index += 1
    if not index:
        raise no_records(path)


def read_file(
    path: str | Path,
    files: Files,
    file: Path,
    index: int,
    mark: Mark = (),
    opened: Opened = _ignore,
    extra: Extra | None = None,
) -> Iterator[tuple[Mark, Record | Refused]]:
    """Yield the records of one of the files of a source, or a Refused, each with its mark.

    index: of the first one. mark: of the record to begin with; (): the file's first. extra: see ``read_records``.
    DataError as ``read_refusing``.
    """
    kind, base = files.format, files.base
    try:
        rows = kind.rows_from(file, base, opened, mark) if mark else kind.rows(file, base, opened)
        for number, row in enumerate(rows, index):
            if isinstance(row, Broken):
                yield row.mark, Refused(row.what, str(path))
                continue
            if len(files.paths) > 1:
                row = replace(row, place=f"{file.name}, {row.place or f'line {row.line}'}")
            try:
                record = record_of(number, row)
                yield row.mark, record if extra is None else replace(record, extra=extra(row))
            except FaultError as fault:
                name = row.values.get("id", number) if isinstance(row.values, dict) else number
                place = row.place or f"line {row.line}"
                yield row.mark, Refused(str(fault), str(path), f"record {number} (id {shown(str(name))}, {place})")
    except OSError as error:
        raise unreadable(file, error) from error


def no_records(path: str | Path) -> DataError:
    """Return the error for a source without a single record."""
    return DataError(f"{path}: holds no records; expected a JSON list of records, or one record a line")


def _files(path: Path) -> Files:
    files = find_files(path)
    if files.left_out:
        log.info("%s: %d files read; left out: %s", path, len(files.paths), ", ".join(files.left_out[:10]))
    return files


def unreadable(path: str | Path, error: OSError) -> DataError:
    """Return the error for a file of records that cannot be read."""
    reason = error.strerror or error
    return DataError(f"{path}: cannot read the records: {reason}; check the path (data.records of a run)")


def check_turns(path: str | Path, record: Record, template: Template) -> None:
    """Raise Refused, naming the file and the record, for turns that are unusable with the template."""
    listed = len(record.images) if record.interleaved else None
    if problem := template.problem(record.turns, bool(record.images), listed):
        raise Refused(f"conversations: {problem}", str(path), record.where, "template")


def encode_each(
    path: str | Path,
    records: Sequence[Record],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    turns: TurnMode = "conversation",
    masks: MaskMode = "offsets",
) -> list[list[Segment] | Refused]:
    """Return the records as samples (``Template.encode``), tokenized together, or why the template refuses them."""

    def encode(some: Sequence[Record]) -> list[list[Segment]]:
        flags = [record.interleaved for record in some]
        own = template if some[0].system is None else template.with_system(some[0].system)
        return own.encode([record.turns for record in some], tokenizer, turns, masks, flags)

    alike: dict[str | None, list[int]] = defaultdict(list)  # records of one system text
    for number, record in enumerate(records):
        alike[record.system].append(number)
    found: dict[int, list[Segment] | Refused] = {}
    for numbers in alike.values():
        try:
            found.update(zip(numbers, encode([records[number] for number in numbers]), strict=True))
            continue
        except UserError as error:
            fault = error
        for number in numbers:
            try:
                [found[number]] = encode([records[number]])
            except UserError as error:
                found[number] = Refused(f"conversations: {error}", str(path), records[number].where, "template")
        if not any(isinstance(found[number], Refused) for number in numbers):
            raise fault  # of all together
    return [found[number] for number in range(len(records))]


def usable(samples: Iterable[list[Segment] | Refused]) -> list[list[Segment]]:
    """Return what ``encode_each`` has returned. Raise the first Refused in it."""
    found: list[list[Segment]] = []
    for sample in samples:
        if isinstance(sample, Refused):
            raise sample
        found.append(sample)
    return found
