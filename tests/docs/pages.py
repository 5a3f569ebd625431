"""The pages of the documentation as tests see them: blocks of code, commands, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`(?P<text>tlf-\w+ [^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_SHELL = re.compile(r"\s(?:\|\|?|&&|;|>|<)\s")
PROGRAM = re.compile(r"(?:\.venv/bin/)?(?P<name>tlf-\w+)$")
MODULES = {"tinyllava_fast.train.cli": "tlf-train", "tinyllava_fast.eval.cli": "tlf-eval"}


@dataclass(frozen=True)
class Command:
    """A command line that a page shows. ``program`` is one of ours, or make."""

    page: str
    program: str
    words: tuple[str, ...]
    whole: bool  # from a block of code, with nothing left out by dots: it can be typed as it stands

    def __str__(self) -> str:
        return f"{self.page}: {self.program} {' '.join(self.words)}"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a language, as far to the left as they go."""
    found = [m for m in _FENCE.finditer(read(page)) if m["kind"] == kind]
    return [re.sub(rf"(?m)^{m['indent']}", "", m["text"]) for m in found]


def prose(page: Path) -> str:
    """The text without fenced blocks."""
    return _FENCE.sub("", read(page))


def commands(page: Path) -> Iterator[Command]:
    """The commands of ours in the shell blocks of a page, and those inside a sentence that have arguments."""
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            yield from _commands(page, line, whole=True)
    for match in _INLINE.finditer(prose(page)):
        yield from _commands(page, match["text"].replace("\\|", "|"), whole=False)


def _commands(page: Path, line: str, whole: bool) -> Iterator[Command]:
    for part in _SHELL.split(line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a quotation of several lines, of another program
            continue
        for index, word in enumerate(words):
            program = MODULES.get(word, "make" if index == 0 and word == "make" else "")
            if match := PROGRAM.match(word):
                program = match["name"]
            if program:
                rest = tuple(w for w in words[index + 1 :] if w not in ("...", "…"))
                yield Command(name(page), program, rest, whole and len(rest) == len(words) - index - 1)
                break


def links(page: Path) -> list[str]:
    """The targets of the links and pictures outside fenced blocks and code."""
    return [m["target"] for m in _LINK.finditer(re.sub(r"`[^`\n]*`", "", prose(page)))]


def anchors(page: Path) -> set[str]:
    """What a link into a page may name, as GitHub makes it of headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        while slug in found:
            slug += "-1"
        found.add(slug)
    return found
