from __future__ import annotations

import json
import shutil
import time

import pytest

from tests.train.conftest import write_tokenizer
from tests.vectors import GOLDEN, load
from tinyllava_fast.data.tokenizer import has_tokenizer, largest_id, load_tokenizer
from tinyllava_fast.errors import UserError

ROWS = load(GOLDEN / "tokenizer_text.json")["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["tokenizer"])
def test_slow_ids(row, tmp_path):
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / row["tokenizer"])
    assert [tokenizer(text).input_ids for text in row["texts"]] == row["input_ids"]
    tokenizer.save_pretrained(tmp_path)  # what is saved with a model gives the same ids
    again = load_tokenizer(tmp_path)
    assert [again(text).input_ids for text in row["texts"]] == row["input_ids"]
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if row["tokenizer"] in ("llama_spm", "llama_spm_b"):
        assert [again.decode(i, skip_special_tokens=True) for i in row["input_ids"]] == row["decoded_skip_special"]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["tokenizer"])
def test_slow_ids_from_slow_files(row, tmp_path):
    """tokenizer.model, or vocab.json and merges.txt, beside the config.json of a model that transformers has not."""
    files = GOLDEN / "tokenizers" / row["tokenizer"]
    shutil.copytree(files, tmp_path / "slow", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "slow" / "config.json").write_text('{"model_type": "tinyllava"}')
    assert has_tokenizer(tmp_path / "slow")
    tokenizer, fast = load_tokenizer(tmp_path / "slow"), load_tokenizer(files)
    assert [tokenizer(text).input_ids for text in row["texts"]] == row["input_ids"]
    assert len(tokenizer) == len(fast), "no token that the vocabulary lacks"
    assert (tokenizer.bos_token, tokenizer.eos_token) == (fast.bos_token, fast.eos_token)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert [again(text).input_ids for text in row["texts"]] == row["input_ids"]


def test_without_tokenizer_json(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((GOLDEN / "tokenizers" / "phi_bytebpe" / name).read_bytes())
    row = next(r for r in ROWS if r["tokenizer"] == "phi_bytebpe")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("hello").input_ids == row["input_ids"][row["texts"].index("hello")]


@pytest.mark.parametrize(
    "path", ["data/easy_vqa/tokenizer", "./nope", "/nope/x", "~/nope", "a\\b", "nope/", "a//b", ""]
)
def test_what_is_no_folder_and_no_hub_id(path):
    with pytest.raises(UserError, match=r"no such folder \(looked for '/.*give a folder with tokenizer.json"):
        load_tokenizer(path)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("path", ["nope", "data/tok"])
def test_a_hub_that_cannot_be_asked_is_said_at_once(path, offline, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"no such folder \(looked for .*, and as a hub id: .*give a folder with"
    ) as error:
        load_tokenizer(path)
    assert ("HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 cannot be reached") in str(error.value)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the folder is empty: .*give a folder with tokenizer.json"),
        ({"config.json": "{}", "model.safetensors": ""}, "the folder holds no tokenizer, only config.json, model.safe"),
        ({"tokenizer.json": "{"}, "cannot be loaded: .*line 1 column 2"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "cannot be loaded: KeyError: 'added_tokens'"),
        ({"tokenizer.json": "[]"}, "cannot be loaded: "),
        ({"tokenizer.json": "\xff\xfe"}, "cannot be loaded: "),
        ({"vocab.json": '{"a": 0}', "tokenizer_config.json": "[1]"}, "cannot be loaded: "),
        ({"vocab.json": "[]", "merges.txt": ""}, "cannot be loaded: "),
        (
            {"tokenizer.model": "junk", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
            "cannot be loaded",
        ),
        (
            {"vocab.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'},
            "is a ByT5Tokenizer, which",
        ),
    ],
)
def test_folders_that_hold_no_tokenizer(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_not_its_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"is a file; give its folder, '{tmp_path}'"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_end_tokens_are_tokens_where_a_folder_says_that_special_ones_are_split(tmp_path):
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "llama_spm")
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": True}))
    again = load_tokenizer(tmp_path)
    assert again.encode("</s>", add_special_tokens=False) == tokenizer.encode("</s>", add_special_tokens=False)
    assert again("so</s>").input_ids == tokenizer("so</s>").input_ids


def test_the_largest_id():
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "llama_spm")
    token, largest = largest_id(tokenizer)
    assert largest == len(tokenizer) - 1 and tokenizer.convert_ids_to_tokens(largest) == token


def test_a_tokenizer_that_draws_its_tokens(tmp_path):
    values = json.loads((GOLDEN / "tokenizers" / "phi_bytebpe" / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"dropout is 0\.1.* in its tokenizer.json.*set model.dropout to null"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["[]", "", "<html>", "null"])
def test_a_file_that_holds_no_object_is_named(name, text, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"cannot be loaded: {name}: expected a JSON object"):
        load_tokenizer(tmp_path)
