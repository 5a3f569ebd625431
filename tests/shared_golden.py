"""The folder of golden files that are not in the repository, and how a test asks for one of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "TLF_SHARED_GOLDEN"
ROOT = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "shared" / "golden")


def shared_golden(path: str) -> Path:
    """Return a file or folder of the shared golden files; skip the test where it does not lie there."""
    found = ROOT / path
    if not found.exists():
        pytest.skip(f"{found} does not exist: not ours to ship, or too large; {VARIABLE} says where it lies")
    return found
