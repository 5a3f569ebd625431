"""Three lines of Python answer a question."""

from __future__ import annotations

import copy

import pytest
import torch

import tinyllava_fast
from tests.tiny import make_engine
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.infer.assistant import under_system
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


@pytest.mark.parametrize("device", ["mps", "gpu", "cuda:x", "", "cpu:", None, 0])
def test_unknown_devices(folder, device):
    with pytest.raises(UserError, match=r"device: .*; known: auto, cpu, cuda"):
        tinyllava_fast.load(folder, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(UserError, match=f"device: {device}, but torch sees no CUDA device; use device='cpu' or 'auto'"):
        tinyllava_fast.load(folder, device=device)


def test_paths_near_a_model_folder(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(folder)
    with pytest.raises(CheckpointError, match=r"run: not a model folder, but one lies in it: give .*run/final"):
        tinyllava_fast.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"it is a file; give the folder that it is in: "):
        tinyllava_fast.load(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="None: expected the path of a model folder"):
        tinyllava_fast.load(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a whole number, got None"),
        ({"max_new_tokens": "5"}, "max_new_tokens: expected a whole number, got '5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number, got 2.5"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": True}, "top_k: expected a whole number, got True"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": "some"}, "min_p: expected a number, got 'some'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be from 0.01 to 100"),
        ({"seed": 1.0}, "seed: expected a whole number, got 1.0"),
    ],
)
def test_settings_out_of_range(folder, settings, message):
    assistant = tinyllava_fast.load(folder, device="cpu")
    with pytest.raises(UserError, match=message):
        assistant.answer(None, "why?", **settings)


@pytest.mark.parametrize("options", ["red", ["red", None], [1, 2], [["red"]]])
def test_options_that_are_no_list_of_texts(folder, options):
    with pytest.raises(UserError, match="options: expected a list of texts such as"):
        tinyllava_fast.load(folder, device="cpu").score(None, "which?", options)
    scores = tinyllava_fast.load(folder, device="cpu").score(None, "which?", ("red",))
    assert scores.options == ("red",) and scores.best == 0


def test_a_system_text_of_ones_own(folder):
    plain, french = (tinyllava_fast.load(folder, device="cpu", system=s) for s in (None, "Answer in French."))
    asked = [a.engine.template.prompt([("why?", None)], a.engine.tokenizer).ids for a in (plain, french)]
    assert asked[0] != asked[1]
    tokenizer = french.engine.tokenizer
    assert tokenizer.decode(asked[1], skip_special_tokens=True) == "Answer in French. USER: why? ASSISTANT:"


SKIPS = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def test_a_system_text_that_a_template_would_not_show(tokenizer):
    with pytest.raises(UserError, match="the chat template 'pretrain' has no place for a system text"):
        under_system(TEMPLATES.get("pretrain"), tokenizer, "Be brief.")
    own = copy.deepcopy(tokenizer)
    own.chat_template = SKIPS
    with pytest.raises(UserError, match="the chat template of this model shows no system text"):
        under_system(TEMPLATES.get("tokenizer"), own, "Be brief.")
    own.chat_template = SKIPS.replace(" if m['role'] != 'system'", "")
    template = under_system(TEMPLATES.get("tokenizer"), own, "Be brief.")
    assert template.render([("why?", None)], own).text.startswith("Be brief.")
    assert under_system(TEMPLATES.get("pretrain"), tokenizer, None) is TEMPLATES.get("pretrain")
