"""What a check of tlf-doctor says, and the registry of checks.

A check is a generator of findings without arguments, in a file of its own under checks/. It measures, and changes
nothing. What it cannot find out is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tinyllava_fast.registry import Registry

Level = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """One sentence about this machine.

    level: "fault" is wrong or needlessly slow, and fails the command; "note" may be meant so, or cannot be had here.
    remedy: what to do, of a fault always. facts: numbers for --json, in base units (bytes, seconds, FLOP).
    """

    level: Level
    said: str
    remedy: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


Check: TypeAlias = Callable[[], Iterator[Finding]]
CHECKS: Registry[Check] = Registry("check", "tinyllava_fast.doctor.checks")


def ok(said: str, **facts: object) -> Finding:
    """Return a finding that all is well."""
    return Finding("ok", said, facts=facts)


def note(said: str, remedy: str = "", **facts: object) -> Finding:
    """Return a finding that somebody may want to know."""
    return Finding("note", said, remedy, facts)


def fault(said: str, remedy: str, **facts: object) -> Finding:
    """Return a finding that has to be mended."""
    return Finding("fault", said, remedy, facts)
