"""The environments, exports and processes of `tlf-bench race`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import cache_folder
from tinyllava_fast.log import log

PEERS = Path(__file__).parent / "race_peers"
# Appended, not put in front: what both environments have is ours.
_EXPORT = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from tinyllava_fast.convert.cli import main; sys.exit(main(sys.argv[1:]))"
)


def load_peer(name: str) -> ModuleType:
    """Return the file of a peer."""
    return importlib.import_module(f"tinyllava_fast.bench.race_peers.{name}")


def python_of(name: str) -> Path:
    """Return the Python of a peer's environment in the cache folder, made if absent. UserError if pip fails."""
    wanted = load_peer(name).REQUIREMENTS
    if not wanted:
        return Path(sys.executable)
    folder = cache_folder() / "race" / name
    python, done = folder / "bin" / "python", folder / "installed.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == list(wanted):
        return python
    log.info("%s: installing %s into %s", name, " ".join(wanted), folder)
    venv.create(folder, with_pip=True, clear=True)
    run = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"{name}: pip could not install {' '.join(wanted)}: {run.stderr.strip()[-300:]}")
    done.write_text(json.dumps(list(wanted)), encoding="utf-8")
    return python


def export(name: str, model: Path, precision: str, target: Path) -> Path:
    """Return the model as the peer reads it at a precision, written to ``target``. UserError if that fails."""
    peer = load_peer(name)
    if not peer.FORMAT:
        return model
    packages = next(python_of(name).parent.parent.glob("lib/python*/site-packages"))
    words = ["export", str(model), str(target), "--format", peer.FORMAT, *peer.PRECISIONS[precision]]
    command = [sys.executable, "-c", _EXPORT, str(packages), *words]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"{name}, {precision}: the export failed: {run.stderr.strip()[-400:]}")
    return target


class Process:
    """A peer that is kept alive and asked through pipes; a context manager that ends it."""

    def __init__(self, name: str, model: Path, precision: str, threads: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [python_of(name), PEERS / "worker.py", name, model, precision, str(threads)]
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def wait(self) -> None:
        """Return when the model is loaded. UserError if it cannot be."""
        self._reply()

    def do(self, method: str, **arguments: object) -> tuple[Any, float]:
        """Return a method's result and its seconds, measured there. UserError if it fails."""
        assert self._process.stdin is not None  # noqa: S101 a pipe was asked for
        try:
            print(json.dumps({"do": method, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended: its last words are read below
        reply = self._reply()
        return reply["result"], reply["seconds"]

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 a pipe was asked for
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise UserError(f"{self.name} ended by itself: {self._errors.read().strip()[-400:]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(f"{self.name}: {reply['error']}")
        return reply
