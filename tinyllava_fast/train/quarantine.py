"""The list of records that a run leaves out (data.on_error: quarantine): quarantine.jsonl, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tinyllava_fast.data.packs import PackSource
from tinyllava_fast.errors import writing
from tinyllava_fast.files import write_file
from tinyllava_fast.log import log

FILE = "quarantine.jsonl"


class Quarantine:
    """The list of one stage, beside those of the stages before it. Written anew, at once, whenever it grows."""

    def __init__(self, folder: Path, stage: str, dataset: PackSource) -> None:
        self.path, self._stage = folder / FILE, stage
        self._dataset, self._known = dataset, set(dataset.skipped)
        self._lines = [self._line(reason) for reason in dataset.skipped]
        self._others: list[dict[str, str]] | None = None
        """Lines of other stages, once the file has been read."""
        self._earlier: dict[str, dict[str, str]] = {}
        """Of a run that goes on: the lines that it wrote before, by their messages."""
        self._written = -1

    def write(self, reasons: Iterable[str]) -> None:
        """Write the list if it has grown. reasons: of all records left out so far, on the way, too."""
        if self._others is None:
            before = self._before()
            self._others = [line for line in before if line.get("stage") != self._stage]
            self._earlier = {_message(line): line for line in before if line.get("stage") == self._stage}
        for reason in reasons:
            if reason not in self._known:
                self._known.add(reason)
                self._lines.append(self._line(reason))
        if len(self._lines) == self._written:
            return
        self._written = len(self._lines)
        lines = [*self._others, *({"stage": self._stage, **line} for line in self._lines)]
        with writing(self.path):
            write_file(self.path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())

    def _line(self, reason: str) -> dict[str, str]:
        """Return the line of a record that is left out. reason: the whole message."""
        if reason not in self._dataset.faults:
            return self._earlier.get(reason) or {"kind": "image", "reason": reason}
        name, fault = self._dataset.faults[reason]
        where = {"source": name, "file": fault.path, "record": fault.where}
        return {**where, "kind": fault.kind, "reason": fault.what}

    def _before(self) -> list[dict[str, str]]:
        """Return the lines that are there, without those that are none; a warning tells of them."""
        try:
            text = self.path.read_bytes().decode(errors="replace")
        except OSError:
            return []
        found: list[dict[str, str]] = []
        bad = 0
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                found.append(entry)
            else:
                bad += 1
        if bad:
            log.warning("%s: %d damaged lines are left out of it", self.path, bad)
        return found


def _message(line: dict[str, str]) -> str:
    """Return the whole message of a line; see Refused."""
    reason = line.get("reason", "")
    return f"{line.get('file', '')}: {line['record']}: {reason}" if line.get("record") else reason
