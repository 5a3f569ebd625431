"""What a set holds, in numbers: turns, lengths, images, copies, what it shares with an evaluation set, and tokens.

Records are read one at a time and images are looked at by all cores; of a record some ten numbers are kept, of an image
a row of ``pictures.ROW``, so memory is about 150 bytes a record, whatever is in it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from tinyllava_fast.data.collate import truncate, width
from tinyllava_fast.data.formats._base import base_of, find_files
from tinyllava_fast.data.limits import PackLimits
from tinyllava_fast.data.progress import Progress
from tinyllava_fast.data.record import Record
from tinyllava_fast.data.records import Refused, read_refusing
from tinyllava_fast.data.store import SampleStore
from tinyllava_fast.data.tokens import tokenized
from tinyllava_fast.data.types import IMAGE_INDEX
from tinyllava_fast.data.workers import chunks, in_order
from tinyllava_fast.errors import DataError
from tinyllava_fast.hardware import cores
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace
from tinyllava_fast.prepare.overlap import MIX, Against, Asked, Shared, compare, plain, text_digest
from tinyllava_fast.prepare.pictures import ROW, look, near_groups, rows_of
from tinyllava_fast.prepare.sources import LookedAt

_PART = 256
_MANY = 512  # images for which processes repay
_LOOKERS = 4  # threads that read files in each process


@dataclass
class Spread:
    """How a number is spread over a set. bins: counts of equal steps from ``least`` to ``most``."""

    count: int
    total: int
    least: float
    median: float
    mean: float
    p95: float
    most: float
    bins: list[int]

    @classmethod
    def of(cls, values: np.ndarray, bins: int = 32) -> Spread | None:
        """Return it of [n] numbers; None for none."""
        if not len(values):
            return None
        least, most = float(values.min()), float(values.max())
        steps = int(min(bins, max(most - least + 1, 1))) if values.dtype.kind in "iu" else bins
        counts = np.histogram(values, steps, (least, most if most > least else least + 1))[0]
        middle, high = (float(v) for v in np.quantile(values, (0.5, 0.95)))
        return cls(len(values), int(values.sum()), least, middle, float(values.mean()), high, most, counts.tolist())


@dataclass
class Stats:
    """The numbers of one source. counts: of whole numbers, by what they count. spreads: by what is spread."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    shared: list[Shared] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, values: np.ndarray) -> None:
        """Add the spread of some numbers, if there are any."""
        if (spread := Spread.of(values)) is not None:
            self.spreads[name] = spread


class _Columns:
    """What is kept of each record, in the order of the file."""

    def __init__(self) -> None:
        self.turns, self.images = array("i"), array("i")
        self.asked, self.answered = array("q"), array("q")  # characters
        self.texts = array("Q")  # digest of the conversation
        self.questions = array("Q")  # digest of each question
        self.mentions = array("Q")  # digest of the name of each image
        self.refused = 0

    def add(self, record: Record) -> None:
        """Add a record."""
        self.turns.append(len(record.turns))
        self.images.append(len(record.images))
        self.asked.append(sum(len(question) for question, _ in record.turns))
        self.answered.append(sum(len(answer) for _, answer in record.turns))
        self.texts.append(text_digest(repr((record.turns, record.system))))
        self.questions.extend(text_digest(plain(question)) for question, _ in record.turns)
        self.mentions.extend(text_digest(image) for image in record.images)


def stats(source: LookedAt, against: Sequence[Against] = (), *, pixels: bool = True) -> Stats:
    """Return the numbers of a source; records that cannot be used are counted and left out.

    against: evaluation sets. pixels: look at the images too. DataError if no record can be used, or the file not read.
    """
    pace = Pace()
    data, found = source.data, Stats(source.name)
    columns = _Columns()
    for record in _records(data.records, "read", columns):
        columns.add(record)
    if not columns.turns:
        raise DataError(f"{data.records}: no record can be used; tlf-data check says why")
    images = np.frombuffer(columns.images, np.int32)
    mentions = np.frombuffer(columns.mentions, np.uint64) if columns.mentions else np.zeros(0, np.uint64)
    names, first, number = np.unique(mentions, return_index=True, return_inverse=True)
    found.counts |= {
        "records": len(images),
        "refused": columns.refused,
        "text alone": int((images == 0).sum()),
        "turns": sum(columns.turns),
        "images shown": len(mentions),
        "images": len(names),
    }
    found.add("turns", np.frombuffer(columns.turns, np.int32))
    found.add("images of a record", images)
    found.add("characters of questions", np.frombuffer(columns.asked, np.int64))
    found.add("characters of answers", np.frombuffer(columns.answered, np.int64))
    texts = np.frombuffer(columns.texts, np.uint64)
    found.counts["conversations that stand in an earlier record"] = len(texts) - len(np.unique(texts))
    rows = _look_at_images(source, first, number) if pixels and len(names) else np.zeros(len(names), ROW)
    ids = np.where(rows["width"] > 0, rows["content"], names)  # a file that cannot be read is known by its name
    if pixels and len(names):
        _of_images(found, rows)
    same = texts ^ _of_each(ids[number], images)
    found.counts["records that are copies of an earlier one"] = len(same) - len(np.unique(same))
    turns, questions = np.frombuffer(columns.turns, np.int32), np.frombuffer(columns.questions, np.uint64)
    own = Asked(turns, images, questions, number, rows if pixels else None)
    found.shared += [compare(data.records, one, own) for one in against]
    _tokens(found, source)
    found.seconds = pace.elapsed_s
    return found


