"""Finding and reading the official files of a benchmark, with errors that say what, where and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllava_fast.errors import DataError


class Finder:
    """Looks for a benchmark's files below a root in every documented place.

    name: the benchmark, for messages. root: the folder of all benchmarks or the benchmark's own. folders: names of
    its own folder below the root. source: where a user gets the files, a sentence fragment.
    """

    def __init__(self, name: str, root: Path, folders: Sequence[str], source: str) -> None:
        if not root.is_dir():
            raise DataError(f"{name}: there is no folder {root}; --data names the folder that holds the benchmarks")
        self.name = name
        self.source = source
        self.bases = [base for folder in folders if (base := root / folder).is_dir()] + [root]

    def file(self, *variants: str, source: str = "") -> Path:
        """The first of the relative paths that is a file. Raises DataError if none is."""
        return self._found(variants, self.optional(*variants), "file", source)

    def folder(self, *variants: str, source: str = "") -> Path:
        """The first of the relative paths that is a folder; "." is the benchmark's own. Raises DataError if none is."""
        found = next((p for p in self._candidates(variants) if p.is_dir()), None)
        return self._found(variants, found, "folder", source)

    def optional(self, *variants: str) -> Path | None:
        """The first of the relative paths that is a file, or None."""
        return next((p for p in self._candidates(variants) if p.is_file()), None)

    def _candidates(self, variants: Sequence[str]) -> list[Path]:
        return [base / variant for base in self.bases for variant in variants]

    def _found(self, variants: Sequence[str], path: Path | None, kind: str, source: str) -> Path:
        if path is not None:
            return path
        places = "\n  ".join(map(str, self._candidates(variants)))
        raise DataError(
            f"{self.name}: {Path(variants[0]).name} is missing. Looked for the {kind}\n  {places}\n"
            f"Get it from {source or self.source}"
        )


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file with one JSON object a line; blank lines are skipped. DataError if not."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: {type(record).__name__} instead of a JSON object")
            yield number, record


def read_json(path: Path) -> Any:
    """The content of a JSON file. DataError naming it if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); download it again") from None


def require(record: dict[str, Any], field: str, where: str) -> Any:
    """record[field]. DataError naming ``where`` ("file, line 3") and the fields that are there."""
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return record[field]


class UniqueIds:
    """Remembers where each id of a file stood and refuses one that comes again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Any, int] = {}

    def add(self, id: Any, line: int) -> None:
        """Note an id. DataError naming both lines if it was there before."""
        if id in self.lines:
            raise DataError(
                f"{self.path}, line {line}: {id!r} stands in line {self.lines[id]} already; remove one of them"
            )
        self.lines[id] = line


def llava_questions(path: Path, *, unique: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of a question file in LLaVA's format: question_id, image, text, perhaps category.

    unique: refuse an id that comes twice. Raises DataError naming the line and the field.
    """
    ids = UniqueIds(path)
    for number, record in read_jsonl(path):
        for field in ("question_id", "text"):
            require(record, field, f"{path}, line {number}")
        if unique:
            ids.add(record["question_id"], number)
        yield number, record
