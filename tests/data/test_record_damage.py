"""Training records with one small damage each are read, or refused by name; none is learnt from as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.damage import DROP, changed
from tests.eval.damage import RETYPED, places, spoilt_bytes
from tinyllava_fast.data.records import Record, check_turns, read_records
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import DataError

SAID = (("human", "<image>\nq"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))
TALK = [{"from": who, "value": value} for who, value in SAID]
PAIR = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "first"}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "one": [{"id": "0", "conversations": TALK, "image": "0.png"}, {"id": "1", "conversations": TALK, "image": "1.png"}],
    "several": [{"id": i, "conversations": PAIR, "images": ["a.png", "b.png"]} for i in range(2)],
    "text": [{"id": i, "conversations": [{"from": "human", "value": "q"}, PAIR[1]]} for i in range(2)],
}
TEMPLATE = TEMPLATES.get("llama")


def usable(path: Path) -> list[Record]:
    """The records that would be learnt from. DataError as the data set raises it."""
    records = list(read_records(path))
    for record in records:
        check_turns(path, record, TEMPLATE)
    return records


def damaged(rows: list[dict[str, Any]], as_list: bool) -> dict[str, bytes]:
    def whole(last: Any) -> bytes:
        every = [*rows[:-1], last]
        return (json.dumps(every) if as_list else "".join(json.dumps(row) + "\n" for row in every)).encode()

    found = {what: spoil(whole(rows[-1])) for what, spoil in spoilt_bytes().items()}
    for place in places({"row": rows[-1]}):
        for kind, new in RETYPED.items():
            if len(place) > 1 or new is not DROP:
                found[f"{'.'.join(map(str, place))}: {kind}"] = whole(changed({"row": rows[-1]}, place, new)["row"])
    return found


@pytest.mark.parametrize("as_list", [True, False], ids=["json", "jsonl"])
@pytest.mark.parametrize("name", RECORDS)
def test_damaged_records(tmp_path: Path, name: str, as_list: bool) -> None:
    path = tmp_path / ("data.json" if as_list else "data.jsonl")
    path.write_bytes(damaged(RECORDS[name], as_list)["crlf"])
    good = usable(path)[-1]
    for what, data in damaged(RECORDS[name], as_list).items():
        path.write_bytes(data)
        try:
            last = usable(path)[-1]
        except DataError as error:
            assert str(error).startswith(f"{path}: "), what
            assert not any(0xD800 <= ord(c) < 0xE000 for c in str(error)) and len(str(error)) < 600, what
            continue
        assert len(last.images) == len(good.images), what
        changed_text = "value" in what
        assert changed_text or last.turns == good.turns or "conversations" in what, what
        assert not {"None", "True", "nan", "[]", "{}"}.intersection(t for turn in last.turns for t in turn), what
