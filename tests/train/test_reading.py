"""The reading of pictures: settled at the start of a stage, kept in model folders and checkpoints, the same in use."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny import make_engine, make_model, make_tokenizer, tiny_config
from tinyllava_fast.config.load import load_run
from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.data.dataset import PackedDataset
from tinyllava_fast.data.pictures import REFERENCE, UPRIGHT, PictureReading
from tinyllava_fast.infer.types import Request
from tinyllava_fast.models.build import build_image_processor
from tinyllava_fast.models.io import read_config, save_model
from tinyllava_fast.train.checkpoint import TrainState
from tinyllava_fast.train.loop import train
from tinyllava_fast.train.reading import settle_reading

MIXED = PictureReading("upright", "drop")


@pytest.mark.parametrize(
    ("keys", "before", "expected"),
    [
        ({}, None, UPRIGHT),
        ({}, REFERENCE, REFERENCE),
        ({}, UPRIGHT, UPRIGHT),
        ({"orientation": "upright"}, REFERENCE, MIXED),
        ({"background": "drop"}, None, MIXED),
        ({"orientation": "stored", "background": "drop"}, UPRIGHT, REFERENCE),
    ],
)
def test_keys_then_the_model_then_upright_on_white(keys, before, expected):
    state = TrainState(stage="finetune")
    assert settle_reading(state, DataConfig(**keys), before, resumed=False) == expected
    assert settle_reading(TrainState(**json.loads(json.dumps(vars(state)))), DataConfig(), None, True) == expected
    assert settle_reading(TrainState(stage="finetune"), DataConfig(), UPRIGHT, resumed=True) == REFERENCE


def turn(folder: Path) -> None:
    """Mark the run's pictures as turned, and let a corner be clear."""
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        image = Image.open(path).convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 9, 5))
        exif = image.getexif()
        exif[0x0112] = number % 8 + 1
        image.save(path, exif=exif)


def test_a_run_keeps_its_reading(tiny_run, losses):
    path = tiny_run(stages__pretrain__max_steps=2, stages__finetune__max_steps=2)
    turn(path.parent / "images")
    run = path.parent / "run"
    train(load_run(path))
    upright = losses(run)
    assert {read_config(run / name)[0].reading for name in ("pretrain", "final")} == {UPRIGHT}

    def again(name: str, *overrides: str) -> tuple[list, PictureReading]:
        train(load_run(path, [f"output_dir={path.parent / name}", *overrides]))
        return losses(path.parent / name), read_config(path.parent / name / "final")[0].reading

    first = ["stages.pretrain.data.orientation=stored", "stages.pretrain.data.background=drop"]
    stored, reading = again("stored", *first)  # what the second stage is not told it takes from the first
    assert reading == REFERENCE and stored != upright
    explicit, _ = again("explicit", *first, *(key.replace("pretrain", "finetune") for key in first))
    assert explicit == stored
    _, reading = again("other", *first, "stages.finetune.data.background=white")
    assert reading == PictureReading("stored", "white")
    _, reading = again("further", f"model={{path: {path.parent / 'stored' / 'final'}}}")
    assert reading == REFERENCE
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["reading"] == {"orientation": "upright", "background": "white"}
    del config["reading"]  # a folder of an earlier version
    (run / "final" / "config.json").write_text(json.dumps(config))
    assert read_config(run / "final")[0].reading == REFERENCE
    _, reading = again("old", f"model={{path: {run / 'final'}}}")
    assert reading == REFERENCE


@pytest.mark.parametrize("kind", ["new", "old"])
def test_pictures_do_not_change_when_a_run_resumes(tiny_run, losses, kind):
    """old: a checkpoint of a version that knew no reading, and so saw pictures the reference's way."""
    path = tiny_run()
    turn(path.parent / "images")
    steps = ["stages.pretrain.max_steps=1", "stages.finetune.max_steps=3", "checkpoint.every_steps=1"]
    old = [
        f"stages.{s}.data.{key}" for s in ("pretrain", "finetune") for key in ("orientation=stored", "background=drop")
    ]
    run = path.parent / "run"
    train(load_run(path, [*steps, *(old if kind == "old" else [])]))
    lines = losses(run)
    shutil.rmtree(max(p for p in (run / "checkpoints").iterdir() if p.is_dir()))
    for file in (run / "checkpoints").glob("*/state.json"):
        state = json.loads(file.read_text())
        del state["checksums"]
        if kind == "old":
            del state["readings"]
            for stage in state["config"]["stages"]:
                del stage["data"]["orientation"], stage["data"]["background"]
        file.write_text(json.dumps(state))
        (file.parent / "checksums.json").unlink()
    train(load_run(path, steps))
    assert losses(run) == lines
    assert read_config(run / "final")[0].reading == (REFERENCE if kind == "old" else UPRIGHT)


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@pytest.mark.parametrize("reading", [UPRIGHT, REFERENCE, MIXED, PictureReading("stored", "white")])
def test_training_and_inference_see_the_same_pixels(reading, mode, tmp_path):
    lmm, tokenizer, processor = make_model(), make_tokenizer(), build_image_processor(tiny_config())
    lmm.config = replace(lmm.config, reading=reading)
    save_model(lmm, tokenizer, processor, tmp_path / "final")
    assert read_config(tmp_path / "final")[0].reading == reading
    rows = []
    for number, (kind, picture) in enumerate(
        (kind, picture) for kind in ("RGBA", "LA", "P", "RGB", "I;16") for picture in range(1, 9)
    ):
        grey = Image.linear_gradient("L").resize((70, 30))
        image = grey.convert("I;16").point(lambda v: v * 257) if kind == "I;16" else grey.convert(kind)
        if kind in ("RGBA", "LA"):
            image.putalpha(Image.linear_gradient("L").rotate(90).resize((70, 30)))
        exif = Image.Exif()
        exif[0x0112] = picture
        image.save(tmp_path / f"{number}.png", exif=exif, **({"transparency": 3} if kind == "P" else {}))
        turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "records.json").write_text(json.dumps(rows))
    data = DataConfig(
        records=str(tmp_path / "records.json"), image_folder=str(tmp_path), image_mode=mode, **vars(reading)
    )
    dataset = PackedDataset(
        data,
        BatchConfig(tokens=4096, max_images=99),
        tokenizer=tokenizer,
        processor=processor,
        tokens_per_image=lmm.tokens_per_image,
        seed=0,
    )
    engine = make_engine(lmm, tokenizer, image_mode=mode)
    for number in range(len(rows)):
        path = tmp_path / f"{number}.png"
        expected = dataset.pack(0, [number]).pixel_values
        with Image.open(path) as opened:
            for shown in (path, str(path), path.read_bytes(), opened):
                request = Request.ask("q", shown)
                (image,) = request.images
                pixels, counts, _ = engine._images._pixels([(0, image, "r")])
                assert torch.equal(pixels, expected) and sum(counts) == len(expected), (number, type(shown))
                assert engine._images.rows(image) == len(expected) * lmm.tokens_per_image
