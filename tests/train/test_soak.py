"""A short soak: ``make soak`` is the long one."""

from __future__ import annotations

import pytest

from tests.train.soak import Disk, soak


@pytest.mark.slow
def test_a_disturbed_run_ends_as_an_undisturbed_one(tmp_path):
    disk = Disk(tmp_path / "disk", own=False)
    said: list[str] = []
    found = soak(tmp_path / "work", disk, faults=4, seed=2, commands=0, say=said.append, engines=["fsdp"], steps=20)
    assert len(found.rows) == 4 and "faults" in said[-1]
