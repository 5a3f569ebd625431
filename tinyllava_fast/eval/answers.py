"""The answers of a run: one JSON object a line, keyed by question, so that a killed evaluation goes on where it was.

A file begins with {"run": {...}}, which says what produced the answers below it; answers of another model, benchmark
or setting are never mixed in, nor those to a question that has changed since. Each rank of torchrun appends to its own.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyllava_fast.errors import DataError
from tinyllava_fast.eval.benchmarks.base import Question
from tinyllava_fast.log import log

UNREADABLE = "unreadable image"
CANNED = "canned"


class AnswerLog:
    """Appends answers to a JSONL file and knows those already in the folder, whichever rank gave them.

    folder: where answers.jsonl (rank 0), answers.1.jsonl, ... are. run: JSON-able facts that identify the evaluation.
    questions: an answer to a question that is not among them, or that was asked otherwise, does not count.
    records: question key -> record. seconds: time spent answering, over all sessions, of the slowest rank.
    As a context manager it opens its rank's file and starts a session.
    """

    def __init__(self, folder: Path, run: dict[str, Any], questions: Iterable[Question], rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / (f"answers.{rank}.jsonl" if rank else "answers.jsonl")
        self.run = run
        self.records: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self._asked = {q.key: asked(q) for q in questions}
        self._fresh = True
        for path in sorted(folder.glob("answers*.jsonl")):
            self._read(path)

    @property
    def texts(self) -> dict[str, str]:
        """Question key -> answer."""
        return {key: record["answer"] for key, record in self.records.items()}

    def __enter__(self) -> AnswerLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w" if self._fresh else "a", encoding="utf-8")
        self._started = time.monotonic()
        self._before = self.seconds
        if self._fresh:
            self._write({"run": self.run})
        self._write({"session": len(self.records)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, key: str, answer: str, *, finish: str, tokens: int = 0, latency: float | None = None) -> None:
        """Record one answer; it is on its way to disk when this returns.

        finish: "eos", "length", UNREADABLE or CANNED. latency: seconds in the engine, None for a copied answer.
        """
        elapsed = time.monotonic() - self._started
        self.seconds = self._before + elapsed
        record = {
            "key": key,
            "answer": answer,
            "tokens": tokens,
            "finish": finish,
            "latency": None if latency is None else round(latency, 6),
            "seconds": round(elapsed, 6),
            "asked": self._asked[key],
        }
        self.records[key] = record
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        sessions: list[float] = []
        changed = 0
        for number, line in enumerate(_complete_lines(path, mend=path == self.path), 1):
            try:
                record = json.loads(line)
                if "run" in record:
                    if record["run"] != self.run:
                        if path == self.path:
                            log.info("%s holds answers of another run; starting over", path)
                        return
                    self._fresh = self._fresh and path != self.path
                elif "session" in record:
                    sessions.append(0.0)
                else:
                    sessions[-1] = max(sessions[-1], record["seconds"])
                    same = self._asked.get(record["key"], record["asked"]) == record["asked"]
                    changed += not same
                    if same and isinstance(record["answer"], str):
                        self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(
                    f"{path}, line {number}: not a record of an evaluation ({error!r}); "
                    "delete the file to evaluate from the start"
                ) from None
        self.seconds = max(self.seconds, sum(sessions))
        if changed:
            log.warning("%s: %d questions have changed since; they are asked again", path, changed)


def asked(question: Question) -> str:
    """Twelve digits that change with the prompt or the images' names."""
    text = "\0".join((question.prompt, *(image.name for image in question.images)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _complete_lines(path: Path, *, mend: bool) -> list[bytes]:
    """The file's lines; a last line without its newline was cut off by a kill. mend: remove it from the file."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if mend and end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return data[:end].splitlines()
