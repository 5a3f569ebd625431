"""The findings as lines for people, as JSON for machines, and as a block for a bug report that tells no names."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_fast.bench import machine
from tinyllava_fast.doctor.examine import Examined, healthy
from tinyllava_fast.version import __version__

_SIGNS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
_VARIABLES = ("TLF_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME", "CXX")
_SYSTEM = ("/proc", "/sys", "/dev", "/usr", "/bin", "/lib", "/etc/os-release")
"""Folders that are alike everywhere, and whose names tell nothing."""


def lines(examined: Examined) -> Iterator[str]:
    """Yield the lines of one check."""
    for finding in examined.findings:
        yield f"{_SIGNS[finding.level]} {examined.check:<10} {finding.said}"
        if finding.remedy:
            yield f"{'':17}-> {finding.remedy}"


def summary(examined: Sequence[Examined]) -> str:
    """Return the last line."""
    levels = [finding.level for one in examined for finding in one.findings]
    seconds = sum(one.seconds for one in examined)
    faults, notes = levels.count("fault"), levels.count("note")
    said = f"{faults} fault{'s' * (faults != 1)}" if faults else "no fault"
    return f"{said}, {notes} note{'s' * (notes != 1)}, {seconds:.1f} s"


def as_json(examined: Sequence[Examined]) -> dict[str, Any]:
    """Return {version, healthy, machine, seconds, findings: [{check, level, said, remedy, facts}]}."""
    return {
        "version": __version__,
        "healthy": healthy(examined),
        "machine": machine.describe(),
        "seconds": {one.check: round(one.seconds, 3) for one in examined},
        "findings": [
            {"check": one.check, "level": f.level, "said": f.said, "remedy": f.remedy, "facts": dict(f.facts)}
            for one in examined
            for f in one.findings
        ],
    }


def block(examined: Sequence[Examined]) -> str:
    """Return what to paste into a bug report, as Markdown: the machine and the findings, without private names."""
    facts = [f"tinyllava_fast {__version__}", *(f"{k}: {v}" for k, v in machine.describe().items())]
    text = "\n".join([*facts, "", *(line for one in examined for line in lines(one)), summary(examined)])
    return f"```text\n{without_names(text)}\n```"


def without_names(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text in which no folder, user or host of this machine is named.

    What is known is replaced by what it is (~, $TLF_CACHE, <python>); any other path outside the system's own folders
    by <path>.
    """
    known = {
        **{environment.get(name, ""): f"${name}" for name in _VARIABLES},
        str(Path(__file__).parents[2]): "<package>",
        str(Path.cwd()): "<here>",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        tempfile.gettempdir(): "<tmp>",
        environment.get("HOME", ""): "~",
    }
    for path in sorted(known, key=len, reverse=True):
        if len(path) > 1 and not path.startswith(_SYSTEM):
            text = text.replace(path, known[path])
    text = re.sub(r"(?<![\w~>$./-])/(?:[^\s:;,'\"()]+)", _shown, text)
    for name, sign in ((_user(), "<user>"), (socket.gethostname(), "<host>")):
        if len(name) > 1:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", sign, text)
    return text


def _shown(match: re.Match[str]) -> str:
    path = match[0]
    return path if path.startswith(_SYSTEM) else "<path>"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a passwd entry
        return ""
