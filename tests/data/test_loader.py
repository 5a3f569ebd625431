from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
import torch

from tinyllava_fast.data.balance import PackCosts
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.errors import CheckpointError, DataError, UserError


def names(loader):
    return [batch.sample_ids for batch in loader]


def same(a, b):
    ours, theirs = (batch.to("cpu").tensors() for batch in (a, b))
    return a.sample_ids == b.sample_ids and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_in_plan_order(make, workers):
    dataset = make()
    loader = Loader(dataset, packs_per_step=2, epochs=2, workers=workers, prefetch=2)
    expected = [[f"r{i}" for i in pack] for epoch in (0, 1) for pack in dataset.plan(epoch)]
    assert loader.steps == -(-len(expected) // 2)
    assert loader.steps_per_epoch == len(dataset.plan(0)) / 2
    got = list(loader)
    assert [b.sample_ids for b in got] == expected + [[]] * (len(expected) % 2)
    assert all(same(a, b) for a, b in zip(got, (dataset.pack(0, p) for p in dataset.plan(0)), strict=False))
    assert loader.epoch == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_position(make, workers):
    """The state counts what was consumed, not what workers have prepared."""
    whole = names(Loader(make(), epochs=2.5))
    positions = range(len(whole) + 1) if workers == 0 else (0, 1, len(whole) // 2, len(whole) - 1, len(whole))
    for position in positions:
        first = Loader(make(), epochs=2.5, workers=workers)
        stream = iter(first)
        head = [next(stream).sample_ids for _ in range(position)]
        state = first.state_dict()
        first.close()
        second = Loader(make(), epochs=2.5, workers=workers)
        second.load_state_dict(state)
        assert second.epoch == first.epoch and second.state_dict() == state
        assert head + names(second) == whole
        assert second.steps == first.steps


def test_a_second_iteration_goes_on_where_the_first_stopped(make):
    loader = Loader(make(), epochs=1)
    stream = iter(loader)
    head = [next(stream).sample_ids, next(stream).sample_ids]
    assert head + names(loader) == names(Loader(make(), epochs=1))
    assert names(loader) == []


@pytest.mark.parametrize("packs_per_step", [2, 4])
def test_ranks_share_the_steps_of_one_process(make, packs_per_step):
    alone = names(Loader(make(), packs_per_step=packs_per_step, epochs=1.6))
    ranks = [Loader(make(), packs_per_step=packs_per_step, epochs=1.6, rank=r, world_size=2) for r in range(2)]
    parts = [names(loader) for loader in ranks]
    assert len(parts[0]) == len(parts[1]) == len(alone) / 2
    assert [item for pair in zip(*parts, strict=True) for item in pair] == alone
    assert len({repr(loader.state_dict()) for loader in ranks}) == 1


def test_ranks_take_the_packs_of_a_step_by_their_work(make):
    """Whatever their number, a step has the packs that it has for one process, the padding of the last one too."""
    costs = PackCosts(pack=0.0, image=1000.0, pair=1.0, text=1.0)
    alone = names(Loader(make(), packs_per_step=4, epochs=1.6, costs=costs))
    for count in (2, 4):
        parts = [
            names(Loader(make(), packs_per_step=4, epochs=1.6, rank=rank, world_size=count, costs=costs))
            for rank in range(count)
        ]
        each = 4 // count
        for step in range(len(alone) // 4):
            taken = [pack for part in parts for pack in part[step * each : (step + 1) * each]]
            assert sorted(taken) == sorted(alone[4 * step : 4 * step + 4])
        assert [pack for packs in zip(*parts, strict=True) for pack in packs] != alone or count == 4


def test_world_size_may_change_between_steps(make):
    alone = names(Loader(make(), packs_per_step=2, epochs=2))
    first = Loader(make(), packs_per_step=2, epochs=2)
    stream = iter(first)
    for _ in range(4):
        next(stream)
    ranks = []
    for rank in range(2):
        loader = Loader(make(), packs_per_step=2, epochs=2, rank=rank, world_size=2)
        loader.load_state_dict(first.state_dict())
        ranks.append(names(loader))
    assert [item for pair in zip(*ranks, strict=True) for item in pair] == alone[4:]


def test_max_steps_and_the_empty_tail(make):
    loader = Loader(make(), packs_per_step=4, max_steps=5)
    assert (loader.steps, len(names(loader))) == (5, 20)
    assert all(names(Loader(make(), packs_per_step=4, max_steps=5)))  # never cut short, so never empty
    packs = len(make().plan(0))
    tail = list(Loader(make(), packs_per_step=packs + 1, epochs=1))
    assert [b.num_supervised > 0 for b in tail] == [True] * packs + [False]
    assert tail[-1].num_tokens == 0 and tail[-1].input_ids.shape == (600,)


def test_the_global_generator_is_left_alone(make):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    names(Loader(make(), workers=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_arrive_as_they_are(make, folder, workers):
    path = folder / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError) as error:
        names(Loader(make(), workers=workers))
    assert str(error.value).startswith(f"{folder / 'data.json'}: record id 'r1': image: ")
    assert "Traceback" not in str(error.value)
    loader = Loader(make(on_bad_image="skip"), epochs=2, workers=workers)
    seen = [name for batch in loader for name in batch.sample_ids]
    assert len(seen) == 2 * 23 and "r1" not in seen
    assert len(loader.skipped) == 1
    again = Loader(make(on_bad_image="skip"), epochs=2)
    again.load_state_dict(loader.state_dict())
    assert again.skipped == loader.skipped


def test_a_killed_worker_is_not_waited_for(make):
    loader = Loader(make(), epochs=50, workers=1, prefetch=1)
    stream = iter(loader)
    next(stream)
    os.kill(loader._stream._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(stream)


def test_wrong_settings(make):
    with pytest.raises(UserError, match=r"batch.packs_per_step: 3 is not a multiple of the 2 processes; try 4"):
        Loader(make(), packs_per_step=3, world_size=2)
    state = Loader(make()).state_dict()
    with pytest.raises(CheckpointError, match=r"data.json: the records or the tokenizer's files differ from"):
        Loader(make(seed=1)).load_state_dict(state)
    for old in ({**state, "order": 1}, {k: v for k, v in state.items() if k != "order"}):
        with pytest.raises(CheckpointError, match=r"data.json: the checkpoint is of a version that put the packs"):
            Loader(make()).load_state_dict(old)


def test_pixels_travel_in_8_bits_and_arrive_as_they_were(make, monkeypatch):
    """Through shared memory, whose slots go round many times, and through the pipe where there is none to share."""
    dataset = make(image_multiple=3)
    whole = [dataset.pack(epoch, pack) for epoch in range(6) for pack in dataset.plan(epoch)]
    for refuse in (False, True):
        if refuse:
            monkeypatch.setattr("mmap.mmap", lambda *_: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
        found = list(Loader(dataset, epochs=6, workers=2, prefetch=1))
        assert all(batch.pixel_values.dtype == torch.uint8 for batch in found)
        assert all(same(a, b) for a, b in zip(found, whole, strict=True))
    assert any(batch.num_blank for batch in whole)


def test_a_worker_far_ahead_overwrites_nothing(make):
    dataset = make()
    loader = Loader(dataset, epochs=4, workers=1, prefetch=2)
    expected = [dataset.pack(epoch, pack) for epoch in range(4) for pack in dataset.plan(epoch)]
    stream = iter(loader)
    found = [next(stream)]
    time.sleep(0.5)  # the worker goes as far ahead as it may
    found += list(stream)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def _leave(make, started):
    stream = iter(Loader(make(), epochs=50, workers=2))
    next(stream)
    started.put([p.pid for p in multiprocessing.active_children()])
    globals()["held"] = stream  # alive until the interpreter ends, as a variable of a script is


def test_a_script_that_leaves_a_loader_unfinished_ends(make):
    """Python waits for its processes when it exits; workers that wait for a signal of it would wait for ever."""
    context = multiprocessing.get_context("fork")
    started = context.SimpleQueue()
    script = context.Process(target=_leave, args=(make, started))
    script.start()
    try:
        workers = started.get()
        script.join(20)
        assert script.exitcode == 0
    finally:
        script.kill()
    assert len(workers) == 2 and not any(psutil.pid_exists(pid) for pid in workers)


def test_close_ends_a_worker_that_hangs(make, monkeypatch):
    dataset = make()
    monkeypatch.setattr(dataset, "levels", lambda epoch, indices: time.sleep(600))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    loader = Loader(dataset, epochs=2, workers=1)
    thread = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        thread.start()
        with pytest.raises(TimeoutError):
            next(iter(loader))
        workers = multiprocessing.active_children()
        loader.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(workers) == 1 and not workers[0].is_alive()
