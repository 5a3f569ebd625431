"""Hooks of mkdocs: files beside docs/ that pages link to become part of the site, below ``repository/``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(\]\()(?P<path>[^)\s#:]+)(?P<rest>(#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what those pages link to in their turn."""
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    seen: set[str] = set()
    while waiting:
        page = waiting.pop()
        for match in _LINK.finditer(page.read_text(encoding="utf-8")):
            target = _target(page, match["path"])
            name = None if target is None else _place(target)
            if target is None or name is None or name in seen or not target.exists():
                continue
            seen.add(name)
            if target.is_dir():
                rows = "\n".join(f"- `{path.name}`" for path in sorted(target.iterdir()) if path.name[0] not in "._")
                files.append(File.generated(config, name, content=f"# {target.relative_to(ROOT)}\n\n{rows}\n"))
                continue
            files.append(File.generated(config, name, abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/, and those of pages from outside it, at their places on the site."""
    source = page.file.src_uri
    outside = source.startswith("repository/")
    here = ROOT / source.removeprefix("repository/") if outside else DOCS / source

    def moved(match: re.Match[str]) -> str:
        target = _target(here, match["path"])
        if target is None or not target.exists():
            return match[0]
        place = _place(target)
        if place is None and not outside:
            return match[0]
        place = place or target.relative_to(DOCS).as_posix()
        return f"{match[1]}{os.path.relpath(place, os.path.dirname(source))}{match['rest']}"

    return _LINK.sub(moved, markdown)


def _target(page: Path, link: str) -> Path | None:
    """The file that a link of a page names; None if it lies outside the repository."""
    path = Path(os.path.normpath(page.parent / link))
    return path if ROOT in path.parents else None


def _place(target: Path) -> str | None:
    """Where a file lies on the site if it is not part of docs/; None if it is."""
    if target == DOCS or DOCS in target.parents:
        return None
    return f"repository/{target.relative_to(ROOT).as_posix()}" + (".md" if target.is_dir() else "")
