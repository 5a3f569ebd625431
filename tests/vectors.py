"""The golden files: those of the repository, and those that may lie beside it (tests/golden/README.md)."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
VARIABLE = "TLF_SHARED_GOLDEN"
SHARED = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "shared" / "golden")


def shared(path: str) -> Path:
    """Return a file or folder of the golden files beside the repository; skip the test where it does not lie there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} does not exist: not ours to ship, or too large; {VARIABLE} says where it lies")
    return found


def text(file: Path) -> str:
    """Return a file's text, whether it is stored gzipped or not."""
    if file.exists():
        return file.read_text(encoding="utf-8")
    return gzip.decompress(Path(f"{file}.gz").read_bytes()).decode()


def load(file: Path) -> Any:
    """Return the value of a .json file, or the list of a .jsonl file's, stored gzipped or not."""
    content = text(file)
    return [json.loads(line) for line in content.splitlines()] if file.suffix == ".jsonl" else json.loads(content)
