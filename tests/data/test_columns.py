from __future__ import annotations

import json

import numpy as np
import pytest

from tinyllava_fast.data.columns import INDEX, Columns, ColumnWriter
from tinyllava_fast.errors import UserError

DTYPES = {"a": np.dtype("<i4"), "pairs": np.dtype([("x", "<i8"), ("y", "<u8")]), "none": np.dtype("u1")}


@pytest.fixture
def written(tmp_path):
    writer = ColumnWriter(tmp_path, DTYPES)
    for part in (np.arange(5), np.arange(5, 3000)):
        writer.append("a", part)
    writer.append("pairs", np.array([(1, 2), (3, 2**64 - 1)], DTYPES["pairs"]))
    writer.finish()
    return tmp_path


def test_columns_come_back_as_they_were_written(written):
    columns = Columns(written, DTYPES)
    assert columns["a"].tolist() == list(range(3000)) and columns["a"].dtype == DTYPES["a"]
    assert columns["pairs"].tolist() == [(1, 2), (3, 2**64 - 1)]
    assert len(columns["none"]) == 0
    columns.let_go()
    assert columns["a"][2999] == 2999
    with pytest.raises(ValueError, match="read-only"):
        columns["a"][0] = 1
    assert columns.checksums == Columns(written, DTYPES).checksums and columns.checksums["none"] == 0


@pytest.mark.parametrize("name", ["a", "pairs", INDEX])
@pytest.mark.parametrize("how", ["bit", "cut", "longer", "gone"])
def test_damage_is_noticed(written, name, how):
    path = written / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"bit": bytes(content), "cut": path.read_bytes()[:-3], "longer": bytes(content) + b"x"}[how])
    with pytest.raises((UserError, FileNotFoundError)):
        Columns(written, DTYPES)


def test_the_index_is_checked(written):
    index = json.loads((written / INDEX).read_text())
    index["columns"]["a"]["bytes"] = 8
    (written / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{INDEX}: damaged"):
        Columns(written, DTYPES)


def test_other_columns_are_refused(written):
    with pytest.raises(UserError, match="other"):
        Columns(written, {**DTYPES, "other": np.dtype("u1")})


def test_without_an_index_there_is_nothing(tmp_path):
    writer = ColumnWriter(tmp_path, DTYPES)
    writer.append("a", np.arange(3))
    writer.close()
    with pytest.raises(FileNotFoundError):
        Columns(tmp_path, DTYPES)
