"""Three sources of different kinds in three formats: coloured pictures, digits, and text alone."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.train.conftest import prepare

DIGITS = ("###### #### #### ######", "  #  ##   #   #  ###  ", "### ##  # ### #   ####")  # 0, 1, 2 without their grid


def picture_of(digit: int, rng: np.random.Generator) -> bytes:
    """A digit as 8 x 8 grey levels, a little noisy."""
    ink = np.frombuffer(DIGITS[digit].ljust(64).encode(), np.uint8).reshape(8, 8) == ord("#")
    levels = ink * 200 + rng.integers(0, 40, (8, 8))
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_digits(path: Path, count: int) -> None:
    """A WebDataset shard."""
    rng = np.random.default_rng(1)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            digit = number % len(DIGITS)
            files = {"png": picture_of(digit, rng), "question.txt": b"which digit ?", "answer.txt": b"%d" % digit}
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{number:04}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_words(path: Path, count: int) -> None:
    """Lines of OpenAI's messages, some with a system text."""
    lines = []
    for number in range(count):
        system = [{"role": "system", "content": "be brief ."}] if number % 3 == 0 else []
        said = [{"role": "user", "content": f"say {number} ."}, {"role": "assistant", "content": f"{number} ."}]
        lines.append(json.dumps({"messages": [*system, *said]}))
    path.write_text("\n".join(lines))


def write_mix(folder: Path, *, stages: int = 1, **changes: Any) -> Path:
    """Write the sources and a run whose stage "finetune", the last of one or two, mixes them; return its YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    write_digits(folder / "digits", 30)
    write_words(folder / "words", 20)
    colours = {"path": str(folder / "records.json"), "name": "colours", "image_folder": str(folder / "images")}
    paths = [colours, {"path": str(folder / "digits"), "turns": "independent"}, {"path": str(folder / "words")}]
    sources = [{**path, "weight": weight} for path, weight in zip(paths, (3, 2, 1), strict=True)]
    path = prepare(folder, **{"stages__finetune__data": {"template": "llama", "sources": sources}, **changes})
    run = yaml.safe_load(path.read_text())
    run["stages"] = run["stages"][-stages:]
    path.write_text(yaml.safe_dump(run))
    return path
