"""Streams as data sets: packs, workers, ranks, resumption, mixing, faults, memory that does not grow."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields

import numpy as np
import psutil
import pytest
import torch

from tests.data.test_loader import names, same
from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.config.sources import SourceConfig
from tinyllava_fast.data.balance import PackCosts
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.data.streamed import StreamedDataset
from tinyllava_fast.errors import CheckpointError, DataError, UserError
from tinyllava_fast.ops import pack_plan


@pytest.fixture
def shards(folder):
    """The records of the folder in three shards of JSONL."""
    rows = json.loads((folder / "data.json").read_text())
    (folder / "shards").mkdir()
    for number in range(3):
        text = "\n".join(json.dumps(row) for row in rows[number::3])
        (folder / "shards" / f"{number}.jsonl").write_text(text)
    return folder / "shards"


@pytest.fixture
def stream(shards, folder, tokenizer, processor):
    """Builds a StreamedDataset of the shards; keywords go to DataConfig or BatchConfig."""

    def build(seed=0, **settings):
        known = {f.name for f in fields(BatchConfig)}
        batch = {"tokens": 600, "max_segments": 24, "max_images": 5, "lookahead": 8}
        batch |= {k: v for k, v in settings.items() if k in known}
        data = {"image_folder": str(folder / "images"), "shuffle_buffer": 10}
        data |= {"records": str(shards), "stream": True} if "sources" not in settings else {}
        data |= {k: v for k, v in settings.items() if k not in known}
        return StreamedDataset(
            DataConfig(**data),
            BatchConfig(**batch),
            tokenizer=tokenizer,
            processor=processor,
            tokens_per_image=4,
            seed=seed,
        )

    return build


def loaded(dataset, **options):
    return Loader(dataset, **{"max_steps": 24, **options})


def test_every_record_is_seen_once_in_each_pass(stream):
    loader = loaded(stream(), max_steps=200)
    seen, epochs = [], []
    for batch in loader:
        seen.append(batch.sample_ids)
        epochs.append(loader.epoch)
    flat = [name for pack in seen for name in pack]
    passes = len(flat) // 24
    counts = np.bincount([int(name[1:]) for name in flat], minlength=24)
    # A block may reach into the next pass; nothing is left out or doubled but at the end.
    assert passes > 10 and set(counts.tolist()) <= {passes - 1, passes, passes + 1}
    assert epochs == sorted(epochs) and abs(epochs[-1] - passes) < 1.5
    assert flat[:24] != flat[24:48] and len({tuple(pack) for pack in seen}) > 100
    assert loader.steps_per_epoch == 200


def test_a_block_is_packed_by_the_rule_of_all_packs(stream):
    dataset = stream(shuffle_buffer=24)
    block = dataset._block(0)
    order = np.concatenate(sorted(block.packs, key=lambda pack: 0))  # every sample once
    assert sorted(order.tolist()) == list(range(24))
    from tinyllava_fast.data.mixing import epoch_order

    tickets = epoch_order([24], [24], 0, 0)
    columns = [torch.from_numpy(c[tickets]) for c in (block.pool.lengths, block.pool.images, block.pool.segments)]
    plan = pack_plan(*columns, 600, 5, 24, 8).numpy()
    expected = {tuple(tickets[plan == number].tolist()) for number in range(plan.max() + 1)}
    assert {tuple(pack.tolist()) for pack in block.packs} == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_build_the_packs_of_one_process(stream, workers):
    whole = list(loaded(stream(image_mode="anyres")))
    loader = loaded(stream(image_mode="anyres"), workers=workers, prefetch=2)
    found = list(loader)
    assert len(found) == 24 and all(same(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_position(stream, workers):
    whole = names(loaded(stream()))
    positions = (0, 1, 2, 3, 5, 8, 13, 24) if not workers else (1, 11)
    for position in positions:
        first = loaded(stream(), workers=workers)
        batches = iter(first)
        head = [next(batches).sample_ids for _ in range(position)]
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = loaded(stream(), workers=workers)
        second.load_state_dict(state)
        assert second.state_dict() == state and second.epoch == first.epoch
        assert head + names(second) == whole


def test_a_second_iteration_goes_on_and_looks_back(stream):
    whole = names(loaded(stream()))
    loader = loaded(stream(), workers=1, prefetch=16)  # far ahead: its blocks are no longer in memory
    batches = iter(loader)
    head = [next(batches).sample_ids for _ in range(3)]
    state = loader.state_dict()
    assert head + names(loader) == whole and names(loader) == []
    loader.load_state_dict(state)
    assert head + names(loader) == whole


@pytest.mark.parametrize("packs_per_step", [2, 4])
def test_ranks_share_the_steps_of_one_process(stream, packs_per_step):
    options = {"packs_per_step": packs_per_step, "max_steps": 6}
    alone = names(loaded(stream(), **options))
    first = loaded(stream(), **options)
    batches = iter(first)
    for _ in range(packs_per_step):
        next(batches)
    ranks = [loaded(stream(), **options, rank=r, world_size=2) for r in range(2)]
    parts = [names(loader) for loader in ranks]
    assert [item for pair in zip(*parts, strict=True) for item in pair] == alone
    assert len({repr(loader.state_dict()) for loader in ranks}) == 1
    for rank, loader in enumerate(ranks):  # more processes from the second step on
        loader.load_state_dict(first.state_dict())
        parts[rank] = names(loader)
    assert [item for pair in zip(*parts, strict=True) for item in pair] == alone[packs_per_step:]


def test_streams_and_whole_sources_mix_by_weight(stream, shards, folder):
    sources = [
        SourceConfig(path=str(shards), name="s", stream=True, weight=3),
        SourceConfig(path=str(folder / "data.json"), name="whole", weight=1),
        SourceConfig(path=str(shards / "1.jsonl"), name="t", stream=True, weight=1, turns="independent"),
    ]
    dataset = stream(sources=sources)
    loader = loaded(dataset, max_steps=60)
    found = list(loader)
    counts = np.array([batch.source_counts for batch in found]).sum(0)[:, 0]
    assert abs(counts / counts.sum() - [0.6, 0.2, 0.2]).max() < 0.03
    shown = [name for batch in found for name in batch.sample_ids]
    assert len(shown) == counts.sum()
    state = loaded(stream(sources=sources), max_steps=60)
    batches = iter(state)
    head = [next(batches).sample_ids for _ in range(31)]
    again = loaded(stream(sources=sources), max_steps=60, workers=2)
    again.load_state_dict(state.state_dict())
    assert head + names(again) == [batch.sample_ids for batch in found]


def test_faults_are_left_out_as_they_come(stream, shards, folder):
    lines = (shards / "2.jsonl").read_text().splitlines()
    long = json.loads(lines[0])
    long["conversations"][1]["value"] = "word " * 700
    broken = ["{", json.dumps({**json.loads(lines[1]), "conversations": []}), json.dumps(long)]
    (shards / "2.jsonl").write_text("\n".join([*lines[2:], *broken]))
    (folder / "images" / "1.png").write_bytes(b"")
    (folder / "images" / "4.png").unlink()
    with pytest.raises(DataError, match=r"malformed JSON|conversations: |is empty|image file is missing"):
        names(loaded(stream(), max_steps=60))
    dataset = stream(on_error="quarantine")
    loader = loaded(dataset, max_steps=60, workers=1)
    seen = {name for batch in loader for name in batch.sample_ids}
    assert seen == {f"r{n}" for n in range(24)} - {"r1", "r4", "r2", "r5"}
    assert len(loader.skipped) == 5 and {fault.kind for _, fault in dataset.faults.values()} == {"record", "size"}
    again = loaded(stream(on_error="skip"), max_steps=60)
    again.load_state_dict(loader.state_dict())
    assert again.skipped == loader.skipped


def test_a_stream_without_a_usable_record_is_an_error(stream, shards):
    for shard in shards.iterdir():
        text = shard.read_text()
        shard.write_text("\n".join(["{"] * 40) + "\n" + text)
    seen = {name for pack in names(loaded(stream(on_error="skip"), max_steps=60)) for name in pack}
    assert len(seen) == 24  # though whole blocks have nothing to show
    for shard in shards.iterdir():
        shard.write_text("\n".join(["{"] * 40))
    with pytest.raises(DataError, match=r"shards: every record was skipped; the first: .*\d.jsonl: line "):
        stream(on_error="skip")


def test_other_records_are_refused_on_resume(stream, shards):
    loader = loaded(stream())
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = loader.state_dict()
    text = (shards / "0.jsonl").read_text()
    (shards / "0.jsonl").write_text(text + "\n")
    with pytest.raises(CheckpointError, match="the records or the tokenizer's files differ"):
        loaded(stream()).load_state_dict(state)
    for shard in shards.iterdir():  # of the same size
        shard.write_text(shard.read_text().replace("picture", "pictuRe").rstrip())
    (shards / "0.jsonl").write_text(text.replace("picture", "pictuRe"))
    with pytest.raises(CheckpointError, match="the records at this place differ from those of the checkpoint"):
        loaded(stream()).load_state_dict(state)


def test_what_a_stream_cannot_have(stream, shards):
    with pytest.raises(UserError, match="max_steps: not given, and a stage with a stream"):
        Loader(stream(), epochs=1)
    other = SourceConfig(path="b.json", times=2)
    with pytest.raises(UserError, match="sources: 'shards' is a stream, whose records are not counted"):
        DataConfig(sources=[SourceConfig(path=str(shards), stream=True), other])
    with pytest.raises(UserError, match="'b' is a stream"):
        DataConfig(sources=[other], stream=True)


def test_the_reader_ends_with_its_loader_and_is_missed(stream):
    others = psutil.Process().children(recursive=True)  # of other tests, such as a forkserver
    loader = loaded(stream(), workers=2, max_steps=5000)
    next(iter(loader))
    children = [child for child in psutil.Process().children(recursive=True) if child not in others]
    reader = next(c for c in children if c.pid == loader.dataset._source._process.pid)
    loader.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and len(children) >= 4
    batches = iter(loader)
    next(batches)
    reader = loader.dataset._source._process.pid
    os.kill(reader, signal.SIGKILL)
    with pytest.raises(UserError, match="a process that prepares data was killed"):
        list(batches)
    loader.close()


def test_blocks_in_memory_do_not_grow(stream):
    loader = loaded(stream(), max_steps=150)
    for _ in loader:
        dataset = loader.dataset
        assert len(dataset._blocks) <= 2 and len(dataset._notes) <= 4 and len(loader._packs) <= 3
    assert loader._first[0] > 20


def test_ranks_share_a_mix(stream, shards, folder):
    sources = [
        SourceConfig(path=str(shards), name="s", stream=True, weight=3),
        SourceConfig(path=str(folder / "data.json"), name="whole", weight=2),
        SourceConfig(path=str(shards / "1.jsonl"), name="t", stream=True, weight=1),
    ]
    options = {"packs_per_step": 2, "max_steps": 30}
    alone = names(loaded(stream(sources=sources), **options))
    parts = [names(loaded(stream(sources=sources), **options, rank=r, world_size=2)) for r in range(2)]
    assert [item for pair in zip(*parts, strict=True) for item in pair] == alone


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_of_many_blocks_reads_each_once(stream, workers):
    """Its packs are looked at again when they are shared out, and built in another order."""
    options = {"packs_per_step": 8, "max_steps": 4}
    settings = {"shuffle_buffer": 3, "tokens": 120}
    alone = names(loaded(stream(**settings), **options))
    costs = PackCosts(pack=1.0, image=30.0, pair=0.1, text=1.0)
    shown = []
    for rank in range(2):
        dataset, read = stream(**settings), []
        of, dataset._read = dataset._read, lambda: (read.append(dataset._next), of())  # noqa: B023 called in this pass
        loader = loaded(dataset, **options, costs=costs, rank=rank, world_size=2, workers=workers)
        shown.append(names(loader))
        assert read == sorted(set(read)) and max(read) > 8, "no block is read a second time"
        assert len(dataset._blocks) < 8 and len(dataset._notes) < 12
    assert shown[0] != alone[::2]
    for step in range(4):
        both = [*shown[0][4 * step : 4 * step + 4], *shown[1][4 * step : 4 * step + 4]]
        assert sorted(both) == sorted(alone[8 * step : 8 * step + 8])
