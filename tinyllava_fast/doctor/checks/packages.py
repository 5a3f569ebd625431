"""Versions: what this package and those that it needs ask of one another, and combinations that are known to fail."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok

OURS = "tinyllava-fast"
EXTRAS = ("train", "eval", "serve", "tables")
"""Those that commands ask for; others are for developers, or of a single logger."""
# What no bound says: packages that together do not work, or have not been tried (docs/LOG.md).
DOUBTFUL = ((("deepspeed>=0.20",), "its engine's moments are linked through a private function of DeepSpeed 0.19"),)


@CHECKS.register("packages")
def packages() -> Iterator[Finding]:
    """Every requirement of ours and of what it brings, against what is installed."""
    names = ("torch", "transformers", "numpy", "triton", "deepspeed")
    versions = {name: found for name in names if (found := installed(name)) is not None}
    yield ok(f"Python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in versions.items()), **versions)
    wanted = requirements(OURS)
    if wanted is None:
        yield fault(f"{OURS} is not installed, only imported", "pip install it, so that its requirements are known")
        return
    yield from _extras(wanted)
    yield from _conflicts()
    for pins, why in DOUBTFUL:
        if all(_meets(Requirement(pin)) for pin in pins):
            yield note(f"{' with '.join(pins)} has not been tried: {why}", "constraints.txt names what is tested")


def installed(name: str) -> str | None:
    """Return the version of an installed distribution; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(name: str) -> Sequence[Requirement] | None:
    """Return what an installed distribution asks for, its extras too; None if it is not installed."""
    try:
        return [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _meets(requirement: Requirement) -> bool:
    """Whether a package that fits is there."""
    version = installed(requirement.name)
    return version is not None and requirement.specifier.contains(Version(version), prereleases=True)


def _extras(wanted: Sequence[Requirement]) -> Iterator[Finding]:
    """Yield a note for each extra of which packages are absent."""
    for extra in EXTRAS:
        own = [one for one in wanted if _applies(one, extra) and not _applies(one)]
        if lacking := sorted(one.name for one in own if installed(one.name) is None):
            yield note(
                f"not installed of what some commands ask for: {', '.join(lacking)}", f"pip install '{OURS}[{extra}]'"
            )


def _conflicts() -> Iterator[Finding]:
    """Yield a fault for each requirement that is not met, from ours to what the packages that it brings ask for."""
    left, seen = [OURS], {OURS}
    while left:
        name = left.pop()
        optional = EXTRAS if name == OURS else ()
        for one in requirements(name) or ():
            needed = _applies(one)
            if not needed and not any(_applies(one, extra) for extra in optional):
                continue
            version = installed(one.name)
            if version is None and needed:
                yield fault(f"{name} needs {one.name}, which is not installed", f"pip install '{_text(one)}'")
            elif version is not None and not _meets(one):
                yield fault(f"{name} needs {_text(one)}, and {version} is installed", f"pip install '{_text(one)}'")
            elif version is not None and (key := canonicalize_name(one.name)) not in seen:
                seen.add(key)
                left.append(one.name)


def _text(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"
