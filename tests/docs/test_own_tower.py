"""The example "bring your own tower and data", without its downloads."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinyllava_fast.config.load import load_run
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.plugins import load_plugins

FOLDER = Path(__file__).parents[2] / "docs" / "examples" / "own_tower"


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    """The plugin, whose tower is unknown again after these tests: others go over all towers."""
    load_plugins([str(FOLDER / "efficientnet_lite0.py")])
    module = VISION.get("efficientnet_lite0").__module__
    yield sys.modules[module]
    del VISION._entries["efficientnet_lite0"], sys.modules[module]


def published(plugin: ModuleType) -> dict[str, Tensor]:
    """Random weights under the published names, batch normalization beside each convolution."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(conv: str, norm: str, out: int, width: int, kernel: int) -> None:
        shape = (out, width, kernel, kernel)
        state[f"{conv}.weight"] = torch.randn(shape, generator=generator) / (width * kernel**2) ** 0.5
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(out, generator=generator) + 0.5

    add("_conv_stem", "_bn0", 32, 3, 3)
    width, number = 32, 0
    for expansion, kernel, _, out, count in plugin.STAGES:
        for _ in range(count):
            block, wide = f"_blocks.{number}.", width * expansion
            if expansion > 1:
                add(block + "_expand_conv", block + "_bn0", wide, width, 1)
            add(block + "_depthwise_conv", block + "_bn1", wide, 1, kernel)
            add(block + "_project_conv", block + "_bn2", out, wide, 1)
            width, number = out, number + 1
    return state


def network(state: dict[str, Tensor], plugin: ModuleType, x: Tensor) -> Tensor:
    """The published network as it is described: no folding, TensorFlow's padding."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        missing = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        values = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, training=False, eps=plugin.EPSILON)

    x, number = F.relu6(layer(x, "_conv_stem", "_bn0", 2)), 0
    for expansion, _, stride, _, count in plugin.STAGES:
        for first in [True] + [False] * (count - 1):
            block, y = f"_blocks.{number}.", x
            if expansion > 1:
                y = F.relu6(layer(y, block + "_expand_conv", block + "_bn0"))
            y = F.relu6(layer(y, block + "_depthwise_conv", block + "_bn1", stride if first else 1, y.shape[1]))
            y = layer(y, block + "_project_conv", block + "_bn2")
            x = x + y if x.shape == y.shape else y
            number += 1
    return x.flatten(2).transpose(1, 2)


def test_the_tower_is_the_published_network(plugin, tmp_path):
    state = published(plugin)
    torch.save(state, tmp_path / "weights.pth")
    tower = plugin.EfficientNetLite0.from_config(
        {}, path=str(tmp_path / "weights.pth"), feature_layer=-1, feature_select=None, where="model.vision"
    )
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, expected = tower(pixels), network(state, plugin, pixels)
    assert found.shape == (2, tower.num_tokens, tower.hidden_size)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_other_weights_are_refused(plugin, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: expected EfficientNet-Lite0's weights; '_bn0"):
        plugin.EfficientNetLite0.from_config(
            {}, path=str(tmp_path / "weights.pth"), feature_layer=-1, feature_select=None, where="model.vision"
        )
    with pytest.raises(UserError, match="feature_layer: -2: this tower is read at its end; set -1"):
        plugin.EfficientNetLite0.from_config({}, feature_layer=-2, feature_select=None, where="model.vision")


def test_the_configuration_is_one_of_this_version():
    config = load_run(FOLDER / "own_tower.yaml", ["plugins=[]", "model.vision.type=siglip"])
    assert [stage.name for stage in config.stages] == ["pretrain", "finetune"]
    assert all(stage.recipe.vision.tune == "frozen" and stage.data.feature_cache for stage in config.stages)


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file."""
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())


def test_records_of_both_packages(tmp_path):
    fashion, drawn = (tmp_path / "usr/share" / name for name in ("datasets/fashion-mnist", "tuxpaint/stamps"))
    (drawn / "animals/cartoon").mkdir(parents=True)
    fashion.mkdir(parents=True)
    pixels = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28)
    for part in ("train", "t10k"):
        (fashion / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (fashion / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.array([7, 0, 9], np.uint8)))
    for number in range(20):
        for folder in ("", "cartoon/"):
            file = drawn / "animals" / f"{folder}{'abcdefghijklmnopqrst'[number]}ird.png"
            Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file)
            file.with_suffix(".txt").write_text(f"Bird {number}.\nde.utf8=Vogel.")
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "records.py"), str(tmp_path), str(out), "--train", "2", "--test", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    clothes, stamps = (json.loads((out / f"train-{name}.json").read_text()) for name in ("clothes", "stamps"))
    assert [r["conversations"][1]["value"] for r in clothes] == ["A sneaker.", "A T-shirt."]
    assert (np.array(Image.open(out / "images" / clothes[1]["image"]))[..., 0] == pixels[1]).all()
    questions = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert questions[0]["answer"] == "A sneaker." and {q["answer"] for q in questions[1:]} == {"an animal"}
    asked, learnt = ({name.split("-")[-1] for name in names} for names in (
        [q["image"] for q in questions[1:]], [r["image"] for r in stamps]
    ))  # fmt: skip
    assert len(asked) + len(learnt) == 20 and asked and not asked & learnt  # a bird's two pictures stay together


def test_the_probe_separates_what_is_separable():
    spec = importlib.util.spec_from_file_location("probe", FOLDER / "probe.py")
    assert spec is not None and spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    points = torch.randn(90, 5, generator=generator) + 6 * F.one_hot(labels, 5)
    assert probe.accuracy(points[:60], labels[:60], points[60:], labels[60:]) == 1.0
    assert probe.accuracy(points[:60], labels[:60], points[60:], (labels[60:] + 1) % 3) == 0.0
