"""Records written as Arrow tables: what the formats on top of pyarrow share. A record is a row, a field a column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.data.formats._arrow import pyarrow
from tinyllava_fast.data.formats._shapes import Shape, Shown, Whole, check_held, fields_of, not_held
from tinyllava_fast.data.record import FaultError
from tinyllava_fast.fields import is_text, shown

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS, _ROWS_WITH_IMAGES = 1000, 100  # of a batch, which becomes a row group
_BYTES = 32 << 20  # of images in a batch
_EXACT = 2**53  # what a float holds exactly, too
_WORDS = {"bool": "true or false", "int64": "a whole number", "float64": "a number", "string": "text"}


def batches(path: Path, samples: Iterable[Whole], shape: Shape) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the schema that holds all records, and their rows, a part at a time. The samples are gone through twice.

    DataError, naming file, record and field, for a record that no such table holds; UserError without pyarrow.
    """
    pyarrow(path)
    schema = _schema(samples, shape)
    return schema, _batches(samples, shape, schema)


def _batches(samples: Iterable[Whole], shape: Shape, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rows: list[dict[str, object]] = []
    size, most = 0, _ROWS
    for one in samples:
        images: list[object] = []
        for number, image in enumerate(one.images):
            content = None if image.inside is None else one.content(number)
            images.append({"bytes": content, "path": image.name or None})
            size += len(content or b"")
            most = _ROWS_WITH_IMAGES if content else most
        rows.append(fields_of(one.record, shape, images, beside=True))
        if len(rows) >= most or size >= _BYTES:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)
            rows, size, most = [], 0, _ROWS
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _schema(samples: Iterable[Whole], shape: Shape) -> pa.Schema:
    """Look at all records, but not at the bytes of their images."""
    import pyarrow as pa

    names: dict[str, None] = {}
    kinds: dict[str, str] = {}
    for one in samples:
        images: list[object] = [_stand_in(image) for image in one.images]
        try:
            row = fields_of(one.record, shape, images, beside=True)
        except FaultError as fault:
            raise not_held(one, str(fault)) from None
        for name, value in (one.record.extra or {}).items():
            kinds[name] = _joined(one, name, kinds.get(name, ""), value)
        check_held(one, row, ("image", "images"))
        names |= dict.fromkeys(row)
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    known = {
        **{"id": pa.string(), "system": pa.string(), "image": image, "images": pa.list_(image)},
        "conversations": pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))])),
    }
    types = {name: _arrow_type(kinds[name]) if name in kinds else known[name] for name in names}
    return pa.schema(list(types.items()))


def _stand_in(image: Shown) -> dict[str, object]:
    return {"bytes": True if image.inside is not None else None, "path": image.name or None}


def _joined(one: Whole, name: str, before: str, value: object) -> str:
    """Return the kind of values that a column holds with this one. DataError if one column cannot hold both."""
    if not all(is_text(text) for text in (name, *_texts(value))):
        told = name if is_text(name) else shown(name)
        raise not_held(one, f"{told}: contains half of a surrogate pair; mend it, or leave it out with --drop {told}")
    kind = _kind(value)
    pair = {before, kind}
    if kind and (not before or before == kind):
        return kind
    if pair == {"int64", "float64"} or pair == {"[int64]", "[float64]"}:
        return "float64" if kind[0] != "[" else "[float64]"
    if kind and "[]" in pair and all(one.startswith("[") for one in pair):
        return max(pair)
    wanted = _WORDS.get(before.strip("[]"), "a number, text, true or false, or a list of one of these")
    what = f"a list of it ({wanted})" if before.startswith("[") else wanted
    raise not_held(one, f"{name}: a column holds one kind, here {what}; leave it out with --drop {name}")


def _texts(value: object) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _kind(value: object) -> str:
    """Return the type of a column that holds the value as it is; "" for none."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if abs(value) < _EXACT else ""
    if isinstance(value, float):
        return "float64"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        kinds = {_kind(item) for item in value} or {"-"}
        if len(kinds) == 1 and (kind := min(kinds)) and not kind.startswith("["):
            return f"[{kind.strip('-')}]"
    return ""


def _arrow_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind.startswith("["):
        return pa.list_(_arrow_type(kind[1:-1] or "string"))
    return pa.type_for_alias(kind)


def features_of(schema: pa.Schema) -> dict[str, object]:
    """Return the columns as the ``datasets`` library describes them, so that it shows images as such."""
    return {item.name: _feature(item.type) for item in schema}


def with_features(schema: pa.Schema) -> pa.Schema:
    """Return the schema with that description in it."""
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features_of(schema)}})})


def _feature(kind: pa.DataType) -> object:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        if [field.name for field in kind] == ["bytes", "path"]:
            return {"_type": "Image"}
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    return {"dtype": str(kind).replace("double", "float64"), "_type": "Value"}
