from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tinyllava_fast.data.tokenizer import has_tokenizer, load_tokenizer
from tinyllava_fast.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = json.loads((GOLDEN / "tokenizer_text.json").read_text(encoding="utf-8"))["rows"]


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


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match=r"(?s)cannot be loaded: .*give a folder with tokenizer.json"):
        load_tokenizer(tmp_path)
