"""Reading the committed vectors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "benchmarks"


def rows(path: str) -> list[dict[str, Any]]:
    """Objects of a .jsonl or .jsonl.gz file."""
    text = gzip.open(GOLDEN / path, "rt").read() if path.endswith(".gz") else (GOLDEN / path).read_text()
    return [json.loads(line) for line in text.splitlines()]


def value(path: str) -> Any:
    """Content of a .json file."""
    return json.loads((GOLDEN / path).read_text())


def unpack(path: str, to: Path) -> Path:
    """A .gz file's content as a file of its own."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(gzip.decompress((GOLDEN / path).read_bytes()))
    return to


def text(path: str) -> str:
    """A file's text, whether it is stored gzipped or not."""
    file = GOLDEN / path
    return file.read_text() if file.exists() else gzip.decompress((GOLDEN / f"{path}.gz").read_bytes()).decode()


def load(path: str) -> Any:
    """The value of a .json file, or the list of a .jsonl file's, stored gzipped or not."""
    content = text(path)
    return [json.loads(line) for line in content.splitlines()] if path.endswith(".jsonl") else json.loads(content)
