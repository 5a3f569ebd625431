"""The answers of a run: one JSON object a line, keyed by question, so that a killed evaluation goes on where it was.

{"run": {...}} says what produced the answers below it; answers of another model, benchmark or setting stay in the file
and are never mixed in, nor those to a question that has changed since: its prompt, what its pictures show, or
their order. Each rank of torchrun appends to its own.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import cast

from tinyllava_fast.errors import DataError, writing
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.eval.types import AnswerRecord
from tinyllava_fast.fields import Fields, decode, is_text
from tinyllava_fast.log import log

CANNED = "canned"


class AnswerLog:
    """Appends answers to a JSONL file and knows those already in the folder, whichever rank gave them.

    folder: where answers.jsonl (rank 0), answers.1.jsonl, ... are. run: JSON-able facts that identify the evaluation.
    asked: question key -> what ``asked`` gives for it now; an answer to another question, or to one that was asked
    otherwise, does not count. records: question key -> record. seconds: time spent answering, over all sessions, of the
    slowest rank. As a context manager it opens its rank's file and starts a session.
    Raises DataError for a file that holds anything else, UserError where answers cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, object], asked: Mapping[str, str], rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / (f"answers.{rank}.jsonl" if rank else "answers.jsonl")
        self.run = run
        self.records: dict[str, AnswerRecord] = {}
        self.asked = dict(asked)
        self.seconds = 0.0
        self._headed = False  # its own file ends with answers of this run
        for path in sorted(folder.glob("answers*.jsonl")):
            if re.fullmatch(r"answers(\.\d+)?\.jsonl", path.name):
                self._read(path)

    @property
    def texts(self) -> dict[str, str]:
        """Question key -> answer."""
        return {key: record["answer"] for key, record in self.records.items()}

    def __enter__(self) -> AnswerLog:
        self._started = time.monotonic()
        self._before = self.seconds
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with writing(self.path):
                self._file.close()
            return
        with suppress(OSError):  # on a full disk closing fails, too; the first error is the one to tell
            self._file.close()

    def add(
        self, key: str, answer: str, *, finish: str, tokens: int = 0, latency: float | None = None, why: str = ""
    ) -> None:
        """Record one answer; it is on its way to disk when this returns.

        finish: as in infer.types.Answer, or CANNED. latency: seconds in the engine, None for a copied answer. why: what
        was wrong with a question that could not be put to the model.
        """
        elapsed = time.monotonic() - self._started
        self.seconds = self._before + elapsed
        record: AnswerRecord = {
            "key": key,
            "answer": answer,
            "tokens": tokens,
            "finish": finish,
            "latency": None if latency is None else round(latency, 6),
            "seconds": round(elapsed, 6),
            "asked": self.asked[key],
        }
        if why:
            record["why"] = why
        self.records[key] = record
        with writing(self.path):
            if not os.fstat(self._file.fileno()).st_nlink:
                self._write_anew()
            self._write(record)

    def _open(self) -> None:
        self._file = self.path.open("a", encoding="utf-8")
        if not self._headed:
            self._write({"run": self.run})
        self._headed = True
        self._write({"session": len(self.records)})

    def _write_anew(self) -> None:
        """The file, or its folder, was removed while it was open: what is written to it now would be lost with it."""
        log.warning("%s was removed during the run; the answers so far are written again", self.path)
        self._file.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._headed = False
        self._open()
        for record in list(self.records.values())[:-1]:
            self._write(record)

    def _write(self, record: Mapping[str, object]) -> None:
        self._file.write(line_of(record))
        self._file.flush()

    def _read(self, path: Path) -> None:
        sessions: list[float] = []
        changed: set[str] = set()
        ours: bool | None = None  # whether the lines that follow are of this run
        known = False  # whether some are
        for number, line in enumerate(_complete_lines(path, mend=path == self.path), 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = Fields.of(decode(line.decode(), where), where)
                if "run" in record:
                    ours = record.values["run"] == self.run
                    known = known or ours
                    if path == self.path:
                        self._headed = ours
                elif ours is None:
                    raise DataError("the line that says what run it is of is missing")
                elif not ours:
                    continue
                elif "session" in record:
                    sessions.append(0.0)
                else:
                    sessions[-1] = max(sessions[-1], record.number("seconds"))
                    self._take(record, changed)
            except (DataError, UnicodeDecodeError, IndexError) as error:
                why = str(error).removeprefix(f"{where}: ")
                raise DataError(
                    f"{where}: not a record of an evaluation ({why}); remove the line, or delete the file to evaluate "
                    "from the start"
                ) from None
        self.seconds = max(self.seconds, sum(sessions))
        if path == self.path and not known and ours is not None:
            log.info("%s holds answers of another run; they stay there, and are not used", path)
        if changed := changed - self.records.keys():
            log.warning(
                "%s: %d of its answers are to another prompt or other pictures than now, or do not say to which; "
                "these questions are asked again",
                path,
                len(changed),
            )

    def _take(self, record: Fields, changed: set[str]) -> None:
        """Keep a record that answers what is asked now."""
        key = record.text("key", empty=True)
        for name in ("answer", "finish"):
            record.text(name, empty=True)
        record.integer("tokens", least=0)
        record.number("latency", None, least=0)
        record.text("why", "")
        if self.asked.get(key) == record.text("asked"):
            self.records[key] = cast(AnswerRecord, {"latency": None, **record.values})
        elif key in self.asked:
            changed.add(key)


def asked(question: Question, pictures: Sequence[str]) -> str:
    """Sixteen digits that change with the prompt and with its pictures. pictures: what stands for the content of each,
    in their order."""
    text = json.dumps([question.prompt, question.canned, *pictures])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def line_of(record: Mapping[str, object]) -> str:
    """Return a line of JSONL; see ``to_json``."""
    return to_json(record) + "\n"


def to_json(value: object, indent: int | None = None) -> str:
    """Return JSON, readable where it can be, escaped where a text cannot be written as UTF-8."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if is_text(text) else json.dumps(value, indent=indent)


def _complete_lines(path: Path, *, mend: bool) -> list[bytes]:
    """The file's lines; a last line without its newline was cut off by a kill. mend: remove it from the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; answers are kept in this file, mend or remove it"
        ) from None
    end = data.rfind(b"\n") + 1
    if mend and end < len(data):
        with writing(path), path.open("r+b") as file:
            file.truncate(end)
    return data[:end].removeprefix(codecs.BOM_UTF8).splitlines()
