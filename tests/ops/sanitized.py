"""The C++ kernels under AddressSanitizer and UBSan: a pytest plugin, and as a script what `make sanitize` runs.

    python -m tests.ops.sanitized FOLDER [--seconds N] [pytest arguments]

FOLDER: of the package that was built with TLF_SANITIZE. It runs the tests of every op that reach C++, or with --seconds
the fuzz tests again and again with new arguments, under the lowest and the highest instruction sets of this machine.

Tiles of AMX are inline assembly, which the sanitizers do not see; csrc/include/tlf/amx.h shows them each row of a tile
before it is loaded or stored. Buffers that the package makes larger than asked for, to align or to keep them, are exact
here, and gaps between those of csrc are poisoned, so that the first byte beyond one is noticed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER, ISAS = "TLF_SANITIZED", ("baseline", "avx512bf16", "amx")
# what tests torch's side of an op, starts processes of its own, or is slow without C++
ELSEWHERE = ("opcheck", "gradcheck", "fullgraph", "recompile", "instruction_set", "compiled", "bitsandbytes")


def pytest_configure() -> None:
    """Put the sanitized extension in the place of the installed one."""
    import torch

    name = "tinyllava_fast._C"
    assert name not in sys.modules, "the installed kernels are loaded already"
    (path,) = Path(os.environ[FOLDER]).glob("_C.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from tinyllava_fast.ops import _cpp

    def exact(large: Callable[..., Any], small: Callable[..., Any], shape: Any, dtype: torch.dtype) -> Any:
        return small(shape, dtype=dtype)

    _cpp._buffer = exact
    _cpp.scratch = lambda nbytes, owner="": torch.empty(nbytes, dtype=torch.uint8)


def _environment(folder: str, isa: str) -> dict[str, str]:
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second, because the first looks for its exceptions at once
    ]
    if not all(os.path.isabs(path) for path in libraries):
        raise SystemExit(f"{compiler} has no AddressSanitizer of GCC's kind: {libraries}")
    return {
        **os.environ,
        FOLDER: folder,
        "TLF_ISA": isa,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


BEYOND = """
import torch
import tests.ops.sanitized as sanitized
sanitized.pytest_configure()
from tinyllava_fast.ops import _cpp
rows, weight = torch.zeros(4, 8), torch.zeros(8)
_cpp.extension().rms_norm(rows.data_ptr(), weight.data_ptr(), 1e-5, rows.data_ptr(), 5, 8, 0)
"""


def _start(folder: str, isa: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], env=_environment(folder, isa))


def _run(folder: str, isas: list[str], arguments: list[str]) -> None:
    """pytest under each of them at once; what a sanitizer finds must reach the terminal, hence the capture."""
    options = ["-m", "pytest", "-p", "tests.ops.sanitized", "-p", "no:cacheprovider", "--capture=sys", "-q", "-x"]
    running = {isa: _start(folder, isa, [*options, *arguments]) for isa in isas}
    failed = [isa for isa, process in running.items() if process.wait() != 0]
    if failed:
        raise SystemExit(f"under the sanitizers, TLF_ISA={' and '.join(failed)}: see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=0.0)
    options, arguments = parser.parse_known_args()

    from tinyllava_fast.ops import _cpp

    known = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
    isas = [isa for isa in ISAS if known.index(isa) <= known.index(_cpp.extension().isa())]
    folder = os.path.abspath(options.folder)
    print(f"AddressSanitizer and UBSan under {', '.join(isas)}", flush=True)  # noqa: T201
    proof = subprocess.run([sys.executable, "-c", BEYOND], env=_environment(folder, isas[0]), capture_output=True)
    if b"AddressSanitizer: heap-buffer-overflow" not in proof.stderr:
        raise SystemExit(f"a row beyond the end went unnoticed: {proof.stderr.decode()[-2000:]}")
    if not options.seconds:
        _run(folder, isas, arguments or ["tests/ops", "-k", " and ".join(f"not {word}" for word in ELSEWHERE)])
        return
    os.environ["TLF_FUZZ"] = "long"
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        _run(folder, isas, arguments or ["tests/ops/test_fuzz.py"])


if __name__ == "__main__":
    main()
