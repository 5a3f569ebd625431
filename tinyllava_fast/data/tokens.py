"""The records of a source as tokens: made once, by all cores, and kept for every process and run that asks again."""

from __future__ import annotations

import gc
import hashlib
import json
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data import shelf
from tinyllava_fast.data.columns import ColumnWriter
from tinyllava_fast.data.formats._base import RecordFormat, find_files
from tinyllava_fast.data.progress import Progress
from tinyllava_fast.data.records import Record, Refused, check_turns, encode_each, read_refusing, unreadable
from tinyllava_fast.data.store import DTYPES, Fault, Sample, SampleStore, SampleWriter, columns_of
from tinyllava_fast.data.templates.base import TEMPLATES, MaskMode, Template, TurnMode
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.data.workers import chunks, in_order
from tinyllava_fast.errors import DataError, UserError
from tinyllava_fast.hardware import cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # records tokenized in one call
_LEAST_BYTES = 8 << 20  # of a file for which processes repay: each costs tens of milliseconds to start
_CODE = (
    *("record*.py", "tokens.py", "store.py", "collate.py", "types.py", "pictures.py"),
    *("formats/*.py", "templates/*.py"),
)
"""What decides the columns."""


@dataclass(frozen=True)
class Encoder:
    """Turns records of a source into columns of samples. strict: a record that cannot be used is an error."""

    path: str
    template: Template
    tokenizer: PreTrainedTokenizerBase
    turns: TurnMode
    masks: MaskMode
    turns_per_sample: int
    strict: bool

    def __call__(self, records: list[Record | Refused]) -> dict[str, np.ndarray]:
        """Check and encode some records. Refused for the first one that cannot be used, if ``strict``."""
        usable: list[Record] = []
        faults: list[Fault] = []
        for record in records:
            try:
                usable.append(self._checked(record))
            except Refused as refused:
                self._leave_out(refused, faults)
        pieces = [piece for record in usable for piece in pieces_of(record, self.turns_per_sample)]
        encoded = encode_each(self.path, pieces, self.template, self.tokenizer, self.turns, self.masks)
        samples: list[Sample] = []
        for piece, found in zip(pieces, encoded, strict=True):
            if isinstance(found, Refused):
                self._leave_out(found, faults)
            else:
                samples.append(Sample(found, piece.id, piece.images, piece.index, piece.line, piece.place))
        return columns_of(samples, faults)

    def _checked(self, record: Record | Refused) -> Record:
        if isinstance(record, Refused):
            raise record
        check_turns(self.path, record, self.template)
        return record

    def _leave_out(self, refused: Refused, faults: list[Fault]) -> None:
        if self.strict:
            raise refused
        faults.append(Fault(refused.where, refused.what, refused.kind))


def pieces_of(record: Record, most: int) -> list[Record]:
    """Return the record, or parts of at most so many turns that begin with the images so far. most: 0 for no limit."""
    if not most or len(record.turns) <= most:
        return [record]
    pieces = []
    before = 0  # markers in earlier turns
    for start in range(0, len(record.turns), most):
        turns = list(record.turns[start : start + most])
        question, answer = turns[0]
        if record.interleaved:
            turns[0] = (f"{IMAGE_TOKEN}\n" * before + question, answer)
            before += sum(q.count(IMAGE_TOKEN) for q, _ in record.turns[start : start + most])
        elif start and IMAGE_TOKEN not in question and IMAGE_TOKEN in record.turns[0][0]:
            turns[0] = (f"{IMAGE_TOKEN}\n{question}", answer)
        pieces.append(replace(record, turns=tuple(turns)))
    return pieces


def encoder_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return what makes samples of a source's records. UserError for settings that do not go together."""
    if data.turns_per_sample and data.turns != "independent":
        raise UserError(
            "data.turns_per_sample splits records between turns, which only data.turns=independent allows; "
            f"got turns={data.turns!r}, turns_per_sample={data.turns_per_sample}"
        )
    template = TEMPLATES.get(data.template, "data.template")
    template.check(tokenizer, data.masks)
    strict = data.on_error == "fail"
    return Encoder(data.records, template, tokenizer, data.turns, data.masks, data.turns_per_sample, strict)


def tokenized(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> SampleStore:
    """Return the samples of a source, tokenized now or at an earlier start; where its images lie does not matter.

    DataError for a file or, with data.on_error=fail, a record that cannot be used, UserError for settings that do not
    go together.
    """
    encoder, content = encoder_of(data, tokenizer), _content(data.records)
    make, key = partial(_make, encoder, content), _key(encoder, content)
    store = SampleStore(shelf.take(key, DTYPES, make, data.records), key)
    if encoder.strict and (faults := store.faults()):  # made by a run that left them out
        raise Refused(faults[0].what, data.records, faults[0].where, faults[0].kind)
    return store


def _make(encoder: Encoder, content: _Content, columns: ColumnWriter) -> None:
    """Tokenize all records, by all cores if there are many."""
    processes = cores() if content.size >= _LEAST_BYTES and cores() > 1 else 0
    progress = Progress(encoder.path, content.size, "tokenized")
    writer = SampleWriter(columns)
    with no_garbage_collection():
        records = progress.counted(chunks(read_refusing(encoder.path, progress.opened), _CHUNK))
        for part in in_order(encoder, records, processes):
            writer.append(part)
            progress.done()
    if _stamp(content.files) != (content.size, content.changed):
        raise DataError(f"{encoder.path}: the file changed while it was read; start again when it is complete")
    progress.say_last()


def _key(encoder: Encoder, content: _Content) -> str:
    """Return a digest of all that the samples depend on: the records, the settings, the tokenizer and our code."""
    tokenizer, template = encoder.tokenizer, encoder.template
    parts = [
        content.digest,
        (encoder.turns, encoder.masks, encoder.turns_per_sample),
        (type(template).__qualname__, repr(template)),
        _code(template, content.format),
        (tokenizers.__version__, type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str()),
        (sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items()), tokenizer.chat_template),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:48]


@dataclass(frozen=True)
class _Content:
    """The files of a source: a digest of what they hold, their size and time of change (ns) before they were read."""

    format: RecordFormat
    files: list[Path]
    digest: str
    size: int
    changed: int


def _content(path: str) -> _Content:
    """Read the records once, or what tells that they have not changed. DataError if they cannot be read.

    Tables and archives hold the images, too: of them only name, size and time of change are read.
    """
    digest = hashlib.sha256()
    source = find_files(Path(path))
    files = [file for path in source.paths for file in source.format.files(path)]
    try:
        size, changed = _stamp(files)
        for file in files:
            if source.format.holds_images:
                facts = file.stat()
                digest.update(repr((str(file.relative_to(source.base)), facts.st_size, facts.st_mtime_ns)).encode())
                continue
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return _Content(source.format, files, digest.hexdigest(), size, changed)


def _code(*parts: Template | RecordFormat) -> list[str]:
    """Return digests of the code that makes samples, that of the template and of the format included."""
    folder = Path(__file__).parent
    files = [file for pattern in _CODE for file in sorted(folder.glob(pattern))]
    for kind in (kind for part in parts for kind in type(part).__mro__ if kind is not object):
        named = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if named is None:  # typed in somewhere: nothing tells whether it is the same the next time
            return [secrets.token_hex()]
        files.append(Path(named))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in dict.fromkeys(files)]


def _stamp(files: Sequence[Path]) -> tuple[int, int]:
    facts = [file.stat() for file in files]
    return sum(fact.st_size for fact in facts), max((fact.st_mtime_ns for fact in facts), default=0)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Hold back garbage collection: tokenizing makes many lists and no cycles, and collections doubled its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
