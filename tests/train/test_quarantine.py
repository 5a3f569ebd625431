"""quarantine.jsonl: the lines of several stages, some of them damaged."""

from __future__ import annotations

import json
from types import SimpleNamespace

from tinyllava_fast.train.quarantine import FILE, Quarantine


def test_a_damaged_line_costs_itself_alone(tmp_path, caplog):
    first = {"stage": "pretrain", "kind": "image", "reason": "of before"}
    (tmp_path / FILE).write_bytes(json.dumps(first).encode() + b'\n{"stage": "pre\xff\n3\n')
    dataset = SimpleNamespace(skipped=[], faults={})
    Quarantine(tmp_path, "finetune", dataset).write(["a.png: damaged"])
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines == [first, {"stage": "finetune", "kind": "image", "reason": "a.png: damaged"}]
    assert caplog.text.count("2 damaged lines are left out") == 1
