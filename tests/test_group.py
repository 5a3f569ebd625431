"""The processes of a run: alone, and two of them over gloo. Killed ones are in train/test_faults.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import pytest
import torch
from torch.distributed import TCPStore

from tests.train.processes import fork_server
from tinyllava_fast import group
from tinyllava_fast.errors import LostError, SaidError, UserError


def test_one_process_decides_and_speaks_for_itself():
    assert group.gather("item") == ["item"]
    assert group.decided(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^wrong$"), group.in_concert():
        raise UserError("wrong")


def test_errors_of_one_process_are_nobodys_loss():
    with pytest.raises(RuntimeError, match="Connection closed by peer"), group.losses_named():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")


def both_decide() -> str:
    """Rank 0 alone is asked, and its error is raised in both."""
    rank = int(os.environ["RANK"])
    assert group.gather(rank) == [0, 1]
    assert group.decided(lambda: f"of rank {rank}") == "of rank 0"

    def refuse() -> int:
        raise UserError(f"rank {rank} refuses")

    with pytest.raises(UserError, match="rank 0 refuses"):
        group.decided(refuse)
    return "agreed"


def both_fail() -> str:
    """An error that both have in common is raised as it is in one of them; an earlier run has had the same."""
    with pytest.raises((UserError, SaidError)), group.in_concert():
        raise UserError("in common")
    try:
        with group.in_concert():
            raise UserError("in common")
    except SaidError as error:
        assert str(error) == "in common" and error.exit_code == 2
        return "said"
    except UserError:
        return "says"


def one_fails() -> str:
    """Rank 1 fails, and rank 0 waits for it."""
    try:
        with group.in_concert():
            if os.environ["RANK"] == "1":
                raise ValueError("of rank 1\nmore of it")
            torch.distributed.barrier()
    except LostError as error:
        return str(error)
    except ValueError:
        os.kill(os.getpid(), signal.SIGKILL)
    return "nothing happened"


def _process(rank: int, port: int, attempt: str, work: Callable[[], str], answers: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": attempt}
    group.join("gloo")
    answers.put((rank, work()))
    answers.close()
    answers.join_thread()
    os._exit(0)


def answers_of(work: Callable[[], str], *, store: TCPStore, count: int = 2, attempt: str = "0") -> dict[int, str]:
    """What two processes return, of so many that do not die."""
    context = fork_server()
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(r, store.port, attempt, work, queue)) for r in (0, 1)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in range(count))
    for process in processes:
        process.join(60)
    return found


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_two_processes_agree(store):
    assert answers_of(both_decide, store=store) == {0: "agreed", 1: "agreed"}


def test_what_two_have_to_say_is_said_once(store):
    assert sorted(answers_of(both_fail, store=store).values()) == ["said", "says"]


def test_the_reason_of_another_is_named_and_a_new_attempt_meets_in_the_same_store(store):
    said = answers_of(one_fails, store=store, count=1)[0]
    assert said.startswith("rank 1 has ended: ValueError: of rank 1. The other processes")
    assert answers_of(both_decide, store=store, attempt="1") == {0: "agreed", 1: "agreed"}
