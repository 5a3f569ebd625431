"""Arrow tables as records: what the formats on top of pyarrow share. The bytes of images are never made Python objects.

A record batch becomes rows in which True stands for bytes that are there; the bytes themselves are read by reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._base import Place, Row
from tinyllava_fast.errors import DataError, import_optional

if TYPE_CHECKING:
    import pyarrow as pa

EXTRA = "tables"
AT_ONCE = 256  # rows made Python objects at a time


def pyarrow(path: Path, module: str = "pyarrow") -> ModuleType:
    """Return a module of pyarrow. UserError naming the file if it is not installed."""
    return import_optional(module, f"{path}:", EXTRA)


def rows_of(batch: pa.RecordBatch, first: int, refer: Callable[[int, Place], str]) -> Iterator[Row]:
    """Yield the rows of a record batch. first: number of its first row in the file, as ``refer`` gets them."""
    import pyarrow as pa

    binary = frozenset(item.name for item in batch.schema if _has_bytes(item.type))
    light = pa.RecordBatch.from_arrays([_without_bytes(column) for column in batch.columns], names=batch.schema.names)
    for start in range(0, len(light), AT_ONCE):
        for row, values in enumerate(light.slice(start, AT_ONCE).to_pylist(), first + start):
            yield Row(values, row + 1, partial(refer, row), f"row {row}", binary, mark=(row,))


def damaged(path: Path, error: Exception) -> DataError:
    """Return the error of a file that pyarrow cannot read on."""
    return DataError(f"{path}: damaged, or cut off ({str(error).splitlines()[0]}); download or write it again")


def _without_bytes(array: pa.Array) -> pa.Array:
    """Return the array with True in place of each value of bytes, at any depth."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if not _has_bytes(kind):
        return array
    if pa.types.is_struct(kind):
        children = [_without_bytes(child) for child in array.flatten()]
        return pa.StructArray.from_arrays(children, [field.name for field in kind], mask=array.is_null())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        counts = pc.fill_null(pc.list_value_length(array), 0)
        ends = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(counts.cast(pa.int64()))])
        return pa.LargeListArray.from_arrays(ends, _without_bytes(array.flatten()), mask=array.is_null())
    return pc.if_else(array.is_valid(), True, None)


def _has_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    if any(check(kind) for check in is_bytes):
        return True
    return any(_has_bytes(kind.field(n).type) for n in range(kind.num_fields))
