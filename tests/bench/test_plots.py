"""Plots: what lies on an axis is drawn, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyllava_fast.bench import plots
from tinyllava_fast.bench.case import BOTH, FORWARD
from tinyllava_fast.errors import UserError


def row(op: str, place: float, direction: str = BOTH, **medians: float) -> dict[str, Any]:
    return {
        "op": op, "pass": direction, "axes": {"tokens": place}, "medians": medians,
        "peak_bytes": {name: None if name == "torch" else 1e6 * place for name in medians},
    }  # fmt: skip


RESULT = {
    "dtype": "bfloat16",
    "machine": {"device": "cpu", "threads": 2, "cpu": "Abacus", "torch": "2.13.0", "gpu": None},
    "rows": [
        row("splice", 64, torch=2e-3, ours=1e-3, once=1e-3),
        row("splice", 16, torch=1e-3, ours=4e-4),
        row("splice", 16, FORWARD, torch=1e-3, ours=4e-4),
        row("adamw", 16, torch=1e-3, ours=4e-4),
    ],
}


def test_curves_are_ascending_and_have_two_sizes() -> None:
    lines = plots.curves(RESULT, "splice")["tokens"]
    assert {name: [x for x, _ in points] for name, points in lines.items()} == {"torch": [16, 64], "ours": [16, 64]}
    assert plots.curves(RESULT, "adamw") == {}


def test_one_picture_an_op(tmp_path: Path) -> None:
    (path,) = plots.draw(RESULT, tmp_path / "docs")
    assert path.name == "ops_splice.png"
    with Image.open(path) as image:
        assert min(image.size) > 600 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--plot .*: cannot write"):
        plots.draw(RESULT, tmp_path / "file" / "docs")
