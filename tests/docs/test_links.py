"""Links, anchors and figures of the documentation lead somewhere, and the site and llms.txt list every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links, name, read

SITE = list(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or ROOT not in target.parents:
            wrong.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading")
    assert not wrong, wrong


def test_every_figure_is_shown() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    figures = [path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg") and "examples" not in path.parts]
    assert len(figures) > 10
    unused = sorted(name(path) for path in figures if path not in shown)
    assert not unused, unused


def test_drawings_are_small_and_fetch_nothing() -> None:
    for path in DOCS.rglob("*.svg"):
        text = read(path).replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert len(text) < 30_000 and "prefers-color-scheme:dark" in text and "<title" in text, path
        assert not re.search(r"https?://|<script|<image|@import", text), path


def pages_of(nav: list[object]) -> list[str]:
    found: list[str] = []
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages_of(value) if isinstance(value, list) else [str(value)]
    return found


def test_the_site_has_every_page_once() -> None:
    listed = pages_of(yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"])
    there = sorted(page.relative_to(DOCS).as_posix() for page in SITE)
    assert sorted(listed) == there


def test_llms_txt_lists_every_page() -> None:
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): .+$", read(DOCS / "llms.txt"), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in SITE if page.name != "index.md")


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = read(ROOT / "README.md").splitlines()
    assert len(lines) <= 120
    assert any("**Status.**" in line for line in lines[:10])
