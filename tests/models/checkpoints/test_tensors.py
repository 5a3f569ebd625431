"""Indexes of shards that are damaged, left over, or ambiguous, and pickles that hold code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.models.checkpoints._tensors import read_tensors
from tinyllava_fast.models.llm.base import LLMS

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "it has no JSON object weight_map"),
        (None, "it has no JSON object weight_map"),
        ({"a": 7}, r"index\.json: weight_map: a: expected text"),
        ({"a": None}, r"index\.json: weight_map: a: is null"),
        ({"a": ["x"]}, r"index\.json: weight_map: a: expected text"),
        ({"a": ""}, r"index\.json: weight_map: a: expected text that is not empty"),
        ({"a": "../x.safetensors"}, "names a shard outside its folder"),
        ({"a": "/etc/passwd"}, "names a shard outside its folder"),
        ({"a": ".."}, "names a shard outside its folder"),
        ({"a": INDEX}, "expected a file of weights"),
        ({"a": "missing.safetensors"}, r"missing\.safetensors: the weights file does not exist"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"index\.json: in none of its shards: b"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, r"index\.json: a stands in two\.safetensors and in another"),
    ],
)
def test_a_damaged_index_is_named(weight_map: object, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_an_index_that_is_no_json_is_named(tmp_path: Path) -> None:
    for text in ("", "[]", "{", "[" * 100_000):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: (not |lists or objects)"):
            read_tensors(tmp_path)


def test_a_leftover_index_does_not_hide_the_whole_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / WHOLE)
    write_index(tmp_path, {"a": "gone.safetensors"})
    assert torch.equal(read_tensors(tmp_path)["a"].read(), torch.ones(2))
    save_file({"a": torch.zeros(2)}, tmp_path / "gone.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds two models, model\.safetensors and the shards of .*remove the one"
    ):
        read_tensors(tmp_path)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_code_under_a_language_model_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "vocab_size": 32, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"lm_head.weight": torch.zeros(32, 16), "x": Code(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a pickle that holds code or objects.*safetensors") as caught:
        LLMS.get("auto")().from_pretrained(
            str(tmp_path), gguf_file=None, overrides={}, dtype=torch.float32, where="model.llm"
        )
    assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.llm\.path: cannot load"):
        LLMS.get("auto")().from_pretrained(
            str(tmp_path), gguf_file=None, overrides={}, dtype=torch.float32, where="model.llm"
        )


def test_a_command_says_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tinyllava_fast", "llm": {}}')
    run = [sys.executable, "-m", "tinyllava_fast.infer.chat", str(tmp_path), "--question", "hi"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "config.json: llm: no field 'type'" in done.stderr
