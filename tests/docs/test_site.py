"""The site builds strictly, with every page, and asks no other host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

pytest.importorskip("material", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.glob("*.md")} <= built
    assert "repository/CONTRIBUTING.html" in built and (site / "llms.txt").is_file()
    for path in site.rglob("*.html"):
        fetched = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]*)"', path.read_text(encoding="utf-8"))
        assert not fetched, f"{path.name}: {fetched}"
    text = (site / "reference.html").read_text(encoding="utf-8")
    assert "<strong>dtype</strong>: " in text and ">>> " not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
