import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyllava_fast import group
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.train import checkpoint, seed, tensor_writer
from tinyllava_fast.train.checkpoint import (
    CheckpointStore,
    TrainState,
    another,
    load_rng,
    load_state,
)
from tinyllava_fast.train.engine.base import LazyTensor, whole_state
from tinyllava_fast.train.tensor_reader import open_tensors
from tinyllava_fast.train.tensor_writer import write_tensors


class FakeEngine:
    """The parts of an engine that the store uses."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self):
        self.weight = torch.arange(6.0).reshape(2, 3)

    def model_state(self):
        return [LazyTensor.of("w", self.weight), LazyTensor.of("b", torch.ones(4, dtype=torch.bfloat16))]

    def optimizer_state(self):
        return [LazyTensor.of("step", torch.tensor(3.0)), LazyTensor.of("exp_avg/w", self.weight * 2)]

    def saved_state(self):
        return whole_state(self)

    def all_reduce_sum(self, tensor):
        return tensor

    def barrier(self):
        pass


def state(step, stage="finetune"):
    return TrainState(
        stage=stage,
        stage_index=1,
        stage_step=step,
        step=step,
        loader={"epoch": 0, "pack": step, "fingerprint": 1, "skipped": []},
    )


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_written_tensors_read_back_with_the_safetensors_library(tmp_path):
    tensors = {
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3, 5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
    }
    path = tmp_path / "t.safetensors"
    write_tensors(path, [LazyTensor.of(n, t) for n, t in tensors.items()], metadata={"note": "ü"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with open_tensors(path) as opened:
        assert opened.metadata == {"note": "ü"} and set(opened) == set(tensors)


def test_save_and_latest(store):
    assert store.latest() is None and store.names() == []
    path = store.save(state(3), FakeEngine())
    assert store.latest() == path and path.name == "finetune-00000003"
    assert load_state(path) == state(3)
    assert torch.equal(load_file(path / "model.safetensors")["w"], FakeEngine().weight)
    assert sorted(p.name for p in path.iterdir()) == [
        "checksums.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
    ]


def test_only_the_newest_stay_and_latest_moves(store):
    for step in (1, 2, 3, 4):
        store.save(state(step), FakeEngine())
    assert store.names() == ["finetune-00000003", "finetune-00000004"]
    assert (store.folder / "latest").read_text() == "finetune-00000004\n"
    store.clear()
    assert not store.folder.exists()


def test_a_newer_damaged_checkpoint_goes_before_the_good_one_that_was_named(store):
    good, damaged = (store.save(state(step), FakeEngine()) for step in (1, 2))
    (damaged / "model.safetensors").write_bytes(b"cut")
    later = CheckpointStore(store.folder, keep=2)
    assert later.verified(good) == ""
    later.save(state(3, "other"), FakeEngine())
    assert later.names() == [good.name, "other-00000003"]


def test_a_checkpoint_that_has_lost_its_checksums_is_damaged(store):
    folder = store.save(state(1), FakeEngine())
    (folder / "checksums.json").unlink()
    assert store.verified(folder) == f"{folder / 'checksums.json'}: missing"
    content = json.loads((folder / "state.json").read_text())
    del content["checksums"]  # as older versions wrote it
    (folder / "state.json").write_text(json.dumps(content))
    assert store.verified(folder) == ""


def test_keep_one(store):
    store.keep = 1
    for step in (1, 2, 3):
        store.save(state(step), FakeEngine())
    assert store.names() == ["finetune-00000003"]


def test_saving_a_step_again_replaces_it(store):
    engine = FakeEngine()
    store.save(state(1), engine)
    engine.weight = engine.weight + 1
    path = store.save(state(1), engine)
    assert torch.equal(load_file(path / "model.safetensors")["w"], engine.weight)
    assert not list(store.folder.glob(".tmp-*"))


def test_latest_falls_back_to_the_newest_complete_one(store):
    store.save(state(1), FakeEngine())
    second = store.save(state(2), FakeEngine())
    (store.folder / "latest").unlink()
    assert store.latest() == second
    (store.folder / "latest").write_text("finetune-00000099\n")
    assert store.latest() == second
    (store.folder / "latest").write_text("finetune-00000001\n")
    assert store.latest().name == "finetune-00000001"


def test_a_half_written_folder_is_ignored_and_cleaned(store):
    path = store.save(state(1), FakeEngine())
    stale = store.folder / ".tmp-finetune-00000002"
    stale.mkdir()
    (stale / "state.json").write_text("{}")
    (store.folder / ".tmp-latest").write_text("x")
    assert store.latest() == path and store.names() == [path.name]
    store.clean()
    assert not list(store.folder.glob(".tmp-*")) and store.latest() == path


@pytest.mark.parametrize("victim", ["_bytes_of", "write_file", "sync", "put_folder"])
def test_a_full_disk_keeps_the_previous_checkpoint(store, monkeypatch, victim):
    path = store.save(state(1), FakeEngine())
    monkeypatch.setattr(tensor_writer if victim == "_bytes_of" else checkpoint, victim, no_space)
    with pytest.raises(CheckpointError, match=r"00000002: could not be saved: .*No space left.*; free some space"):
        store.save(state(2), FakeEngine())
    assert store.names() == [path.name] and store.latest() == path
    assert not list(store.folder.glob(".tmp-finetune*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [8, 2**20])
def test_a_device_without_space_is_an_error_once_all_is_fetched(size):
    """A real ENOSPC, both while writing and while flushing the rest."""
    fetched = []
    items = [
        LazyTensor(str(i), (size,), torch.float32, lambda i=i: fetched.append(i) or torch.zeros(size)) for i in (0, 1)
    ]
    with pytest.raises(UserError, match="/dev/full: cannot be written: No space left"):
        write_tensors(Path("/dev/full"), items)
    assert fetched == [0, 1]  # other ranks wait in the same gathers


def test_another_rank_that_fails_stops_this_one(store, monkeypatch):
    monkeypatch.setattr(group, "gather", lambda item: [item, ("rng-1.safetensors: cannot be written", {})])
    with pytest.raises(CheckpointError, match=r"00000001: could not be saved: rank 1: rng-1\.safetensors: cannot"):
        store.save(state(1), FakeEngine())
    assert store.names() == []


def test_other_ranks_write_their_share(store):
    engine = FakeEngine()
    engine.rank, engine.world_size = 1, 2
    store.save(state(1), engine)
    folder = store.folder / ".tmp-finetune-00000001"  # which the first rank publishes
    assert sorted(p.name for p in folder.iterdir()) == [
        "model-1.safetensors",
        "optimizer-1.safetensors",
        "rng-1.safetensors",
    ]
    assert set(load_file(folder / "model-1.safetensors")) == {"b"}
    engine.rank = 0
    path = store.save(state(1), engine)
    with open_tensors(path / "model.safetensors") as tensors:
        assert set(tensors) == {"w", "b"} and torch.equal(tensors["w"], engine.weight)
    (path / "model-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: is one of 2 files, of which 1 are there"):
        open_tensors(path / "model.safetensors")


def test_truncated_and_missing_files_are_named(store):
    path = store.save(state(1), FakeEngine())
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged"):
        open_tensors(file)
    assert "no other checkpoint lies beside it: start over with --resume never" in another(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
        open_tensors(file)


def test_state_that_cannot_be_read(store):
    path = store.save(state(1), FakeEngine())
    with pytest.raises(CheckpointError, match=r"not a checkpoint, it has no state\.json; it holds finetune-00000001"):
        load_state(store.folder)
    content = asdict(state(1))
    for text, message in (
        ("{", "damaged"),
        (json.dumps({**content, "extra": 1}), "damaged"),
        (json.dumps({**content, "format": 99}), "format 99, this version reads 1"),
    ):
        (path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_state(path)


def test_random_state_of_a_rank(store):
    seed.seed_everything(7)
    path = store.save(state(1), FakeEngine())
    expected = torch.rand(4)
    seed.seed_everything(8)
    load_rng(path, 0)
    assert torch.equal(torch.rand(4), expected)
    load_rng(path, 5)  # a rank that the checkpoint did not have: a warning, no error
