from __future__ import annotations

import numpy as np
import pytest

from tinyllava_fast.data.columns import Columns, ColumnWriter
from tinyllava_fast.data.store import DTYPES, Sample, SampleStore, SampleWriter, columns_of
from tinyllava_fast.data.templates.base import Segment

SAMPLES = [
    Sample([Segment([1, -200], images=(1,)), Segment([3, 4], [(0, 1), (1, 2)], True)], "é0", ["a/ü.png", "b"], 0, 1),
    Sample([Segment([5])], "", record=1, line=4),
    Sample([Segment([6, -200, 7], [(1, 3)])], "é2", ["a/ü.png"], 2, 9),
]


@pytest.fixture
def stored(tmp_path):
    """Returns the store of parts of samples."""

    def store(*parts):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        columns = ColumnWriter(folder, DTYPES)
        writer = SampleWriter(columns)
        for part in parts:
            writer.append(columns_of(part))
        columns.finish()
        return SampleStore(Columns(folder, DTYPES))

    return store


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_it_gives_back_what_it_got(stored, cut):
    store = stored(SAMPLES[:cut], SAMPLES[cut:])
    assert len(store) == 3
    for index in (2, 0, 1):
        sample = SAMPLES[index]
        assert [(s.ids, s.spans, s.on_prefix) for s in store.sample(index)] == [
            (s.ids, s.spans, s.on_prefix) for s in sample.segments
        ]
        assert store.name(index) == sample.name and store.images(index) == list(sample.images)
        assert store.where(index) == f"record {sample.record} (id {sample.name!r}, line {sample.line})"
    assert [store.views(i) for i in range(3)] == [[1], [], [0]]
    assert store.column("samples", "learnt")[1:].tolist() == [1, 0, 1]
    digests = store.column("images", "digest")
    assert digests[0] == digests[2] != digests[1]


def test_checksums_tell_tokens_from_names(stored):
    base, parts = stored(SAMPLES), stored(*([s] for s in SAMPLES))
    assert (base.fingerprint(), base.sources()) == (parts.fingerprint(), parts.sources())
    renamed = stored([*SAMPLES[:2], Sample(SAMPLES[2].segments, "other", ["a/ü.png"], 2, 9)])
    assert renamed.fingerprint() == base.fingerprint() and renamed.sources() != base.sources()
    shorter = stored(SAMPLES[:2])
    assert shorter.fingerprint() != base.fingerprint()
    spans = stored([*SAMPLES[:2], Sample([Segment([6, -200, 7], [(2, 3)])], "é2", ["a/ü.png"], 2, 9)])
    assert spans.fingerprint() != base.fingerprint() and spans.sources() == base.sources()


def test_memory_is_given_back(stored, monkeypatch):
    store = stored(SAMPLES)
    given = []
    monkeypatch.setattr(store._columns, "let_go", lambda: given.append(1))
    for _ in range(512):
        store.sample(0)
    assert len(given) == 2
    assert isinstance(store.column("ids"), np.ndarray)
