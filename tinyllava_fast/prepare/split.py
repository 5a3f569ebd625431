"""Hold a part of a set out, by image: no image is on both sides, and neither is a question about none."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from tinyllava_fast.data.formats._base import base_of
from tinyllava_fast.data.formats._shapes import JsonExtras, whole
from tinyllava_fast.data.formats.json_text import object_of
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import read_records
from tinyllava_fast.data.split import image_key
from tinyllava_fast.errors import UserError, writing
from tinyllava_fast.files import atomic_file

NAMES = ("train.jsonl", "held_out.jsonl")


@dataclass(frozen=True)
class Sizes:
    """Records on each side."""

    train: int
    held_out: int


def split(records: str | Path, out: str | Path, share: float, seed: int = 0) -> Sizes:
    """Write the records to two files of the folder ``out``: train.jsonl and held_out.jsonl.

    Records that share an image, or without one the first question, stay together. Whole groups are held out, in an
    order that depends on the seed and their images alone, up to ``share`` of all records.
    DataError for records that cannot be used; UserError for a share that leaves a side empty, or files that exist.
    """
    if not 0 < share < 1:
        raise UserError(f"--share {share}: give a part of the records between 0 and 1, such as 0.02")
    folder, base = Path(out), base_of(records)
    for path in (folder / name for name in NAMES):
        if path.exists():
            raise UserError(f"{path}: exists; choose another folder or remove it")
    groups = _groups(records, base)
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: blake2b(f"{seed} ".encode() + group).digest())
    most, count, held = round(share * len(groups)), 0, set[bytes]()
    for group in order:
        if count + sizes[group] <= most:
            held.add(group)
            count += sizes[group]
    if not held:
        raise UserError(
            f"{records}: no group of records that share an image is as small as {most:,} of {len(groups):,} records; "
            "give a larger --share"
        )
    with writing(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        files = [
            stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            for path in [stack.enter_context(atomic_file(folder / name)) for name in NAMES]
        ]
        extras = JsonExtras()
        for record, group in zip(read_records(records, extra=extras), groups, strict=True):
            files[group in held].write(object_of(whole(record, str(records), base)) + "\n")
        extras.warn(str(records))
    return Sizes(len(groups) - count, count)


def _groups(records: str | Path, base: Path) -> list[bytes]:
    """Return the name of each record's group: the least key of all records that images tie to it."""
    parents: dict[bytes, bytes] = {}

    def top(key: bytes) -> bytes:
        while (above := parents.setdefault(key, key)) != key:
            parents[key] = parents[above]
            key = above
        return key

    firsts = []
    for record in read_records(records):
        first, *others = _keys(record, base)
        firsts.append(first)
        for other in others:
            one, two = sorted((top(first), top(other)))
            parents[two] = one
    return [top(first) for first in firsts]


def _keys(record: Record, base: Path) -> list[bytes]:
    """Return a digest of the key of each image, or of the first question where there is none."""
    keys = [image_key(image, base) for image in record.images] or [f"text {record.turns[0][0]}"]
    return [blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest() for key in keys]
