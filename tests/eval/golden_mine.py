"""Reading tests/golden/benchmarks: JSON and JSONL, some of it gzipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "golden" / "benchmarks"


def text(name: str) -> str:
    path = FOLDER / name
    return path.read_text() if path.exists() else gzip.decompress((FOLDER / f"{name}.gz").read_bytes()).decode()


def load(name: str) -> Any:
    """A JSON file's value, or the list of a JSONL file's."""
    content = text(name)
    return [json.loads(line) for line in content.splitlines()] if name.endswith(".jsonl") else json.loads(content)
