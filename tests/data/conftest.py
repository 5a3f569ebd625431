"""A small data set on disk: records of every kind, images of every mode, a tiny tokenizer."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from tests.vectors import GOLDEN
from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.tokenizer import load_tokenizer

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizers" / "llama_spm")


@pytest.fixture(scope="session")
def processor():
    from transformers import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _talk(*values, **more):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)], **more}


@pytest.fixture
def talk():
    return _talk


@pytest.fixture
def make(folder, tokenizer, processor):
    """Builds a PackedDataset of the folder; keywords go to DataConfig or BatchConfig, rows replace the records."""

    def build(rows=None, seed=0, tokens_per_image=4, split=None, **settings):
        if rows is not None:
            (folder / "data.json").write_text(json.dumps(rows))
        known = {f.name for f in fields(BatchConfig)}
        batch = {"tokens": 600, "max_segments": 24, "max_images": 5, "lookahead": 8}
        batch |= {k: v for k, v in settings.items() if k in known}
        data = {"records": str(folder / "data.json"), "image_folder": str(folder / "images")}
        data |= {k: v for k, v in settings.items() if k not in known}
        return PackedDataset(
            DataConfig(**data),
            BatchConfig(**batch),
            tokenizer=tokenizer,
            processor=processor,
            tokens_per_image=tokens_per_image,
            seed=seed,
            split=split,
        )

    return build


@pytest.fixture
def folder(tmp_path):
    """24 records: every third is text alone; the others have one to four turns about a coloured image."""
    rows = []
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        color = list(COLORS)[number % 3]
        turns = [f"What is shown in picture {number}?", color]
        for extra in range(int(generator.integers(0, 4))):
            turns += [f"And question {extra}?", "yes " * int(generator.integers(1, 6))]
        row = _talk(*turns, id=f"r{number}")
        if number % 3:
            row["image"] = f"{number}.png"
            row["conversations"][0]["value"] = "<image>\n" + turns[0]
            picture = Image.new("RGB", (20 + number, 16), COLORS[color])
            picture.paste((255, 255, 255), (2, 2, 9, 7))
            picture.save(tmp_path / "images" / row["image"])
        rows.append(row)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path
