"""Runs the checks, one after the other, each guarded from the others' mistakes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault
from tinyllava_fast.log import place_of


@dataclass(frozen=True)
class Examined:
    """What one check has found, and the seconds that it took."""

    check: str
    findings: tuple[Finding, ...]
    seconds: float


def examine(only: Sequence[str] = (), skip: Sequence[str] = ()) -> Iterator[Examined]:
    """Yield each check as it is done. only: their names, all by default. UserError for an unknown name."""
    for name in (*only, *skip):
        CHECKS.get(name, "--only/--skip")
    for name in only or CHECKS.names():
        if name not in skip:
            began = time.monotonic()
            findings = tuple(_guarded(name))
            yield Examined(name, findings, time.monotonic() - began)


def healthy(examined: Sequence[Examined]) -> bool:
    """Return whether no check has found a fault."""
    return not any(finding.level == "fault" for one in examined for finding in one.findings)


def _guarded(name: str) -> Iterator[Finding]:
    try:
        yield from CHECKS.get(name)()
    except Exception as error:  # a broken machine breaks in ways that no check foresees; the others still run
        yield fault(f"the check {name} ended early: {place_of(error)}: {error}", "report this as a bug")
