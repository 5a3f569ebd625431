"""The answers file: one JSON object a line, keyed by question id, so that a killed evaluation goes on where it was.

A session begins with {"run": {...}}, which says what produced the answers below it; answers of another model, benchmark
or setting are never mixed in.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyllava_fast.errors import DataError
from tinyllava_fast.infer.types import Answer
from tinyllava_fast.log import log


class AnswerLog:
    """Appends answers to a JSONL file and knows those already there.

    run: JSON-able facts that identify the evaluation. A file that another run wrote is replaced.
    texts: question id -> answer. seconds: time spent answering, over all sessions. As a context manager it
    opens the file and starts a session.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        self.run = run
        self.texts: dict[str, str] = {}
        self.seconds = 0.0
        self._read()

    def __enter__(self) -> AnswerLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._started = time.monotonic()
        self._before = self.seconds
        if not self.texts:
            self._write({"run": self.run})
        self._write({"session": len(self.texts)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Record one answer; it is on its way to disk when this returns."""
        self.texts[answer.id] = answer.text
        elapsed = time.monotonic() - self._started
        self.seconds = self._before + elapsed
        self._write(
            {
                "id": answer.id,
                "answer": answer.text,
                "tokens": len(answer.tokens),
                "finish": answer.finish,
                "seconds": round(elapsed, 6),
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self) -> None:
        if not self.path.exists():
            return
        sessions: list[float] = []
        whole = _complete_lines(self.path)
        for number, line in enumerate(whole, 1):
            try:
                record = json.loads(line)
                if "run" in record:
                    if record["run"] != self.run:
                        log.info("%s holds answers of another run; starting over", self.path)
                        self.texts.clear()
                        self.path.unlink()
                        return
                elif "session" in record:
                    sessions.append(0.0)
                else:
                    self.texts[record["id"]] = record["answer"]
                    sessions[-1] = max(sessions[-1], record["seconds"])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(
                    f"{self.path}, line {number}: not a record of an evaluation ({error!r}); "
                    "delete the file to evaluate from the start"
                ) from None
        self.seconds = sum(sessions)
        if self.texts:
            log.info("%s: %d answers are already there", self.path, len(self.texts))


def _complete_lines(path: Path) -> list[bytes]:
    """The file's lines; a last line without its newline was cut off by a kill and is removed from the file."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return data[:end].splitlines()


def read_answers(path: Path) -> dict[str, str]:
    """Question id -> answer of a finished answers file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {r["id"]: r["answer"] for r in records if "id" in r}
