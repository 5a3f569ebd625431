"""`tlf-bench docs`: committed pages are what it writes, and what it writes is what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_fast.bench import cli, pages
from tinyllava_fast.errors import UserError

ROOT = Path(__file__).parents[2]


def test_committed_pages_are_what_the_command_writes() -> None:
    assert not pages.update(ROOT, check=True), "run tlf-bench docs"


def test_every_table_is_on_a_page() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES)
    assert [name for name in pages.TABLES if f"<!-- tlf-bench docs: {name} -->" not in text] == []


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one page of two tables, and one report."""
    (tmp_path / "results").mkdir()
    report = json.loads((pages.RESULTS / "packing.json").read_text())
    report["rows"] = [{**report["rows"][0], "efficiency": 0.5, "image_tokens": 77}]
    (tmp_path / "results" / "packing.json").write_text(json.dumps(report))
    place = "<!-- tlf-bench docs: {} -->\nold\n<!-- end -->\n"
    (tmp_path / "page.md").write_text("before\n\n" + place.format("packing") + "between\n" + place.format("ops"))
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pages, "PAGES", ("page.md",))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tables_follow_the_reports(checkout: Path) -> None:
    assert cli.main(["docs", "--check"]) == 1
    assert "old" in (checkout / "page.md").read_text()
    assert cli.main(["docs"]) == 0
    text = (checkout / "page.md").read_text()
    assert "| 77 | 4,096 | 50.0 % |" in text and "old" not in text
    assert text.startswith("before\n") and "\nbetween\n" in text
    assert cli.main(["docs", "--check"]) == 0


def test_what_is_wrong_is_named(checkout: Path) -> None:
    (checkout / "page.md").write_text("<!-- tlf-bench docs: nothing -->\n<!-- end -->\n")
    with pytest.raises(UserError, match=r"page\.md: no table is called 'nothing'; have machines"):
        pages.update(checkout)
    (checkout / "page.md").write_text("no table\n")
    with pytest.raises(UserError, match="no place for a table"):
        pages.update(checkout)
    (checkout / "page.md").unlink()
    with pytest.raises(UserError, match="in a checkout"):
        pages.update(checkout)
    (checkout / "results" / "packing.json").write_text("{")
    with pytest.raises(UserError, match=r"packing\.json: not a report"):
        pages.read("packing")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(3.39, "3.4x"), (1.06, "1.06x"), (1.094, "1.09x"), (0.999, "**1.00x**"), (0.95, "**0.95x**"), (9.97, "10x")],
)
def test_speed_ups_as_text(ratio: float, text: str) -> None:
    assert pages.times(ratio) == text


def test_the_fastest_other_is_named() -> None:
    row = {"ratio": {"torch": {"ratio": 3.0}, "peft": {"ratio": 0.9}}}
    assert pages._strongest(row) == "**0.90x** peft" and pages._strongest(None) == pages._ABSENT
