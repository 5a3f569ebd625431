"""Training where a folder's name has spaces and umlauts, nobody has a home, and the checkout cannot be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import prepare

ROOT = Path(__file__).parents[2]
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


def read_only(folder: Path) -> list[str]:
    """The beginning of a command that sees the folder read-only: a mount of its own, for root may write anywhere."""
    command = ["unshare", "-m", "bash", "-c", READ_ONLY, "-", str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount folders")
    return command


def test_it_trains_anywhere(tmp_path: Path) -> None:
    locked = read_only(ROOT)
    assert subprocess.run([*locked, "touch", str(ROOT / "x")], capture_output=True).returncode, "it is writable"
    folder = tmp_path / "Läufe für mich"
    config = prepare(folder, stages__pretrain__max_steps=1, stages__finetune__max_steps=1)
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "TLF_CACHE")}
    env |= {"TLF_CACHE": str(folder / "das lager"), "TLF_CPU_ALLOCATOR": "torch", "PYTHONPATH": str(ROOT)}
    command = [*locked, sys.executable, "-m", "tinyllava_fast.train.cli", str(config)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / "final" / "model.safetensors").is_file()
