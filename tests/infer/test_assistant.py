"""Three lines of Python answer a question."""

from __future__ import annotations

import pytest

import tinyllava_fast
from tests.infer.tiny import make_engine
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.infer.types import Request, Sampling


def test_load_and_answer(folder, lmm, tokenizer, images, tmp_path):
    images[0].save(tmp_path / "cat.png")
    assistant = tinyllava_fast.load(folder, device="cpu")
    answer = assistant.answer(tmp_path / "cat.png", "What is this?", max_new_tokens=6)
    request = Request.ask("What is this?", images[0], sampling=Sampling(max_new_tokens=6))
    expected = make_engine(lmm, tokenizer).answers([request])[0].text
    assert answer == expected == assistant.answer(images[0], "What is this?", max_new_tokens=6)
    pairs = [(images[1], "a"), (None, "b"), (images[1], "c")]
    assert assistant.answer_many(pairs, max_new_tokens=6) == [
        assistant.answer(image, question, max_new_tokens=6) for image, question in pairs
    ]
    assert isinstance(assistant.answer(None, "hello", temperature=1.0, seed=3, max_new_tokens=2), str)


def test_bfloat16(folder, images):
    assistant = tinyllava_fast.load(folder, dtype="bfloat16", device="cpu")
    assert str(assistant.engine.lmm.dtype) == "torch.bfloat16"
    assert isinstance(assistant.answer(images[0], "What is this?", max_new_tokens=3), str)


def test_bad_input(folder, tmp_path):
    with pytest.raises(UserError, match="unknown dtype 'int3'; have float32, bfloat16, float16"):
        tinyllava_fast.load(folder, dtype="int3")
    with pytest.raises(CheckpointError, match="not a model folder"):
        tinyllava_fast.load(tmp_path / "nothing")
