"""The samples of the training benchmarks: records of easy-VQA, and packs taken apart for the peer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from tinyllava_fast.bench import samples
from tinyllava_fast.bench.samples import pad, unpack
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.lmm import LMM


def test_records_are_conversations_about_one_image(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    path, images = samples.write_easy_vqa(tmp_path, 3)
    records = json.loads(path.read_text())
    assert len(records) == 3 and all((images / r["image"]).is_file() for r in records)
    turns = records[0]["conversations"]
    assert turns[0]["value"].startswith("<image>\n") and [t["from"] for t in turns[:2]] == ["human", "gpt"]
    assert "<image>" not in turns[2]["value"] and len(turns) % 2 == 0 and len(turns) >= 4
    with pytest.raises(UserError, match="easy-VQA has"):
        samples.write_easy_vqa(tmp_path, 10**6)


def test_unpack_gives_back_every_label_and_image(lmm: LMM, packs: list[PackedBatch]) -> None:
    pack = packs[0]
    samples = unpack(pack, 4, 96)
    assert [len(s.input_ids) for s in samples] == pack.cu_seqlens.diff().tolist()
    assert all(int((s.input_ids == 96).sum()) == 4 for s in samples)
    assert sum(int((s.labels != -100).sum()) for s in samples) == pack.num_supervised
    for i, s in enumerate(samples):
        named = s.labels != -100
        assert torch.equal(s.labels[named], s.input_ids[named])
        assert torch.equal(s.pixel_values, pack.pixel_values[i])


def test_pad_is_right_padding_to_the_longest(packs: list[PackedBatch]) -> None:
    batch = pad(unpack(packs[0], 4, 96)[:3], pad_token=7)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 31)
    assert batch["attention_mask"].sum(1).tolist() == [20, 31, 9]
    assert (batch["input_ids"][0, 20:] == 7).all() and (batch["labels"][0, 20:] == -100).all()
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_a_sample_without_image_is_refused(packs: list[PackedBatch]) -> None:
    pack = copy.deepcopy(packs[0])
    pack.image_slots[:4] = len(pack.input_ids)
    with pytest.raises(UserError, match="sample 0 has 0"):
        unpack(pack, 4, 96)
