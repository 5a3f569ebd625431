from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from tinyllava_fast import hardware
from tinyllava_fast.config.schema import DataConfig
from tinyllava_fast.data import progress, shelf, tokens
from tinyllava_fast.data.store import DTYPES
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import DataError

CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }}</s>assistant:{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder of kept tokens."""
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(shelf.LIMIT, "1")
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(folder):
    return DataConfig(records=str(folder / "data.json"), image_folder=str(folder / "images"))


@pytest.fixture
def many(monkeypatch):
    """Even a small file is tokenized by two processes, a few records at a time."""
    monkeypatch.setattr(tokens, "_LEAST_BYTES", 0)
    monkeypatch.setattr(tokens, "_CHUNK", 5)
    monkeypatch.setattr(tokens, "cores", lambda: 2)


def columns(store):
    return {name: store.column(name).tobytes() for name in DTYPES}


def test_processes_make_what_one_makes(data, tokenizer, kept, monkeypatch, folder, capfd):
    alone = columns(tokens.tokenized(data, tokenizer))
    os.rename(kept, folder / "before")
    monkeypatch.setattr(tokens, "_LEAST_BYTES", 0)
    monkeypatch.setattr(tokens, "_CHUNK", 5)
    monkeypatch.setattr(tokens, "cores", lambda: 2)
    assert columns(tokens.tokenized(data, tokenizer)) == alone
    assert capfd.readouterr().err == ""  # the tokenizers library would warn of forks
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_second_start_reads_no_record(data, tokenizer, make, monkeypatch):
    first = make()
    monkeypatch.setattr(tokens, "read_refusing", None)
    second = make()
    assert columns(second.sources[0].store) == columns(first.sources[0].store)
    assert second.fingerprint == first.fingerprint and second.report == first.report
    again = make(tokens=700, tokens_per_image=9, image_mode="pad", seed=3)  # none of which decides a token
    assert columns(again.sources[0].store) == columns(first.sources[0].store)


def test_refused_records_lie_beside_the_samples(data, tokenizer, many, folder, monkeypatch):
    rows = json.loads((folder / "data.json").read_text())
    rows[3]["conversations"] = []
    rows[4]["conversations"][1]["value"] = "</s>"
    for row in rows[10:15]:  # all of a part
        row["image"] = 3
    (folder / "data.json").write_text(json.dumps(rows))
    lax = replace(data, on_error="skip")
    first = tokens.tokenized(lax, tokenizer)
    assert [fault.where.split()[1] for fault in first.faults()] == ["3", "4", "10", "11", "12", "13", "14"]
    assert [fault.kind for fault in first.faults()] == ["record", "template"] + ["record"] * 5 and len(first) == 17
    monkeypatch.setattr(tokens, "read_refusing", None)
    assert tokens.tokenized(replace(data, on_error="quarantine"), tokenizer).faults() == first.faults()
    with pytest.raises(DataError, match=r"data.json: record 3 \(id 'r3', line 1\): conversations: expected a list"):
        tokens.tokenized(data, tokenizer)


def test_what_tokens_depend_on_makes_others(data, tokenizer, kept, folder, monkeypatch):
    def made(some=data):
        tokens.tokenized(some, tokenizer)
        return len(list(kept.iterdir()))

    assert made() == made() == 1
    assert made(replace(data, image_folder="elsewhere", overlong="truncate", max_tokens=9)) == 1
    for number, change in enumerate(
        [{"turns": "independent"}, {"turns": "independent", "turns_per_sample": 1}, {"masks": "reference"}]
    ):
        assert made(replace(data, **change)) == 2 + number
    with monkeypatch.context() as patch:
        patch.setitem(TEMPLATES._entries, "llama", replace(TEMPLATES.get("llama"), system="Another system text."))
        assert made() == 5
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", CHAT)
        assert made(replace(data, template="tokenizer")) == 6
        patch.setattr(tokenizer, "chat_template", CHAT.replace("user:", "USER:"))
        assert made(replace(data, template="tokenizer")) == 7
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_CODE", ("records.py",))
        assert made() == 8
    (folder / "copy.json").write_bytes((folder / "data.json").read_bytes())
    assert made(replace(data, records=str(folder / "copy.json"))) == 8  # the same content under another name
    (folder / "data.json").write_text((folder / "data.json").read_text().replace("shown", "seen"))
    assert made() == 9


def test_records_in_the_wrong_come_in_order(data, tokenizer, many, kept, folder, talk):
    rows = [talk("q", "a") for _ in range(40)]
    rows[33] = talk("q", "a<image>")
    rows[38] = {"id": "no talk"}
    (folder / "data.json").write_text(json.dumps(rows))
    for number, message in ((33, "answer 0 contains the template's own"), (38, "conversations: missing")):
        with pytest.raises(DataError, match=rf"data.json: record {number} .*{message}"):
            tokens.tokenized(data, tokenizer)
        rows[33] = rows[0]
        (folder / "data.json").write_text(json.dumps(rows))
    assert not list(kept.iterdir())


def test_a_file_that_is_still_written_to_is_refused(data, tokenizer, folder, monkeypatch, kept):
    make = tokens.Encoder.__call__

    def written(self, records):
        with (folder / "data.json").open("a") as file:
            file.write(" ")
        return make(self, records)

    monkeypatch.setattr(tokens.Encoder, "__call__", written)
    with pytest.raises(DataError, match=r"data.json: the file changed while it was read; start again"):
        tokens.tokenized(data, tokenizer)
    assert not list(kept.iterdir())


def test_progress_is_said(data, tokenizer, monkeypatch, caplog, many):
    monkeypatch.setattr(progress, "Pace", lambda wait_s: shelf.Pace(wait_s=0, every_s=0))
    caplog.set_level("INFO")
    tokens.tokenized(data, tokenizer)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 6 and "data.json: 5 records tokenized so far (" in said[0] and "s left" in said[0]
    assert "data.json: 24 records tokenized in " in said[-1]


def _rank(make, results, counted):
    started = time.perf_counter()
    encoder = tokens.Encoder.__call__

    def counting(self, records):
        counted.put(len(records))
        time.sleep(0.3)
        return encoder(self, records)

    tokens.Encoder.__call__ = counting
    dataset = make()
    results.put((dataset.fingerprint, time.perf_counter() - started))


def test_ranks_share_what_one_makes(make):
    hardware.cache_folder()
    context = multiprocessing.get_context("fork")
    results, counted = context.Queue(), context.Queue()
    ranks = [context.Process(target=_rank, args=(make, results, counted)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60)[0] for _ in ranks]
    for rank in ranks:
        rank.join(20)
    assert len(set(found)) == 1 and found[0] == make().fingerprint
    assert counted.get(timeout=60) == 24 and counted.empty()


def test_columns_are_numbers_not_objects(data, tokenizer):
    store = tokens.tokenized(data, tokenizer)
    assert all(isinstance(store.column(name), np.ndarray) for name in DTYPES)
    assert len(store) == 24 and store.name(23) == "r23" and store.images(22) == ["22.png"]
