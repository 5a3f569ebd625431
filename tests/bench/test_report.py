"""Tables and JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tinyllava_fast.bench import report
from tinyllava_fast.errors import UserError


def test_units() -> None:
    assert report.seconds(12.3) == "12.3 s"
    assert report.seconds(0.00123) == "1.23 ms"
    assert report.seconds(4.5e-6) == "4.5 us"
    assert report.seconds(7e-9) == "7 ns"
    assert report.quantity(7.7e11, "FLOP/s") == "770 GFLOP/s"
    assert report.quantity(12.0, "B/s") == "12 B/s"


def test_json_is_written_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    report.write_json({"ratio": 2.0}, str(target))
    assert json.loads(target.read_text()) == {"ratio": 2.0}
    report.write_json({"ratio": 2.0}, None)


def test_unwritable_json_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        report.write_json({}, str(tmp_path / "file" / "x.json"))


def test_table_holds_every_cell() -> None:
    out = io.StringIO()
    report.show("T", ["name", "value"], [["first", "1"], ["second", "2"]], Console(file=out, width=80))
    text = out.getvalue()
    assert all(word in text for word in ("T", "name", "value", "first", "second"))
