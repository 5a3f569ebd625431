"""`make gpu-bundle`: wheels of what a GPU machine without a network may lack, for CPython 3.12 on x86-64 Linux.

They travel beside the source, so both together are held against LIMIT.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = {
    "bitsandbytes": "qlora, 8-bit optimizers, and the peer of nf4's kernels",
    "deepspeed": "engine.type: deepspeed",
    "hjson": "deepspeed imports it",
    "py-cpuinfo": "deepspeed imports it",
    "msgpack": "deepspeed imports it",
    "einops": "deepspeed imports it",
    "liger-kernel": "the peer of our loss kernel, and HF Trainer's faster form",
    "easy-vqa": "the samples that everything trains on and answers",
    "gguf": "exports, and weights in GGUF",
    "httpx2": "the client of chat servers",
    "httpcore2": "httpx2 imports it",
}
"""Package: why it is carried. Versions are those of the constraints."""
BUILT = ("deepspeed",)
"""Published as source alone; without its kernels it is plain Python, and its wheel is made here."""
LIMIT = 64 * 2**20
"""Bytes of both: what a GPU machine that is lent for minutes takes."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


def collect(folder: Path, constraints: Path) -> None:
    """Download and build the wheels. Raises CalledProcessError if pip does not get one."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    chosen = [f"--platform={name}" for name in PLATFORMS]
    plain = [name for name in PACKAGES if name not in BUILT]
    common = ["--no-deps", "-c", str(constraints)]
    download = [*pip, "download", *common, "--only-binary=:all:", "--python-version=3.12", *chosen]
    subprocess.run([*download, "--dest", str(folder), *plain], check=True)
    wheel = [*pip, "wheel", *common, "--wheel-dir", str(folder)]
    subprocess.run([*wheel, *BUILT], check=True)


def travelling(folder: Path, source: Path) -> dict[str, int]:
    """Return the bytes of each wheel, and of the files that git tracks in the source folder, under "source"."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    names = subprocess.run(["git", "ls-files", "-z"], cwd=source, check=True, capture_output=True, text=True).stdout
    tracked = [source / name for name in names.split("\0") if name]
    return {**sizes, "source": sum(path.stat().st_size for path in tracked if path.is_file())}


def lacking(names: Sequence[str]) -> list[str]:
    """Return the packages of which there is no wheel among the file names."""
    held = {name.partition("-")[0].lower().replace("_", "-") for name in names}
    return [package for package in PACKAGES if package not in held]


def main(argv: Sequence[str] | None = None) -> int:
    """Collect the wheels and check what they weigh; 1 if one is missing or all are too much."""
    parser = argparse.ArgumentParser(prog="bundle.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constraints", type=Path, required=True)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    collect(args.folder, args.constraints)
    sizes = travelling(args.folder, Path.cwd())
    total, missing = sum(sizes.values()), lacking(list(sizes))
    for name, size in sizes.items():
        package = name.partition("-")[0].lower().replace("_", "-")
        sys.stdout.write(f"{size / 2**20:7.2f} MiB  {name}  {PACKAGES.get(package, '')}\n")
    sys.stdout.write(f"{total / 2**20:7.2f} MiB of {LIMIT / 2**20:.0f}; missing: {', '.join(missing) or 'nothing'}\n")
    return int(total > LIMIT or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
