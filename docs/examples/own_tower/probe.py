"""Ask the frozen tower alone: a linear classifier on its features, for the same questions as the model is asked.

    python probe.py models/efficientnet-lite0-57934424.pth data/own_tower

It answers "what could a linear map see?", which is the score to hold beside the model's. Features are the means of the
49 tokens; the classifier is a logistic regression with an L2 penalty, fitted by L-BFGS.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinyllava_fast.models.vision.base import VISION, VisionTower
from tinyllava_fast.plugins import load_plugins

PENALTY = 1e-3
AT_MOST = 3_000  # pictures to learn from


def features(tower: VisionTower, files: list[Path]) -> Tensor:
    """Return the mean token of each picture, [pictures, 320]; transparency is drawn on white, as training does."""
    process, found = tower.image_processor(tower.image_size), []
    for begin in range(0, len(files), 32):
        pictures = []
        for file in files[begin : begin + 32]:
            picture = Image.open(file).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            pictures.append(white.convert("RGB"))
        with torch.inference_mode():
            found.append(tower(process(pictures, return_tensors="pt")["pixel_values"]).mean(1))
    return torch.cat(found)


def accuracy(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Fit [n, 320] against labels [n]; return the share of [m, 320] that is classified right."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, train.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            F.cross_entropy(F.linear(train, weight[:, :-1], weight[:, -1]), labels) + PENALTY * weight.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return (F.linear(test, weight[:, :-1], weight[:, -1]).argmax(1) == truth).float().mean().item()


def main() -> None:
    """Print the accuracy of each category of questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    load_plugins([str(Path(__file__).with_name("efficientnet_lite0.py"))])
    tower = VISION.get("efficientnet_lite0").from_config(
        {}, path=str(arguments.weights), feature_layer=-1, feature_select=None, where="tower"
    )
    records = [r for path in sorted(arguments.data.glob("train-*.json")) for r in json.loads(path.read_text())]
    questions = [json.loads(line) for line in (arguments.data / "questions.jsonl").read_text().splitlines()]
    for category in sorted({q["category"] for q in questions}):
        asked = [q for q in questions if q["category"] == category]
        names = sorted({q["answer"] for q in asked})
        known = [(r["image"], r["conversations"][-1]["value"]) for r in records]
        known = [(image, answer) for image, answer in known if answer in names][:AT_MOST]
        images = arguments.data / "images"
        train, test = (
            features(tower, [images / name for name in part])
            for part in ([k[0] for k in known], [q["image"] for q in asked])
        )
        labels, truth = (
            torch.tensor([names.index(a) for a in part])
            for part in ([k[1] for k in known], [q["answer"] for q in asked])
        )
        score = accuracy(train, labels, test, truth)
        error = (score * (1 - score) / len(asked)) ** 0.5
        print(f"{category}: {score:.1%} +- {error:.1%} of {len(asked)} ({len(known)} to learn from)")  # noqa: T201


if __name__ == "__main__":
    main()
