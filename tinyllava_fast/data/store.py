"""Tokenized samples in a few flat columns: mapped from disk, shared by processes, no Python object for a sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import pairwise
from zlib import crc32

import numpy as np

from tinyllava_fast.data.collate import targets
from tinyllava_fast.data.columns import Columns, ColumnWriter, Dtypes, MemoryColumns
from tinyllava_fast.data.templates.base import Segment
from tinyllava_fast.data.types import IMAGE_INDEX

DTYPES: Dtypes = {
    "ids": np.dtype("<i4"),
    "spans": np.dtype("<i4"),  # start, stop, start, stop, ... in the segment
    "segments": np.dtype([("ids", "<i8"), ("spans", "<i8"), ("on_prefix", "<i8")]),
    "views": np.dtype("<i4"),  # number of the image in its sample, at each marker
    "images": np.dtype([("start", "<i8"), ("stop", "<i8"), ("digest", "<u8")]),  # of the path, in the text
    "text": np.dtype("u1"),  # of each sample its id, its place, then its images
    "faults": np.dtype("u1"),  # records that were refused: a line of JSON each
    "samples": np.dtype(
        [(name, "<i8") for name in ("segments", "views", "images", "name", "place", "text", "record", "line", "learnt")]
    ),
}
"""A row of "segments" or "samples" says where each ends in the columns named; both begin with a row of zeros."""
_PLACES = {
    "segments": {"ids": "ids", "spans": "spans"},
    "images": {"start": "text", "stop": "text"},
    "samples": {
        **{"segments": "segments", "views": "views", "images": "images"},
        **{"name": "text", "place": "text", "text": "text"},
    },
}
_ZEROS = ("segments", "samples")
_READS = 256  # samples read between two times that their memory, a few pages each, is given back


@dataclass(frozen=True)
class Sample:
    """What the store keeps of a sample. segments: not widened. record, line, place: of the record that it is of."""

    segments: Sequence[Segment]
    name: str
    images: Sequence[str] = ()
    record: int = 0
    line: int = 0
    place: str = ""


@dataclass(frozen=True)
class Fault:
    """A record that was refused. where, what, kind: see records.Refused."""

    where: str
    what: str
    kind: str


def columns_of(samples: Iterable[Sample], faults: Iterable[Fault] = ()) -> dict[str, np.ndarray]:
    """Return the columns of some samples, without the rows of zeros; ``append`` puts them behind others."""
    ids: list[int] = []
    spans: list[int] = []
    segments: list[tuple[int, int, int]] = []
    views: list[int] = []
    images: list[tuple[int, int, int]] = []
    text = bytearray()
    rows: list[tuple[int, ...]] = []
    for sample in samples:
        for segment in sample.segments:
            ids += segment.ids
            for span in segment.spans:
                spans += span
            segments.append((len(ids), len(spans), segment.on_prefix))
            views += segment.images or [0] * segment.ids.count(IMAGE_INDEX)
        text += sample.name.encode()
        name = len(text)
        text += sample.place.encode()
        place = len(text)
        for image in sample.images:
            path = image.encode()
            digest = int.from_bytes(blake2b(path, digest_size=8).digest(), "little")
            images.append((len(text), len(text) + len(path), digest))
            text += path
        ends = (len(segments), len(views), len(images), name, place, len(text))
        rows.append((*ends, sample.record, sample.line, targets(sample.segments)))
    found = {"ids": ids, "spans": spans, "segments": segments, "views": views, "images": images, "samples": rows}
    arrays = {name: np.array(values, DTYPES[name]) for name, values in found.items()}
    lines = "".join(f"{json.dumps(asdict(fault))}\n" for fault in faults)
    texts = {"text": bytes(text), "faults": lines.encode()}
    return arrays | {name: np.frombuffer(content, np.uint8) for name, content in texts.items()}


class SampleWriter:
    """Puts the columns of samples behind those of earlier ones."""

    def __init__(self, columns: ColumnWriter | MemoryColumns) -> None:
        self._columns = columns
        self._lengths = dict.fromkeys(DTYPES, 0)
        for name in _ZEROS:
            columns.append(name, np.zeros(1, DTYPES[name]))

    def append(self, part: dict[str, np.ndarray]) -> None:
        """Add what ``columns_of`` returned; the places in it are moved."""
        for name, places in _PLACES.items():
            for field, counted in places.items():
                part[name][field] += self._lengths[counted]
        for name, values in part.items():
            self._columns.append(name, values)
            self._lengths[name] += len(values)


class SampleStore:
    """The samples of a source, as ``SampleWriter`` has written them.

    key: a digest of the source's content and of all else that the columns depend on; "" for none.
    """

    def __init__(self, columns: Columns | MemoryColumns, key: str = "") -> None:
        self._columns, self.key = columns, key
        self._reads = 0

    def __len__(self) -> int:
        return len(self._columns["samples"]) - 1

    def sample(self, index: int) -> list[Segment]:
        """Return the segments of one sample, one marker an image."""
        self._reads += 1
        if self._reads % _READS == 0:
            self.let_go()
        first, last = self._ends(index, "segments")
        rows = self._columns["segments"][first : last + 1].tolist()
        found = []
        for (begin, spans_begin, _), (end, spans_end, on_prefix) in pairwise(rows):
            spans = self._columns["spans"][spans_begin:spans_end].tolist()
            pairs = list(zip(spans[0::2], spans[1::2], strict=True))
            found.append(Segment(self._columns["ids"][begin:end].tolist(), pairs, bool(on_prefix)))
        return found

    def name(self, index: int) -> str:
        """Return the record id of one sample."""
        samples = self._columns["samples"]
        return self._text(samples["text"][index], samples["name"][index + 1])

    def where(self, index: int) -> str:
        """Return the name of a sample's record in an error."""
        row = self._columns["samples"][index + 1]
        place = self._text(row["name"], row["place"]) or f"line {row['line']}"
        return f"record {row['record']} (id {self.name(index)!r}, {place})"

    def faults(self) -> list[Fault]:
        """Return the records that were refused, in order."""
        lines = self._columns["faults"].tobytes().decode().splitlines()
        return [Fault(**json.loads(line)) for line in lines]

    def images(self, index: int) -> list[str]:
        """Return the image paths of one sample; empty for text alone."""
        first, last = self._ends(index, "images")
        return [self.image(number) for number in range(first, last)]

    def image(self, number: int) -> str:
        """Return the path of one of all samples' images."""
        start, stop, _ = self._columns["images"][number].tolist()
        return self._text(start, stop)

    def views(self, index: int) -> list[int]:
        """Return the number of the image at each marker of one sample, in order."""
        first, last = self._ends(index, "views")
        return self._columns["views"][first:last].tolist()

    def column(self, name: str, field: str = "") -> np.ndarray:
        """Return a column, or a field of it as an array of its own, as ``DTYPES`` has them."""
        values = self._columns[name]
        return values[field].copy() if field else values

    def fingerprint(self) -> int:
        """Return a checksum of all tokens and labels: a saved position is valid only for the same data."""
        return self._sum("ids", "spans", "segments")

    def sources(self) -> int:
        """Return a checksum of all record ids and image paths, which no position depends on."""
        return self._sum("text")

    def let_go(self) -> None:
        """Give the memory of what was read back to the system's cache."""
        self._columns.let_go()

    def _sum(self, *names: str) -> int:
        return crc32(repr([self._columns.checksums[name] for name in names]).encode())

    def _ends(self, index: int, counted: str) -> tuple[int, int]:
        first, last = self._columns["samples"][counted][index : index + 2].tolist()
        return first, last

    def _text(self, start: int, end: int) -> str:
        return self._columns["text"][start:end].tobytes().decode()
