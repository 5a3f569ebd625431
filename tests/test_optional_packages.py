"""Packages that a machine may lack: every module that does not exist for one of them imports without all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ABSENT = ("bitsandbytes", "deepspeed", "easy_vqa", "fastapi", "flash_attn", "gguf", "httpx2", "jsonargparse")
ABSENT += ("liger_kernel", "llguidance", "lmms_eval", "matplotlib", "peft", "prometheus_client", "pyarrow")
ABSENT += ("tensorboard", "nncf", "onnx", "onnxruntime", "openvino", "trackio", "uvicorn", "vllm", "wandb", "xllamacpp")
THEIR_OWN = ("serve.", "convert.engines.", "convert.formats._gguf_", "eval.lmms")
"""What nobody imports who does not use it."""
SCRIPT = """
import builtins, importlib, sys

absent, *modules = sys.argv[1:]
absent, load = absent.split(","), builtins.__import__

def blocked(name, globals=None, *rest, **more):
    ours = str((globals or {}).get("__name__")).startswith("tinyllava_fast")  # others may need them themselves
    if ours and name.partition(".")[0] in absent:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return load(name, globals, *rest, **more)

builtins.__import__ = blocked
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: {error}")
"""
ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    folders = {"tinyllava_fast": ROOT / "tinyllava_fast", "tinyllava_fast.bench": ROOT / "bench"}
    paths = [
        (package, path.relative_to(at).with_suffix("")) for package, at in folders.items() for path in at.rglob("*.py")
    ]
    names = [".".join([package, *path.parts]) for package, path in paths if path.name != "__init__"]
    own = tuple(f"tinyllava_fast.{name}" for name in THEIR_OWN)
    return sorted(name for name in names if not name.startswith(own))


def test_modules_import_without_optional_packages() -> None:
    names = modules()
    assert len(names) > 200
    command = [sys.executable, "-c", SCRIPT, ",".join(ABSENT), *names]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert not run.stdout, run.stdout
