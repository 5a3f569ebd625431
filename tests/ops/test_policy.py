"""The table of kernels against each op's rule, written out once more: instruction set, dtype and shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from tinyllava_fast.ops import _cpp
from tinyllava_fast.ops._op import OPS
from tinyllava_fast.ops._policy import TABLE, faster, most_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLACES = ("", *_cpp.ISAS, "meta")  # a CPU without the extension, with it, and another device
ROWS = (0, 1, 16, 17, 48, 49, 64, 65, 4096)


def grid(**axes: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def products() -> list[dict[str, int]]:
    sides = (0, 63, 64, 96, 256, 4096)
    sizes = grid(rows=sides, columns=sides, depth=sides)
    return [{**s, "work": s["rows"] * s["columns"] * s["depth"]} for s in sizes]


def in_tiles(place: str, dtype: torch.dtype, **_: int) -> bool:
    return place == "amx" and dtype == torch.bfloat16


def in_dots(place: str, dtype: torch.dtype) -> bool:
    return place == "avx512bf16" and dtype == torch.bfloat16


def gemm(place: str, dtype: torch.dtype, rows: int, columns: int, depth: int, work: int) -> bool:
    return in_tiles(place, dtype) and min(rows, columns, depth) >= 64 and work >= 1 << 24


def lora(place: str, dtype: torch.dtype, rank: int, columns: int) -> bool:
    return in_dots(place, dtype) and 0 < rank <= 512 and rank % 2 == 0 and columns % 2 == 0


def nf4(place: str, dtype: torch.dtype, rows: int, columns: int, blocksize: int) -> bool:
    dots = in_dots(place, dtype) and blocksize == 64 and columns % 64 == 0
    return rows <= (48 if dots else 16) and columns % 2 == 0


def step(place: str, dtype: torch.dtype, rows: int) -> bool:
    return rows <= {torch.float32: 16, torch.bfloat16: 64}.get(dtype, -1)


def images(place: str, dtype: torch.dtype) -> bool:
    return place in _cpp.ISAS and dtype in (torch.float32, torch.bfloat16)


Expected = Callable[..., bool]
RULES: dict[str, tuple[Expected, list[dict[str, int]]]] = {
    "decode_linear": (lambda place, *_, rows: place in _cpp.ISAS and rows <= 16, grid(rows=ROWS)),
    "decode_linear int8": (lambda *_, rows: rows <= 64, grid(rows=ROWS)),
    "prefill_linear": (in_tiles, [{}]),
    "gemm": (gemm, products()),
    "transpose": (in_tiles, [{}]),
    "lora_linear": (lora, grid(rank=(0, 1, 2, 3, 16, 512, 514), columns=(0, 5, 6, 64))),
    "linear_nf4": (nf4, grid(rows=ROWS, columns=(0, 1, 2, 64, 96, 128), blocksize=(2, 32, 64, 128))),
    "packed_attention of images": (images, [{}]),
    "decode_step": (step, grid(rows=ROWS)),
    "decode_step quantized": (lambda *_, rows: rows <= 64, grid(rows=ROWS)),
}


@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("place", PLACES)
def test_the_table_says_what_the_rules_say(op: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpp, "isa", lambda: place)
    expected, sizes = RULES[op]
    for dtype in DTYPES:
        x = torch.empty(1, dtype=dtype, device="meta" if place == "meta" else "cpu")
        for size in sizes:
            assert faster(op, x, **size) == expected(place, dtype, **size), (dtype, size)


def test_most_rows_and_names() -> None:
    assert (most_rows("decode_linear"), most_rows("decode_linear int8"), most_rows("linear_nf4")) == (16, 64, 48)
    assert [most_rows("decode_step", dtype) for dtype in DTYPES[:2]] == [16, 64]
    assert most_rows("decode_step quantized", torch.float32) == 64
    modules = (
        {op.module for op in OPS.values()} | {op.removesuffix("_fwd") for op in OPS} | {"transpose", "decode_step"}
    )
    assert {name.split()[0] for name in TABLE} <= modules
    assert _cpp.isa() in ("", *_cpp.ISAS)
