"""Safetensors files as lazy mappings, damage to them, and the list of what does not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.tensors import DTYPES, FILES, PIECES, SpreadTensors, TensorFile, mismatches, open_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {name: torch.zeros(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.zeros(0, 4)
    tensors["strange"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "t.safetensors", metadata={"note": "ü"})
    return tmp_path / "t.safetensors"


def test_a_file_is_a_mapping(path: Path) -> None:
    with TensorFile(path) as file:
        assert file.metadata == {"note": "ü"} and len(file) == len(DTYPES) + 3 == len(set(file))
        assert file.shapes["scalar"] == () and file.shapes["empty"] == (0, 4) and file.shapes["F32"] == (2, 3)
        assert {name: file.dtypes[name] for name in DTYPES} == DTYPES
        assert file.dtypes["strange"] == torch.uint8, "no dtype that a weight may have"
        assert file["scalar"] == 2.5 and {name: t.dtype for name, t in file.items() if name in DTYPES} == DTYPES
        assert "nothing" not in file
        with pytest.raises(KeyError):
            file["nothing"]


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.uint8)}, path)
    file = TensorFile(path)
    with path.open("r+b") as raw:  # in place: it is the file that is open
        raw.seek(-1, 2)
        raw.write(b"\x07")
    assert file["a"].tolist() == [0, 0, 0, 7]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:20],
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: struct.pack("<Q", 1 << 40) + b[8:],
    ],
)
def test_damage_is_found_when_it_is_opened(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((OSError, SafetensorError)):
        TensorFile(path)
    with pytest.raises(CheckpointError, match=r"t\.safetensors: damaged or truncated safetensors file: "):
        open_weights(path)


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises((OSError, SafetensorError)):
            TensorFile(path)
        with pytest.raises(CheckpointError, match="the weights file does not exist"):
            open_weights(path)


def test_mismatches_are_listed_in_full() -> None:
    expected = {"llm.a": (2, 3), "llm.b": (4,), "vision.c.d": (5,), "vision.e": ()}
    assert mismatches(expected, dict(reversed(expected.items()))) == []
    found = {"llm.a": (3, 2), "vision.c.d": (5, 1), "vision.e": (), "extra": (7,)}
    assert mismatches(expected, found) == [
        "  missing: llm.b [4]",
        "  unexpected: extra [7]",
        "  llm: a has shape [3, 2], this model needs [2, 3]",
        "  vision: c.d has shape [5, 1], this model needs [5]",
    ]
    stored_as = {"extra": "their.extra", "llm.a": "their.a"}
    assert mismatches(expected, found, needs="its config says", stored_as=stored_as)[1:3] == [
        "  unexpected: their.extra [7]",
        "  llm: a (stored as their.a) has shape [3, 2], its config says [2, 3]",
    ]


def test_mismatches_of_names_alone() -> None:
    assert mismatches(dict.fromkeys("ab"), dict.fromkeys("bc")) == ["  missing: a", "  unexpected: c"]


def spread(folder: Path, files: list[tuple[dict[str, torch.Tensor], dict[str, list[int]]]]) -> SpreadTensors:
    """Files of tensors, of which some are pieces: name -> [first row, rows of the whole]."""
    opened = []
    for number, (tensors, pieces) in enumerate(files):
        told = {name: {"first": first, "rows": rows} for name, (first, rows) in pieces.items()}
        path = folder / f"model-{number}.safetensors"
        save_file(tensors, path, metadata={PIECES: json.dumps(told), FILES: str(len(files))})
        opened.append(TensorFile(path))
    return SpreadTensors(opened)


def test_rows_in_several_files_are_whole_tensors(tmp_path: Path) -> None:
    whole, other = torch.arange(21.0).reshape(7, 3), torch.tensor(3)
    files = [
        ({"w": whole[3:6]}, {"w": [3, 7]}),
        ({"w": whole[6:], "other": other}, {"w": [6, 7]}),
        ({"w": whole[:3]}, {"w": [0, 7]}),
    ]
    with spread(tmp_path, files) as tensors:
        assert (
            tensors.path == tmp_path and tensors.shapes == {"w": (7, 3), "other": ()} and set(tensors) == {"w", "other"}
        )
        assert torch.equal(tensors["w"], whole) and torch.equal(tensors["other"], other)
        for first in range(8):
            for stop in range(first, 8):
                assert torch.equal(tensors.rows("w", first, stop), whole[first:stop]), (first, stop)
        with pytest.raises(KeyError):
            tensors["nothing"]


@pytest.mark.parametrize("first", [0, 2, 4], ids=["twice", "overlapping", "a gap"])
def test_rows_that_make_up_no_tensor_are_found(tmp_path: Path, first: int) -> None:
    files = [({"w": torch.zeros(3, 2)}, {"w": [0, 6]}), ({"w": torch.zeros(3, 2)}, {"w": [first, 6]})]
    with pytest.raises(CheckpointError, match="the pieces of 'w' do not make up a whole tensor"):
        spread(tmp_path, files)


def test_pieces_of_other_dtypes_or_shapes_are_found(tmp_path: Path) -> None:
    files = [({"w": torch.zeros(3, 2)}, {"w": [0, 6]}), ({"w": torch.zeros(3, 2).half()}, {"w": [3, 6]})]
    with pytest.raises(CheckpointError, match="the pieces of 'w' do not make up a whole tensor"):
        spread(tmp_path, files)
