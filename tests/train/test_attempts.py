"""Which ends of an attempt are followed by another one."""

from __future__ import annotations

import os

import pytest

from tinyllava_fast.train import attempts
from tinyllava_fast.train.engine import launch


@pytest.fixture
def run(monkeypatch):
    """run(codes, refuses): the exit code of a launch whose attempts end so, and what each of them saw."""
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")

    def start(codes: list[int], *, refuses: bool = False) -> tuple[int, list[int]]:
        seen: list[int] = []

        def attempt(_: list[str]) -> int:
            assert attempts.launched()
            seen.append(attempts.attempt())
            if refuses:
                attempts.note_refusal()
            return codes[seen[-1]]

        monkeypatch.setattr(launch, "_attempt", attempt)
        return launch.start_processes(2, 3, ["config.yaml"]), seen

    return start


@pytest.mark.parametrize(
    ("codes", "number"),
    [([0], 1), ([2], 1), ([143], 1), ([130], 1), ([129], 1), ([1, 137, 0], 3), ([137, 143], 2), ([1, 1, 1, 137], 4)],
)
def test_what_may_be_over_is_tried_again_and_an_end_is_an_end(run, codes, number):
    assert run(codes) == (codes[-1], list(range(number)))
    assert not {attempts.LAUNCHED, attempts.ATTEMPT, attempts.REFUSED} & set(os.environ)


def test_a_refusal_behind_another_process_s_end_is_not_repeated(run):
    assert run([1, 0], refuses=True) == (2, [0])


def test_without_a_launcher_there_is_nothing_to_tell(monkeypatch):
    for name in (attempts.LAUNCHED, attempts.ATTEMPT, attempts.REFUSED):
        monkeypatch.delenv(name, raising=False)
    attempts.note_refusal()
    assert attempts.launched() is None and attempts.attempt() == 0
