"""The README's commands and snippets are run, so that they can't rot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.infer.tiny import make_model, make_tokenizer, tiny_config
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import save_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```(\w+)\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    found = [text for kind, text in BLOCKS if kind == language]
    assert found, f"the README has no {language} block"
    return found


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def commands() -> list[str]:
    lines = [line.strip() for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if "tlf-train" in line]


@pytest.mark.parametrize("command", commands())
def test_training_commands_parse(command: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs" / "demo.yaml", tmp_path / "my.yaml")
    words = command.split()[1:]
    run = [sys.executable, "-m", "tinyllava_fast.train.cli", *words, "--print_config"]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "threads: 8" in done.stdout


def test_the_python_snippet_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(make_model(), make_tokenizer(), build_image_processor(tiny_config()), tmp_path / "runs/my/final")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(re.sub(r"(?m)^   ", "", blocks("python")[0]), scope)
    assert isinstance(scope["answer"], str)


def test_the_record_is_valid() -> None:
    record = json.loads(blocks("json")[0])
    assert [m["from"] for m in record["conversations"]] == ["human", "gpt"]


def test_commands_in_configs_name_files_that_exist() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for name in re.findall(r"configs/\S+\.yaml", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"
