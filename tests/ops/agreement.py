"""Every backend against the float64 reference. Run as a script it checks all C++ kernels under the present TLF_ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyllava_fast.bench.agreement import (
    OPS,
    TINY,
    Op,
    Sample,
    cases,
    cast,
    disagreements,
    distance,
    on_device,
    outputs,
    runnable,
)
from tinyllava_fast.ops import _cpp

__all__ = ["DTYPES", "OPS", "TINY", "Op", "Sample", "cases", "cast", "disagreements", "distance", "name", "on_device"]
__all__ += ["outputs", "runnable", "saved_bytes"]
DTYPES = (torch.float32, torch.bfloat16)


def name(value: Any) -> str:
    """pytest id of a case, an op or a dtype."""
    if isinstance(value, tuple):
        return f"{value[0].name}-{value[1].label}".replace(" ", "_")
    return str(value).removeprefix("torch.")


def saved_bytes(run: Callable[[], Any]) -> int:
    """Distinct memory that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return sum(kept.values())


def check_isa() -> int:
    """The number of cases that ran in C++; raises AssertionError with the disagreements."""
    ran, wrong = 0, []
    for op, sample in cases():
        for dtype in DTYPES:
            if runnable(op, sample, dtype, "cpp") is None:
                ran += 1
                wrong += disagreements(op, sample, dtype, "cpp")
    assert not wrong, "\n".join(wrong)
    return ran


if __name__ == "__main__":
    count = check_isa()
    print(_cpp.extension().isa(), count)  # noqa: T201 read by the test that runs this script
