"""The samples of `tlf-bench train`: easy-VQA as multi-turn LLaVA records, packed for us and plain for the peer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.data.types import IGNORE_INDEX, PackedBatch
from tinyllava_fast.errors import UserError


def read_easy_vqa(command: str) -> tuple[dict[int, list[tuple[str, str]]], dict[int, Path]]:
    """Return easy-VQA's training questions, {image: [(question, answer)]}, and {image: file}.

    UserError, which names the command, if the PyPI package is not installed.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError:
        raise UserError(f"{command} takes its samples from easy-VQA; run `pip install easy-vqa`") from None
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        questions.setdefault(image, []).append((question, answer))
    return questions, {image: Path(path) for image, path in easy_vqa.get_train_image_paths().items()}


def write_easy_vqa(folder: Path, count: int) -> tuple[Path, Path]:
    """Write the first ``count`` training images' questions as LLaVA records, one conversation an image.

    Returns (records file, image folder); the images stay in the PyPI package. UserError if it is not installed or has
    fewer images.
    """
    questions, images = read_easy_vqa("tlf-bench train")
    if count > len(questions):
        raise UserError(f"{count} records asked for, easy-VQA has {len(questions)}; lower --rounds or --steps")
    records = []
    for image in sorted(questions)[:count]:
        turns: list[dict[str, str]] = []
        for index, (question, answer) in enumerate(questions[image]):
            turns.append({"from": "human", "value": ("<image>\n" if index == 0 else "") + question})
            turns.append({"from": "gpt", "value": answer})
        records.append({"id": str(image), "image": images[image].name, "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path, next(iter(images.values())).parent


def build_packs(
    run: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    processor: BaseImageProcessor,
    tokens_per_image: int,
    *,
    per_step: int,
) -> list[PackedBatch]:
    """Pack the run's records in file order, ``per_step`` of them a pack.

    The budget is the longest pack's, rounded up to 64. Every pack has the same shape, as in training, and exactly the
    samples of the peer's padded batch.
    """
    from tinyllava_fast.data.dataset import PackedDataset

    stage = run.stages[0]

    def dataset(tokens: int) -> PackedDataset:
        batch = replace(stage.batch, tokens=tokens, max_images=per_step, max_segments=per_step)
        return PackedDataset(
            stage.data,
            batch,
            tokenizer=tokenizer,
            processor=processor,
            tokens_per_image=tokens_per_image,
            seed=run.seed,
        )

    lengths = torch.as_tensor(dataset(1 << 20).lengths)
    if len(lengths) % per_step:
        raise UserError(f"{len(lengths)} usable records are not a multiple of {per_step} samples a step")
    longest = int(lengths.view(-1, per_step).sum(1).max())
    packs = dataset(-(-longest // 64) * 64)
    indices = torch.arange(len(lengths)).view(-1, per_step).numpy()
    return [packs.pack(0, row) for row in indices]


@dataclass(frozen=True)
class PlainSample:
    """One sample as a transformers user has it."""

    input_ids: Tensor  # [n] int64; image positions hold the image token
    labels: Tensor  # [n] int64; not shifted
    pixel_values: Tensor  # [3, H, W] float32


def unpack(batch: PackedBatch, tokens_per_image: int, image_token: int) -> list[PlainSample]:
    """Return a pack's samples in the layout of LlavaForConditionalGeneration; each of them has exactly one image."""
    ids = batch.input_ids.clone()
    total = len(ids)
    slots = batch.image_slots.view(-1, tokens_per_image)  # [N, K]
    used = slots[slots[:, 0] < total]
    ids[used.flatten()] = image_token
    bounds = batch.cu_seqlens.tolist()
    samples: list[PlainSample] = []
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        labels = torch.full((stop - start,), IGNORE_INDEX)
        labels[1:] = batch.labels[start : stop - 1]  # a pack's labels are already shifted, transformers shifts again
        image = ((used[:, 0] >= start) & (used[:, 0] < stop)).nonzero().flatten()
        if len(image) != 1:
            raise UserError(f"the peer takes samples with one image each; sample {len(samples)} has {len(image)}")
        samples.append(PlainSample(ids[start:stop], labels, batch.pixel_values[image[0]]))
    return samples


def pad(samples: list[PlainSample], pad_token: int) -> dict[str, Tensor]:
    """Return a right-padded batch: input_ids, labels, attention_mask [B, longest] and pixel_values [B, 3, H, W]."""
    pad_rows = torch.nn.utils.rnn.pad_sequence
    ids = [s.input_ids for s in samples]
    return {
        "input_ids": pad_rows(ids, batch_first=True, padding_value=pad_token),
        "labels": pad_rows([s.labels for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_rows([torch.ones_like(x) for x in ids], batch_first=True, padding_value=0),
        "pixel_values": torch.stack([s.pixel_values for s in samples]),
    }
