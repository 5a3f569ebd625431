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
from hashlib import blake2b
from pathlib import Path

import numpy as np

from tinyllava_fast.data.formats._base import Row, base_of, find_files
from tinyllava_fast.data.formats._rows import record_of
from tinyllava_fast.data.progress import Progress
from tinyllava_fast.data.record import FaultError, Record
from tinyllava_fast.data.records import Refused, read_refusing
from tinyllava_fast.data.tokens import tokenized
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.data.workers import chunks, in_order
from tinyllava_fast.errors import DataError
from tinyllava_fast.hardware import cores
from tinyllava_fast.log import log
from tinyllava_fast.pace import Pace
from tinyllava_fast.prepare.pictures import ROW, look, near_groups, rows_of
from tinyllava_fast.prepare.sources import LookedAt

SHOWN = 10
"""Records that are named where a set shares something with an evaluation set."""
_PART = 256
_MANY = 512  # images for which processes repay
_LOOKERS = 4  # threads that read files in each process
_MIX = np.uint64(0x9E3779B97F4A7C15)


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
class Shared:
    """What a set and an evaluation set have in common; records, each counted once. first: some of them, named."""

    file: str
    questions: int = 0
    """Entries of the evaluation set."""
    same_image: int = 0
    near_image: int = 0
    same_question: int = 0
    both: int = 0
    """The same question about the same or nearly the same image."""
    first: list[str] = field(default_factory=list)


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
        self.texts.append(_text_digest(repr((record.turns, record.system))))
        self.questions.extend(_text_digest(plain(question)) for question, _ in record.turns)
        self.mentions.extend(_text_digest(image) for image in record.images)


def plain(question: str) -> str:
    """Return a question as it is compared: without markers, case and the kind of white space.

    >>> plain("<image>\\nWhat  IS it?")
    'what is it?'
    """
    return " ".join(question.replace(IMAGE_TOKEN, " ").casefold().split())


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
    for one in against:
        found.shared.append(_compare(source, one, rows, number, images, columns))
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
    mixed = np.concatenate([[np.uint64(0)], np.cumsum((ids ^ _MIX) * (2 * place.astype(np.uint64) + np.uint64(1)))])
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
        usable = lengths <= fit.limits.tokens
        found.counts["samples longer than a pack may hold"] = int((~usable).sum())
        needs = (lengths[usable], views[usable], np.diff(segments)[usable])
        packs = fit.packs(*needs)
        found.counts["packs of an epoch"] = packs
        found.shares["of the packs is filled"] = float(needs[0].sum() / max(packs * fit.batch.tokens, 1))
    store.let_go()


@dataclass(frozen=True)
class Against:
    """An evaluation set. asked: of each entry the digest of its plain question, and the number of its image's row.

    That is -1 without an image. rows: [n] of ROW.
    """

    file: str
    asked: np.ndarray
    rows: np.ndarray


def read_against(path: str, folder: str | None = None) -> Against:
    """Read an evaluation set: records in any form, or lines of {question or text, image}. DataError if it has none.

    folder: of its image paths; None: that of the file.
    """
    files = find_files(Path(path))
    names: dict[str, int] = {}
    asked: list[tuple[int, int]] = []
    for file in files.paths:
        for row in files.format.rows(file, files.base, lambda _: None):
            if not isinstance(row, Row) or (record := _question_of(row)) is None:
                continue
            image = names.setdefault(record.images[0], len(names)) if record.images else -1
            asked += [(_text_digest(plain(question)), image) for question, _ in record.turns]
    if not asked:
        raise DataError(f"{path}: holds no questions; expected records, or objects with 'question' and 'image'")
    looked = (look(name, folder or str(files.base), files.base) for name in names)
    return Against(path, np.array(asked, [("text", "<u8"), ("image", "<i8")]), rows_of([np.array([r]) for r in looked]))


def _question_of(row: Row) -> Record | None:
    """Return an entry of an evaluation set as a record; the answer, which may have many forms, does not matter."""
    values = row.values
    if isinstance(values, dict) and not any(name in values for name in ("conversations", "messages")):
        question = values.get("question", values.get("text", values.get("prompt")))
        values = {"image": values.get("image", values.get("images")), "question": question, "answer": "-"}
    try:
        return record_of(0, replace(row, values=values))
    except FaultError:
        return None


def _compare(
    source: LookedAt, other: Against, rows: np.ndarray, number: np.ndarray, images: np.ndarray, columns: _Columns
) -> Shared:
    owners = np.repeat(np.arange(len(images)), images)
    asks = np.repeat(np.arange(len(images)), np.frombuffer(columns.turns, np.int32))
    questions = np.frombuffer(columns.questions, np.uint64)
    theirs = other.rows[other.rows["width"] > 0]
    same = np.isin(rows["content"], theirs["content"]) & (rows["width"] > 0)
    near = _looks_like(rows, theirs) | same
    hits = {name: np.zeros(len(images), bool) for name in ("same", "near", "asked", "both")}
    hits["same"][owners[same[number]]] = True
    hits["near"][owners[near[number]]] = True
    hits["asked"][asks[np.isin(questions, other.asked["text"])]] = True
    hits["both"] = hits["near"] & _asked_of_alike(other, rows, number, images, columns, near)
    same_image, near_image, same_question, both = (int(hits[name].sum()) for name in hits)
    told = Shared(other.file, len(other.asked), same_image, near_image, same_question, both)
    wanted = set(np.flatnonzero(hits["both"])[:SHOWN].tolist()) or set(np.flatnonzero(hits["near"])[:SHOWN].tolist())
    if wanted:
        last = max(wanted)
        usable = (record for record in read_refusing(source.data.records) if isinstance(record, Record))
        told.first = [r.where for at, r in zip(range(last + 1), usable, strict=False) if at in wanted]
    return told


def _looks_like(rows: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return which images look like one of the others, [n] bool."""
    groups = near_groups(np.concatenate([theirs, rows]))
    found = np.isin(groups[len(theirs) :], groups[: len(theirs)])
    return found & (rows["width"] > 0)


def _asked_of_alike(
    other: Against, rows: np.ndarray, number: np.ndarray, images: np.ndarray, columns: _Columns, near: np.ndarray
) -> np.ndarray:
    """Return which records ask a question about an image that the other set asks about one like it."""
    groups = near_groups(np.concatenate([other.rows, rows]))
    with_image = other.asked[other.asked["image"] >= 0]
    pairs = with_image["text"] ^ (groups[with_image["image"]].astype(np.uint64) * _MIX)
    starts = np.concatenate([[0], np.cumsum(images)])
    turns = np.concatenate([[0], np.cumsum(np.frombuffer(columns.turns, np.int32))])
    questions = np.frombuffer(columns.questions, np.uint64)
    found = np.zeros(len(images), bool)
    for index in np.unique(np.repeat(np.arange(len(images)), images)[near[number]]):
        shown = groups[len(other.rows) + number[starts[index] : starts[index + 1]]].astype(np.uint64) * _MIX
        texts = questions[turns[index] : turns[index + 1]]
        found[index] = bool(np.isin(texts[:, None] ^ shown[None], pairs).any())
    return found


def _text_digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
