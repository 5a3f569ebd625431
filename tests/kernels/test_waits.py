"""Nothing that a launcher does ahead of or behind its kernels waits for the device."""

from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import OPS, cast
from tests.waits import Operators
from tinyllava_fast.ops._op import Op, Sample

# where no slots are given the rows that count are looked for; training gives them
LOOKS = {"linear_cross_entropy_fwd": lambda sample: sample.args[4] is None}


def cases() -> list[tuple[Op, Sample]]:
    """The first sample of every op that has a launcher."""
    found = []
    for op in OPS.values():
        if op.samples is None or op.triton is None:
            continue
        samples = [s for s in op.samples() if not LOOKS.get(op.name, lambda _: False)(s)]
        samples = [s for s in samples if op.triton_supports(*s.args) is None]
        found.append((op, samples[0]))
    return found


def test_there_are_launchers() -> None:
    assert len(cases()) >= 10


@pytest.mark.parametrize("case", cases(), ids=[op.name for op, _ in cases()])
def test_a_launcher_waits_for_nothing(case: tuple[Op, Sample]) -> None:
    op, sample = case
    assert op.triton is not None
    args = cast(sample, torch.float32)
    own = [a.clone() if at in op.mutates and a is not None else a for at, a in enumerate(args)]
    with torch.no_grad(), Operators("cpu") as operators:
        op.triton(*own)
    assert not operators.waiting
