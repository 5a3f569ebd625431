"""One run of three sources in three formats, killed at random instants: the losses and shares of an undisturbed run.

    python -m tests.train.mixed_run [--kills 10] [--steps 300] [--seed 0]

easy-VQA as LLaVA's records, scikit-learn's digits as a WebDataset archive, and sums in words as OpenAI's messages, with
weights 3:2:1. Each process is killed (SIGKILL) after some steps, or while it starts, and the same command goes on. Then
every loss, of all and by source, must be the undisturbed run's, and each source's share of the samples its weight's to
1 %. Needs the packages easy-vqa and scikit-learn. Not part of `make test`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.tiny import IMAGE, LLAMA
from tinyllava_fast.data import easy_vqa
from tinyllava_fast.prepare.cli import main as tlf_data
from tinyllava_fast.train.cli import main as tlf_train

WEIGHTS = {"easy_vqa": 3, "digits": 2, "sums": 1}
SHARE = 0.01
"""Most difference of a source's share of the samples from its weight's."""
_SAME = ("step", "loss", "grad_norm")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(path: Path) -> None:
    """Write scikit-learn's 1,797 digits as an archive of pictures, questions and answers."""
    from sklearn.datasets import load_digits

    found = load_digits()
    with tarfile.open(path, "w") as archive:
        for number, (levels, digit) in enumerate(zip(found.images, found.target, strict=True)):
            file = io.BytesIO()
            Image.fromarray((levels * 15).astype(np.uint8)).save(file, "PNG")
            files = {
                "png": file.getvalue(),
                "question.txt": b"Which digit is it?",
                "answer.txt": _DIGITS[digit].encode(),
            }
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{number:05}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_sums(path: Path) -> None:
    """Write text alone, as lines of OpenAI's messages."""
    lines = []
    for one in range(10):
        for other in range(10):
            question = {"role": "user", "content": f"What is {_DIGITS[one]} plus {_DIGITS[other]}?"}
            answer = {"role": "assistant", "content": str(one + other)}
            lines.append(json.dumps({"messages": [question, answer]}))
    path.write_text("\n".join(lines))


def write_run(folder: Path, steps: int) -> Path:
    """Write the sources, a tokenizer of their texts, and the run's YAML; return that."""
    data = folder / "easy_vqa"
    easy_vqa.prepare(data)
    write_digits(folder / "digits.tar")
    write_sums(folder / "sums.jsonl")
    records = data / "train.json"
    paths = {"easy_vqa": records, "digits": folder / "digits.tar", "sums": folder / "sums.jsonl"}
    tokenizer = folder / "tokenizer"
    assert tlf_data(["tokenizer", *map(str, paths.values()), str(tokenizer), "--vocab", "512"]) == 0
    sources = [{"path": str(path), "name": name, "weight": WEIGHTS[name]} for name, path in paths.items()]
    sources[0] |= {"image_folder": str(data / "images"), "turns": "independent", "turns_per_sample": 3}
    run = {
        "output_dir": str(folder / "run"),
        "model": {
            "llm": {"config": LLAMA | {"tie_word_embeddings": True, "vocab_size": 512}, "tokenizer": str(tokenizer)},
            "vision": {"config": IMAGE},
        },
        "stages": [
            {
                "name": "mixed",
                "data": {"sources": sources, "template": "llama"},
                "recipe": {"vision": {"tune": "full"}},
                "batch": {"tokens": 512, "max_images": 8, "packs_per_step": 2},
                "max_steps": steps,
            }
        ],
        "engine": {"dtype": "float32", "workers": 1, "device": "cpu"},
        "checkpoint": {"every_steps": 10},
        "log_every": 1,
        "loggers": [],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def entries(run: Path) -> list[dict[str, object]]:
    """Return what the whole lines of metrics.jsonl say of losses and sources."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{name: entry[name] for name in (*_SAME, "sources")} for entry in found]


def disturbed(path: Path, run: Path, kills: int, rng: random.Random) -> list[int]:
    """Train in processes that are killed so many times; return the steps at which they were."""
    command = [sys.executable, "-m", "tinyllava_fast.train.cli", str(path), f"output_dir={run}"]
    steps: list[int] = []
    most = yaml.safe_load(path.read_text())["stages"][0]["max_steps"]
    while True:
        done = len(entries(run))
        at = done + rng.randint(0, max(2 * (most - done) // (kills - len(steps) + 1), 1)) if len(steps) < kills else 0
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                while len(steps) < kills and process.poll() is None and len(entries(run)) < at:
                    time.sleep(0.01)
                if len(steps) < kills and process.poll() is None:
                    time.sleep(rng.uniform(0, 2.0 if at == done else 0.1))
                    process.kill()
                    steps.append(len(entries(run)))
                code = process.wait()
            finally:
                process.kill()
        if code == 0:
            return steps
        assert code == -9, f"exit code {code}"


def main() -> None:
    """Run the command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mixed-") as temporary:
        folder = Path(temporary)
        path = write_run(folder, args.steps)
        assert tlf_train([str(path), f"output_dir={folder / 'whole'}"]) == 0
        steps = disturbed(path, folder / "run", args.kills, random.Random(args.seed))
        whole, found = entries(folder / "whole"), entries(folder / "run")
        assert found == whole, "losses differ"
        summaries = [json.loads((folder / run / "summary.json").read_text()) for run in ("whole", "run")]
        counts = {name: source["samples"] for name, source in summaries[1]["sources"]["mixed"].items()}
        assert summaries[0]["sources"] == summaries[1]["sources"]
    total = sum(counts.values())
    for name, weight in WEIGHTS.items():
        share, wanted = counts[name] / total, weight / sum(WEIGHTS.values())
        sys.stdout.write(f"{name}: {counts[name]} samples, {share:.2%} where its weight says {wanted:.2%}\n")
        assert abs(share - wanted) <= SHARE, name
    sys.stdout.write(f"{len(whole)} steps, killed at {', '.join(map(str, steps))}: all losses are equal\n")


if __name__ == "__main__":
    main()
