from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from tinyllava_fast.data.workers import chunks, in_order
from tinyllava_fast.errors import DataError, UserError


def square(number):
    if number == 13:
        raise DataError("item 13")
    time.sleep(0.001 * (number % 3))
    return number * number


def items(count, fail_at=None):
    for number in range(count):
        if number == fail_at:
            raise DataError(f"reading {number}")
        yield number


def test_chunks():
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(chunks([], 3)) == []


@pytest.mark.parametrize("processes", [0, 2])
def test_results_come_in_order(processes):
    assert list(in_order(square, range(13), processes)) == [n * n for n in range(13)]
    assert list(in_order(square, [], processes)) == []


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    ("fail_at", "message", "before"), [(5, "reading 5", 5), (14, "item 13", 13), (1, "reading 1", 1)]
)
def test_errors_come_in_their_place(processes, fail_at, message, before):
    found = []
    with pytest.raises(DataError, match=message):
        for result in in_order(square, items(20, fail_at), processes):
            found.append(result)
    assert len(found) == before


def test_items_are_read_a_few_ahead():
    before, read = set(psutil.Process().children()), []
    results = in_order(square, (read.append(n) or n for n in range(1, 10)), 2)
    next(results)
    assert len(read) <= 5
    results.close()
    assert set(psutil.Process().children()) <= before


def kill_itself(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error():
    with pytest.raises(UserError, match="a process that prepares data was killed"):
        list(in_order(kill_itself, range(5), 2))


def test_processes_leave_signals_to_their_parent():
    def blocked(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    assert list(in_order(blocked, range(2), 1)) == [True, True]
