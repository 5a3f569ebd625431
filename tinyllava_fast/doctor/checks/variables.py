"""TLF_* variables: known, and of a value that their reader takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches

from tinyllava_fast.data import shelf
from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, ok
from tinyllava_fast.errors import UserError
from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._op import backend_wanted
from tinyllava_fast.slurm import ADOPTED
from tinyllava_fast.train import attempts, cpu_pool
from tinyllava_fast.variables import VARIABLES

_OWN = {attempts.LAUNCHED, attempts.ATTEMPT, attempts.REFUSED, ADOPTED}  # that processes of ours set for one another


@CHECKS.register("variables")
def variables() -> Iterator[Finding]:
    """Every TLF_* variable that is set."""
    found = sorted(name for name in os.environ if name.startswith("TLF_") and name not in _OWN)
    for name in found:
        if name not in VARIABLES:
            near = get_close_matches(name, VARIABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VARIABLES)}"
            yield fault(f"{name} is set, and nothing reads it", f"unset it; {hint}")
    for name, read in (
        ("TLF_BACKEND", backend_wanted),
        (shelf.LIMIT, shelf.limit_bytes),
        (cpu_pool.SWITCH, cpu_pool.wanted),
        ("TLF_ISA", _isa),
    ):
        try:
            read()
        except (UserError, ValueError) as error:
            yield fault(str(error), f"unset {name}, or give it a value that is named above")
    known = [name for name in found if name in VARIABLES]
    yield ok(f"TLF_* variables: {', '.join(known) or 'none'}")


def _isa() -> None:
    """Raise ValueError for a TLF_ISA that the kernels refuse."""
    extension = _cpp.load()[0]
    if extension is not None:
        extension.isa()
