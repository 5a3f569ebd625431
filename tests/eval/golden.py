"""Reading the vectors of the benchmarks: those of the repository, and those that lie beside it only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import vectors

GOLDEN = vectors.GOLDEN / "benchmarks"


def shared(path: str) -> Path:
    """Return a folder of benchmark vectors that are not ours to ship; skip the test where it does not lie there."""
    return vectors.shared(f"benchmarks/{path}")


def source(name: str, path: str) -> Path:
    """Return a folder of vectors: of the repository ("stored"), or as the official program was given it ("shared")."""
    return GOLDEN / path if name == "stored" else shared(path)


def text(path: str | Path) -> str:
    """Return a file's text, whether it is stored gzipped or not."""
    return vectors.text(GOLDEN / path)


def load(path: str | Path) -> Any:
    """Return the value of a .json file, or the list of a .jsonl file's, stored gzipped or not."""
    return vectors.load(GOLDEN / path)


def unpack(path: str | Path, to: Path) -> Path:
    """Write the text of a file, stored gzipped or not, as a file of its own."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text(path), encoding="utf-8")
    return to
