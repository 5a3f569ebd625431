"""A tiny benchmark folder in easy-VQA's layout, and the tiny model folder of the inference tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.own import write_data
from tests.infer.conftest import folder, lmm, tokenizer  # noqa: F401 fixtures
from tinyllava_fast.eval import runner
from tinyllava_fast.infer.assistant import Assistant


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, five questions each."""
    root = tmp_path_factory.mktemp("easy_vqa")
    (root / "images" / "test").mkdir(parents=True)
    rng = np.random.default_rng(1)
    asked = [
        ("what shape is in the image?", "circle"),
        ("what color is the shape?", "red"),
        ("is there a circle?", "yes"),
        ("is there not a red shape?", "no"),
        ("what is the blue shape?", "triangle"),
    ]
    rows = []
    for i in range(4):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / "test" / f"{i}.png")
        for question, answer in asked:
            number = len(rows)
            rows.append(
                {"id": f"test-{number}", "image": f"test/{i}.png", "question": question, "answer": answer, "type": ""}
            )
    (root / "test.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="session", autouse=True)
def no_judge() -> Iterator[None]:
    """No test of this folder asks a judge outside this machine, whatever keys its user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:  # noqa: F811 the fixture
    return Assistant.from_pretrained(folder, device="cpu", batch_tokens=4096)


@pytest.fixture
def evaluate(folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:  # noqa: F811 the fixture
    """Evaluates questions of one's own; the model is loaded once for all tests."""
    monkeypatch.setattr(Assistant, "from_pretrained", lambda *_, **__: assistant)

    def run(data: Path, out: Path, *options: str, **others: Any) -> dict[str, Any]:
        every = ["custom.max_new_tokens=4", *options]
        return runner.evaluate(folder, ["custom"], data, out, options=every, **others)["custom"]

    return run


@pytest.fixture(scope="module")
def finished(folder: Path, assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811 the fixture
    """A finished evaluation: data and out, to be copied."""
    root = tmp_path_factory.mktemp("finished")
    write_data(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assistant, "from_pretrained", lambda *_, **__: assistant)
        options = ["custom.max_new_tokens=4"]
        found = runner.evaluate(folder, ["custom"], root / "data", root / "out", options=options)
    assert found["custom"]["run"]["answered_now"] == 3
    return root
