"""A tiny benchmark folder in easy-VQA's layout, and the tiny model folder of the inference tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.infer.conftest import folder, lmm, tokenizer  # noqa: F401 fixtures


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
