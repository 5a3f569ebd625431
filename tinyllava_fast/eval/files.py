"""Finding and reading the official files of a benchmark, with errors that say what, where and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.errors import DataError
from tinyllava_fast.fields import Fields, read_jsonl

EVAL_ZIP = "LLaVA's eval.zip (docs/Evaluation.md of LLaVA)"
"""Source of the question files of most benchmarks."""


class Finder:
    """Looks for a benchmark's files below a root in every documented place.

    name: the benchmark, for messages. root: the folder of all benchmarks or the benchmark's own. folders: names of
    its own folder below the root. source: where a user gets the files, a sentence fragment.
    """

    def __init__(self, name: str, root: Path, folders: Sequence[str], source: str) -> None:
        if not is_folder(root):
            raise DataError(f"{name}: there is no folder {root}; --data names the folder that holds the benchmarks")
        self.name = name
        self.source = source
        self.bases = [base for folder in folders if is_folder(base := root / folder)] + [root]

    def file(self, *variants: str, source: str = "") -> Path:
        """The first of the relative paths that is a file. Raises DataError if none is."""
        return self._found(variants, self.optional(*variants), "file", source)

    def folder(self, *variants: str, source: str = "") -> Path:
        """The first of the relative paths that is a folder; "." is the benchmark's own. Raises DataError if none is."""
        found = next((p for p in self._candidates(variants) if is_folder(p)), None)
        return self._found(variants, found, "folder", source)

    def optional(self, *variants: str) -> Path | None:
        """The first of the relative paths that is a file, or None."""
        return next((p for p in self._candidates(variants) if is_file(p)), None)

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


def is_file(path: Path) -> bool:
    """Return True if it leads to a file; False for a name that is too long, or in a folder that may not be entered."""
    return _holds(path.is_file)


def is_folder(path: Path) -> bool:
    """Return True if it leads to a folder; as for ``is_file``."""
    return _holds(path.is_dir)


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except OSError:
        return False


class UniqueIds:
    """Remembers where each id of a file stood and refuses one that comes again; 1 and "1" are the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}

    def add(self, id: str | int, line: int) -> None:
        """Note an id. DataError naming both lines if it was there before."""
        if str(id) in self.lines:
            raise DataError(
                f"{self.path}, line {line}: {id!r} stands in line {self.lines[str(id)]} already; remove one of them"
            )
        self.lines[str(id)] = line


@dataclass(frozen=True)
class Asked:
    """A line of a question file in LLaVA's format."""

    line: int
    id: str | int
    image: str
    """A path below the image folder; an absolute one and one with ".." are taken as they are."""
    text: str
    """The prompt."""
    fields: Fields
    """All fields of the line."""

    @property
    def where(self) -> str:
        """Return the name of the line in an error."""
        return self.fields.where


def llava_questions(path: Path, *, unique: bool = True) -> Iterator[Asked]:
    """The lines of a question file in LLaVA's format: question_id, image, text, perhaps category.

    unique: refuse an id that comes twice. Raises DataError naming the line and the field.
    """
    ids = UniqueIds(path)
    for line, fields in read_jsonl(path):
        id = fields.identifier("question_id")
        if unique:
            ids.add(id, line)
        yield Asked(line, id, fields.path("image"), fields.text("text"), fields)
