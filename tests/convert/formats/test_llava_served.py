"""The ``llava`` folder in other servers: asked by OpenAI's API, they answer with our tokens. Run by `make exports`.

vLLM stands in an environment of its own, whose folder TLF_VLLM names; its torch and torchvision must be of one build.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.convert.formats.test_gguf import QUESTION, TEXTS, describe, enlarged
from tinyllava_fast.convert.convert import export_model
from tinyllava_fast.data.bpe import train_tokenizer
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.models import io
from tinyllava_fast.models.build import build_image_processor, build_model

STEPS = 12
WAIT_S = 300.0
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 256}

pytestmark = [pytest.mark.exports]


@dataclasses.dataclass
class Asked:
    """An exported folder, questions with their pictures, and our answers."""

    folder: Path
    questions: dict[str, tuple[list[Path], str]]


@pytest.fixture(params=["clip", "siglip"])
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Asked:
    """Heads are 64 wide, which vLLM needs."""
    config = describe(vision=request.param, **WIDE)
    lmm, tokenizer, processor = (
        enlarged(build_model(config)),
        train_tokenizer(TEXTS, 268),
        build_image_processor(config),
    )
    lmm.config = dataclasses.replace(lmm.config, template="llama")
    io.save_model(lmm, tokenizer, processor, tmp_path / "ours")
    folder = export_model(tmp_path / "ours", tmp_path / "llava", "llava")
    generator = np.random.default_rng(0)
    files = [tmp_path / "square.png", tmp_path / "wide.png"]
    for file, shape in zip(files, [(32, 32, 3), (40, 60, 3)], strict=True):
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(file)
    engine = Engine(lmm, tokenizer, processor, TEMPLATES.get("llama"), batch_tokens=512)
    questions = {}
    for name, shown in (("text", []), ("square", files[:1]), ("wide", files[1:]), ("both", files)):
        pictures = [Image.open(file).convert("RGB") for file in shown]
        prompt = "<image>\n" * len(shown) + QUESTION
        answer = engine.answers([Request.ask(prompt, pictures or None, sampling=Sampling(max_new_tokens=STEPS))])[0]
        questions[name] = (shown, answer.text)
    return Asked(folder, questions)


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ask(url: str, model: Path, files: list[Path]) -> str:
    urls = ["data:image/png;base64," + base64.b64encode(file.read_bytes()).decode() for file in files]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": QUESTION}]}]
    body = {"model": str(model), "messages": messages, "max_tokens": STEPS, "temperature": 0}
    call = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=WAIT_S) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def answers(command: list[str], number: int, asked: Asked, log: Path, environment: dict[str, str]) -> dict[str, str]:
    """Start a server, ask it everything, stop it."""
    url = f"http://127.0.0.1:{number}"
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment, start_new_session=True)
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        return {name: ask(url, asked.folder, files) for name, (files, _) in asked.questions.items()}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_transformers_serve(asked: Asked, tmp_path: Path) -> None:
    number = port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(asked.folder)]
    command += ["--host", "127.0.0.1", "--port", str(number), "--device", "cpu", "--dtype", "float32"]
    found = answers(command, number, asked, tmp_path / "log", {})
    assert found == {name: answer for name, (_, answer) in asked.questions.items()}


def test_vllm(asked: Asked, tmp_path: Path) -> None:
    place = os.environ.get("TLF_VLLM")
    if not place:
        pytest.skip("TLF_VLLM does not name the folder of an environment with vLLM")
    number = port()
    command = [f"{place}/bin/vllm", "serve", str(asked.folder), "--host", "127.0.0.1", "--port", str(number)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    command += ["--limit-mm-per-prompt", '{"image": 2}']
    environment: dict[str, Any] = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    found = answers(command, number, asked, tmp_path / "log", environment)
    assert found == {name: answer for name, (_, answer) in asked.questions.items()}
