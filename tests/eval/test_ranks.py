"""The environment that torchrun sets, and what else sets parts of it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest
from torch.distributed import TCPStore

from tests.test_group import answers_of
from tinyllava_fast.errors import LostError, UserError
from tinyllava_fast.eval.ranks import Ranks

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def of(monkeypatch: pytest.MonkeyPatch, **values: str) -> Ranks:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return Ranks.of_torchrun()


def test_whole_or_not_there(monkeypatch):
    assert of(monkeypatch) == Ranks(0, 1, 0) == of(monkeypatch, RANK="", WORLD_SIZE="")
    assert of(monkeypatch, **WHOLE) == Ranks(1, 2, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "abc"}, "variable RANK: expected a whole number, got 'abc'"),
        ({"WORLD_SIZE": "-1"}, "variable WORLD_SIZE: expected a whole number"),
        ({"LOCAL_RANK": "1.0"}, "variable LOCAL_RANK: expected a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK is 1 and WORLD_SIZE 0"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2; start with torchrun, or unset both"),
        ({"RANK": ""}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2 but MASTER_ADDR is not set; start all processes with torchrun"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 2 but MASTER_PORT is not set"),
    ],
)
def test_a_part_of_it_is_found_before_anything_is_asked(monkeypatch, changes, said):
    with pytest.raises(UserError, match=said):
        of(monkeypatch, **{**WHOLE, **changes})


def one_dies() -> str:
    """Rank 1 is killed while rank 0 waits for it."""
    with Ranks.of_torchrun().together():
        pass
    try:
        with Ranks.of_torchrun().together():
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
    except LostError as error:
        return str(error)
    return "nothing happened"


def told_that_one_died() -> str:
    """Rank 1 is killed while rank 0 answers questions, and torchrun tells it to end."""
    try:
        with Ranks.of_torchrun().together():
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            except Exception:  # as where a picture is read: the answer would be stored as an empty one
                return "taken for a fault of the data"
    except LostError as error:
        return str(error)
    return "nothing happened"


def told_to_end() -> str:
    """Nobody has died."""
    with suppress(BaseException), Ranks.of_torchrun().together():
        if os.environ["RANK"] == "1":
            time.sleep(4)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit as error:
            return f"exit {error.code}"
    return "nothing happened"


@pytest.mark.parametrize("work", [one_dies, told_that_one_died], ids=lambda work: work.__name__)
def test_a_rank_says_that_another_died(work):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = answers_of(work, store=store, count=1)[0]
    assert said.startswith("rank 1 (process ") and "was killed" in said
    assert said.endswith("All answers so far are kept: the same command asks the rest")


def test_a_rank_that_is_told_to_end_does():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert answers_of(told_to_end, store=store) == {0: "exit 143", 1: "exit 143"}
