"""Find everything that training would refuse in a set of records, in one pass, and write the set without it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from tinyllava_fast.data.files import image_fault
from tinyllava_fast.data.formats._base import base_of, find_files
from tinyllava_fast.data.formats._embedded import picture_of
from tinyllava_fast.data.formats._shapes import JsonExtras, whole
from tinyllava_fast.data.formats.json_text import object_of
from tinyllava_fast.data.images import image_size
from tinyllava_fast.data.pictures import UPRIGHT, PictureReading, naming
from tinyllava_fast.data.progress import Progress
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import Refused, check_turns, encode_each, read_refusing
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.tokens import pieces_of
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.data.workers import chunks, in_order
from tinyllava_fast.errors import DataError, UserError, writing
from tinyllava_fast.files import atomic_file
from tinyllava_fast.hardware import cores
from tinyllava_fast.pace import Pace
from tinyllava_fast.prepare.mend import mended
from tinyllava_fast.prepare.sources import LookedAt
from tinyllava_fast.prepare.survey import advice

SHOWN = 10
"""Faults of a kind that the report names one by one."""
_PART = 256  # records that one process looks at together
_MANY = 2048  # records for which processes repay
_LOOKERS = 8  # threads that open images: on a disk far away each waits for an answer
_KEPT = 65536  # images whose faults a process remembers
_BAD = "put a whole picture there, or remove the record"
_BROKEN = re.compile(r"^.*?: (line \d+(?:, record \d+)?): ", re.DOTALL)
_OF_ONE = (  # what makes the message of a fault differ from that of another of its kind
    (re.compile(r", got .*?(?=; |$)", re.DOTALL), ", got something else"),
    (re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""), "..."),
    (re.compile(r"\d[\d,.]*"), "N"),
)


@dataclass(frozen=True)
class Fault:
    """One fault. where: its record. kind: what it has in common with others. reason: with field and remedy."""

    where: str
    kind: str
    reason: str


@dataclass
class Group:
    """The faults of one kind. first: up to SHOWN of them."""

    count: int = 0
    first: list[Fault] = field(default_factory=list)


@dataclass
class Report:
    """What was found in one source. images: counted each time that a record names one. bad: records with a fault."""

    name: str
    records: int = 0
    images: int = 0
    bad: int = 0
    mended: int = 0
    """Of the bad ones those that were mended in the set that was written."""
    seconds: float = 0.0
    groups: dict[str, Group] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        """Count a fault."""
        group = self.groups.setdefault(fault.kind, Group())
        group.count += 1
        if len(group.first) < SHOWN:
            group.first.append(fault)

    def text(self) -> str:
        """Return the report for a reader."""
        rate = self.records / max(self.seconds, 1e-9)
        lines = [
            f"{self.name}: {self.records:,} records that name {self.images:,} images, looked at in "
            f"{self.seconds:.1f} s ({rate:,.0f} records a second)"
        ]
        if not self.groups:
            return f"{lines[0]}\n  nothing is wrong\n"
        lines.append(f"  {self.bad:,} records cannot be used" + f", {self.mended:,} of them mended" * bool(self.mended))
        for kind, group in sorted(self.groups.items(), key=lambda item: -item[1].count):
            lines.append(f"\n  {group.count:,} x {kind}")
            lines += [f"    {fault.where}: {fault.reason}" for fault in group.first]
            lines += [f"    and {group.count - SHOWN:,} more"] * (group.count > SHOWN)
        return "\n".join([*lines, ""])

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        faults = [
            {"kind": kind, "count": g.count, "first": [{"record": f.where, "reason": f.reason} for f in g.first]}
            for kind, g in self.groups.items()
        ]
        counts = {"records": self.records, "images": self.images, "bad": self.bad, "mended": self.mended}
        return {"source": self.name, **counts, "seconds": round(self.seconds, 3), "faults": faults}


def check(source: LookedAt, *, deep: bool = False, fix: str | Path | None = None) -> Report:
    """Look at all records of a source and their images, and return what is wrong with them.

    deep: decode every image; else only headers are read. fix: JSONL file to write what is usable to, mended where that
    is certain; beside it NAME.left-out.jsonl lists the rest, with reasons. DataError if no record can be read at all,
    UserError if a file cannot be written.
    """
    if fix is not None:
        return _fixed(source, deep, Path(fix))
    return _looked(source, _Examiner(source, deep, False), None, None)


def _fixed(source: LookedAt, deep: bool, out: Path) -> Report:
    listed = out.with_name(f"{out.stem}.left-out.jsonl")
    for path in (out, listed):
        if path.exists():
            raise UserError(f"{path}: exists; name another file for the mended set, or remove it")
    with writing(out), ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        good, rest = (
            stack.enter_context(stack.enter_context(atomic_file(path)).open("w", encoding="utf-8", newline="\n"))
            for path in (out, listed)
        )
        return _looked(source, _Examiner(source, deep, True), good, rest)


def _looked(source: LookedAt, examiner: _Examiner, good: TextIO | None, rest: TextIO | None) -> Report:
    path, report = source.data.records, Report(source.name)
    files = find_files(Path(path))
    size = sum(os.path.getsize(file) for file in files.paths if file.is_file())
    progress, pace = Progress(path, size, "looked at"), Pace()
    ended: list[Fault] = []
    extra = JsonExtras() if good is not None else None
    records = _readable(read_refusing(path, progress.opened, extra), ended)
    first = list(islice(records, _MANY))
    if not first and ended:
        raise DataError(ended[0].reason)
    parts = progress.counted(chunks(chain(first, records), _PART))
    for found in in_order(examiner, parts, cores() if len(first) == _MANY and cores() > 1 else 0):
        progress.done()
        report.records += found.records
        report.images += found.images
        report.bad += found.bad
        report.mended += found.mended
        for fault in found.faults:
            report.add(fault)
        if good is not None and rest is not None:
            good.write("".join(found.lines))
            rest.write("".join(_listed(path, fault) for fault in found.left_out))
    for fault in ended:
        report.bad += 1  # nobody knows how many follow, but the set is not whole
        report.add(fault)
        if rest is not None:
            rest.write(_listed(path, fault))
    progress.say_last()
    if extra is not None:
        extra.warn(path)
    report.seconds = pace.elapsed_s
    return report


def _readable(records: Iterator[Record | Refused], ended: list[Fault]) -> Iterator[Record | Refused]:
    """Yield the records up to where reading cannot go on, and note why it cannot."""
    try:
        yield from records
    except DataError as error:
        ended.append(Fault("the file", "reading ends here, and what follows is not known", str(error)))


def _listed(path: str, fault: Fault) -> str:
    line = {"file": path, "record": fault.where, "kind": fault.kind, "reason": fault.reason}
    return json.dumps(line, ensure_ascii=False) + "\n"


@dataclass
class _Found:
    """What was found in some records. lines: the usable ones, written. left_out: the faults of those that are not."""

    records: int = 0
    images: int = 0
    bad: int = 0
    mended: int = 0
    faults: list[Fault] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    left_out: list[Fault] = field(default_factory=list)


class _Examiner:
    """Looks at records; used by several processes, which inherit it."""

    def __init__(self, source: LookedAt, deep: bool, fix: bool) -> None:
        self.source, self.deep, self.fix = source, deep, fix
        self.template, self.base = source.template, base_of(source.data.records)
        data = source.data
        self.reading = PictureReading(data.orientation or UPRIGHT.orientation, data.background or UPRIGHT.background)
        self._known: dict[str, tuple[str, bool]] = {}

    def __call__(self, part: list[Record | Refused]) -> _Found:
        found = _Found(records=len(part))
        records = [record for record in part if isinstance(record, Record)]
        faults = self._faults(records)
        for record in part:
            if isinstance(record, Refused):
                found.bad += 1
                found.faults.append(_unread(record))
                found.left_out.append(found.faults[-1])
                continue
            found.images += len(record.images)
            own = faults[record.index]
            found.bad += bool(own)
            found.faults += own
            if self.fix:
                self._write(record, own, found)
        return found

    def _write(self, record: Record, faults: list[Fault], found: _Found) -> None:
        """Write a record that is usable or can be mended; else note why it is not."""
        if faults:
            record = mended(record, self.template, self.source.data.image_folder)
            if left := self._faults([record])[record.index]:
                found.left_out += left
                return
            found.mended += 1
        found.lines.append(object_of(whole(record, self.source.data.records, self.base)) + "\n")

    def _faults(self, records: list[Record]) -> dict[int, list[Fault]]:
        """Return all faults of each record, by its number."""
        self._look(image for record in records for image in record.images)
        found: dict[int, list[Fault]] = {record.index: [] for record in records}
        usable = []
        for record in records:
            try:
                check_turns(self.source.data.records, record, self.template)
                usable.append(record)
            except Refused as refused:
                found[record.index].append(Fault(record.where, kind_of(refused.what), refused.what))
            found[record.index] += self._of_images(record)
        if self.source.tokenizer is not None and usable:
            data = self.source.data
            pieces = [piece for record in usable for piece in pieces_of(record, data.turns_per_sample)]
            samples = encode_each(data.records, pieces, self.template, self.source.tokenizer, data.turns, data.masks)
            for piece, sample in zip(pieces, samples, strict=True):
                what = sample.what if isinstance(sample, Refused) else self._too_large(piece, sample)
                if what and all(what != fault.reason for fault in found[piece.index]):
                    found[piece.index].append(Fault(piece.where, kind_of(what), what))
        return found

    def _too_large(self, record: Record, sample: list[Segment]) -> str:
        """Return why no pack can hold a sample; "" if one can, or if nothing says how large packs are."""
        fit = self.source.fit
        if fit is None:
            return ""
        views = [view for segment in sample for view in segment.images or [0] * segment.ids.count(IMAGE_INDEX)]
        return fit.limits.problem(sample, [self._inputs(record.images[view]) for view in views])

    def _inputs(self, image: str) -> int:
        """Return the tower inputs of an image; 1 for one that cannot be read, of which that is said."""
        fit = self.source.fit
        assert fit is not None  # noqa: S101 who calls has looked
        if not fit.grid or self._known[image][0]:
            return 1
        picture = picture_of(image, self.source.data.image_folder, self.base)
        return fit.inputs(image_size(picture, self.reading))

    def _of_images(self, record: Record) -> Iterator[Fault]:
        folder = self.source.data.image_folder
        for image in dict.fromkeys(record.images):
            reason, missing = self._known[image]
            if reason:
                remedy = advice(image, Path(folder)) if missing else _BAD
                kind = kind_of(reason.rpartition(": ")[2] if not missing else "an image that does not exist")
                yield Fault(record.where, f"image: {kind}; {remedy}", f"image: {reason}")

    def _look(self, images: Iterable[str]) -> None:
        """Look at the images that are not known yet, several at a time."""
        if len(self._known) > _KEPT:
            self._known.clear()
        names = list(dict.fromkeys(images))
        new = [name for name in names if name not in self._known]
        folder = self.source.data.image_folder

        def look(name: str) -> tuple[str, bool]:
            return image_fault(name, folder, self.base, self.reading, deep=self.deep)

        with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="tlf-look") as pool:
            self._known.update(zip(new, pool.map(look, new), strict=True))


def kind_of(reason: str) -> str:
    """Return a reason without what it says of its one record: names, numbers and values.

    >>> kind_of("conversations[1].from: expected 'human' or 'gpt', got 'x'; mend it")
    'conversations[N].from: expected ... or ..., got something else; mend it'
    """
    for pattern, words in _OF_ONE:
        reason = pattern.sub(words, reason)
    return reason


def _unread(refused: Refused) -> Fault:
    """Return the fault of a record that could not be made."""
    where, what = refused.where, refused.what
    if not where and (found := _BROKEN.match(what)):
        where, what = found[1], what[found.end() :]
    return Fault(where or naming(refused.path), kind_of(what), what)
