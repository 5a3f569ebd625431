"""The environment that torchrun sets, and what else sets parts of it."""

from __future__ import annotations

import pytest

from tinyllava_fast.errors import UserError
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
