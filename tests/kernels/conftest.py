"""Tests of the Triton kernels run in Triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process has either compiled or interpreted kernels. The
tests of a file here are therefore run once more in a process of its own, with the variable set, when the first of them
is due; each then takes the outcome it had there. They are written, selected and parametrised like any other test.
"""

from __future__ import annotations

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
TIMEOUT = 600
_outcomes: dict[Path, dict[str, tuple[str, str]]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED:
        return None
    if pyfuncitem.path not in _outcomes:
        ids = [item.nodeid for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
        _outcomes[pyfuncitem.path] = _run(ids)
    outcome, text = _outcomes[pyfuncitem.path].get(pyfuncitem.nodeid, ("failed", "it did not run in the interpreter"))
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
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", REPORT: str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ids]
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        if not report.exists():
            pytest.fail(
                f"the interpreter's process ran no test:\n{run.stdout[-3000:]}{run.stderr[-3000:]}", pytrace=False
            )
        found: dict[str, tuple[str, str]] = {}
        for line in report.read_text(encoding="utf-8").splitlines():
            node, outcome, text = json.loads(line)
            if found.get(node, ("",))[0] != "failed":  # a failing teardown follows a passed call
                found[node] = (outcome, text)
        return found


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