def _records(path: str, what: str, columns: _Columns | None = None) -> Iterator[Record]:
    """Yield the usable records, telling how far it is; count the others."""
    files = find_files(Path(path)).paths
    progress = Progress(path, sum(os.path.getsize(file) for file in files if file.is_file()), what)
    for part in progress.counted(chunks(read_refusing(path, progress.opened), _PART)):
        for record in part:
            if isinstance(record, Record):
                yield record
            elif columns is not None:
                columns.refused += 1
        progress.done()
    progress.say_last()


def _look_at_images(source: LookedAt, first: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Return the rows of all images, in the order of their names' digests. first: of each, its first mention."""
    new = np.zeros(len(number), bool)
    new[first] = True

    def names() -> Iterator[str]:
        at = 0
        for record in read_refusing(source.data.records):
            if isinstance(record, Refused):
                continue
            for image in record.images:
                if new[at]:
                    yield image
                at += 1

    looker = partial(_look_at_some, source.data.image_folder, base_of(source.data.records))
    processes = cores() if len(first) >= _MANY and cores() > 1 else 0
    pace, parts, done = Pace(wait_s=5.0), [], 0
    for part in in_order(looker, chunks(names(), _PART), processes):
        parts.append(part)
        done += len(part)
        if pace.due():
            rate = done / pace.elapsed_s
            left = (len(first) - done) / rate
            log.info("%s: %d of %d images looked at, %.0f a second, about %.0f s left", source.name, done, len(first),
                     rate, left)  # fmt: skip
    rows = np.empty(len(first), ROW)
    rows[number[np.flatnonzero(new)]] = rows_of(parts)
    return rows


def _look_at_some(folder: str, base: Path, names: list[str]) -> np.ndarray:
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="tlf-look") as pool:
        return np.array(list(pool.map(lambda name: look(name, folder, base), names)), ROW)


def _of_images(found: Stats, rows: np.ndarray) -> None:
    seen = rows[rows["width"] > 0]
    _, place = np.unique(seen["content"], return_index=True)
    groups = near_groups(seen[np.sort(place)])
    _, sizes = np.unique(groups, return_counts=True)
    found.counts |= {
        "images that cannot be read": len(rows) - len(seen),
        "images that are copies of an earlier one": len(seen) - len(place),
        "groups of images that look alike": int((sizes > 1).sum()),
        "images in these groups": int(sizes[sizes > 1].sum()),
    }
    found.add("width", seen["width"])
    found.add("height", seen["height"])
    found.add("KiB of an image", seen["bytes"] / 1024)


def _of_each(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return a digest of the images of each record, which depends on their order. ids: of all, one after the other."""
    ends = np.cumsum(counts)
    place = np.arange(len(ids)) - np.repeat(ends - counts, counts)
    mixed = np.concatenate([[np.uint64(0)], np.cumsum((ids ^ MIX) * (2 * place.astype(np.uint64) + np.uint64(1)))])
    return mixed[ends] - mixed[ends - counts]


def _tokens(found: Stats, source: LookedAt) -> None:
    """Add what the token store tells, which is made if it is not there; nothing without a tokenizer."""
    if source.tokenizer is None:
        return
    store = tokenized(replace(source.data, on_error="skip"), source.tokenizer)
    segments = store.column("samples", "segments")
    tokens = np.diff(store.column("segments", "ids")[segments])
    views = np.diff(store.column("samples", "views"))
    learnt = store.column("samples", "learnt")[1:]
    fit = source.fit
    lengths = tokens - views + views * fit.tokens_per_image if fit is not None else tokens
    found.counts |= {
        "samples": len(tokens),
        "tokens": int(lengths.sum()),
        "tokens that are learnt": int(learnt.sum()),
        "samples without one": int((learnt == 0).sum()),
    }
    found.shares["of the tokens are learnt"] = float(learnt.sum() / max(lengths.sum(), 1))
    found.add("tokens of a sample", lengths)
    if fit is not None and source.data.image_mode != "anyres":
        needs = _needs(found, fit.limits, store, lengths, views)
        packs = fit.packs(*needs)
        found.counts["packs of an epoch"] = packs
        found.shares["of the packs is filled"] = float(needs[0].sum() / max(packs * fit.batch.tokens, 1))
    store.let_go()


def _needs(
    found: Stats, limits: PackLimits, store: SampleStore, lengths: np.ndarray, views: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions, images and segments of the samples that packs hold, cut as training cuts; count the others."""
    lengths, images = lengths.copy(), views.copy()
    segments = np.diff(store.column("samples", "segments"))
    fits, cut = np.ones(len(lengths), bool), 0
    for number in np.flatnonzero(lengths > limits.tokens).tolist():
        if limits.too_long(int(lengths[number]), min(int(views[number]), 1)):
            fits[number] = False
            continue
        sample = truncate(store.sample(number), limits.tokens, limits.tokens_per_image)
        lengths[number], segments[number] = width(sample, limits.tokens_per_image), len(sample)
        images[number] = sum(segment.ids.count(IMAGE_INDEX) for segment in sample)
        cut += 1
    over = fits & ((images > limits.images) | (segments > limits.segments))
    found.counts["samples longer than a pack may hold"] = int((~fits).sum())
    if limits.overlong == "truncate":
        found.counts["samples that are cut"] = cut
    found.counts["samples of more images or segments than a pack may hold"] = int(over.sum())
    fits &= ~over
    return lengths[fits], images[fits], segments[fits]
