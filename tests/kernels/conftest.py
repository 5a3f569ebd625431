"""Tests of the Triton kernels run in Triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process has either compiled or interpreted kernels. All
selected tests of this folder are therefore run once more in one process of their own, with the variable set, when the
first of them is due; each then takes the outcome it had there. They are written, selected and parametrised like any
other test.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
REPORT = "TLF_KERNEL_TESTS"  # where the inner process writes its outcomes, one JSON object a line
INTERPRETED = REPORT in os.environ
TIMEOUT = 850
_outcomes: dict[str, tuple[str, str]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED:
        return None
    if not _outcomes:
        here = Path(__file__).parent
        _outcomes.update(_run([item.nodeid for item in pyfuncitem.session.items if here in item.path.parents]))
    outcome, text = _outcomes[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if INTERPRETED and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(os.environ[REPORT], "a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")


def _run(ids: list[str]) -> dict[str, tuple[str, str]]:
    """Every test's outcome and its text; a test that a process which ended early did not reach has failed."""
    found: dict[str, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", REPORT: str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ids]
        try:
            run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
            said = f"{run.stdout[-3000:]}{run.stderr[-3000:]}"
        except subprocess.TimeoutExpired:
            said = f"more than {TIMEOUT} s"
        for line in report.read_text(encoding="utf-8").splitlines() if report.exists() else ():
            node, outcome, text = json.loads(line)
            if found.get(node, ("",))[0] != "failed":  # a failing teardown follows a passed call
                found[node] = (outcome, text)
    return {node: found.get(node, ("failed", f"it did not run in the interpreter:\n{said}")) for node in ids}


@pytest.fixture(autouse=True, scope="session")
def bfloat16_rounds_to_nearest() -> None:
    """The interpreter cuts float32 to bfloat16 towards zero where a GPU rounds to nearest: up to twice the error."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(data.view("float32").copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16")
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


@pytest.fixture(autouse=True, scope="session")
def nothing_is_done_twice() -> None:
    """Leave out two things that took most of the interpreter's time.

    It patches triton.language at every call of a device function, too, as a launch has already done; what those calls
    patch beyond it, the language's own library, stays patched in either case. And it computes for every sum of integers
    whether it overflows, to throw that away: `debug` is off.
    """
    if not INTERPRETED:
        return
    from triton.language import standard
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang(standard.cdiv.fn)
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
