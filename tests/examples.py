"""The plugins that docs/plugins.md shows, as files."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"


def write_example(folder: Path, name: str) -> Path:
    """Write the example that begins with its file's name, such as "mine.py", into the folder."""
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    path = folder / name
    path.write_text(next(block for block in blocks if block.startswith(f'"""{name}:')), encoding="utf-8")
    return path
