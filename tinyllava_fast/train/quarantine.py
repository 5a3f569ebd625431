"""The list of records that a run leaves out (data.on_error: quarantine): quarantine.jsonl, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.errors import writing
from tinyllava_fast.files import write_file
from tinyllava_fast.log import log

FILE = "quarantine.jsonl"


class Quarantine:
    """The list of one stage, beside those of the stages before it. Written anew, at once, whenever it grows."""

    def __init__(self, folder: Path, stage: str, dataset: PackedDataset) -> None:
        self.path, self._stage = folder / FILE, stage
        self._known = set(dataset.skipped)
        self._lines = [
            {"source": name, "file": fault.path, "record": fault.where, "kind": fault.kind, "reason": fault.what}
            for name, source in zip(dataset.names, dataset.sources, strict=True)
            for fault in source.faults
        ]
        self._written = -1

    def write(self, reasons: Iterable[str]) -> None:
        """Write the list if it has grown. reasons: of all records left out so far, on the way, too."""
        for reason in reasons:
            if reason not in self._known:
                self._known.add(reason)
                self._lines.append({"kind": "image", "reason": reason})
        if len(self._lines) == self._written:
            return
        self._written = len(self._lines)
        others = [line for line in self._before() if line.get("stage") != self._stage]
        lines = [*others, *({"stage": self._stage, **line} for line in self._lines)]
        with writing(self.path):
            write_file(self.path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())

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
