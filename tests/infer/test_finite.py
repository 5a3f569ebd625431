"""A model whose numbers are not finite is refused by every way of decoding, never answered for."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.eval.layouts import write_jsonl
from tests.infer.test_engine import ask
from tests.tiny import make_engine, make_model
from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.eval import cli as eval_cli
from tinyllava_fast.infer import chat
from tinyllava_fast.infer.fast_model.prepare import PreparedModel, check_finite, prepare_model
from tinyllava_fast.infer.sampling import all_finite

NAN, INF = float("nan"), float("inf")
PARTS = [
    "llm.model.layers.1.self_attn.q_proj.weight",
    "llm.model.layers.1.self_attn.k_proj.weight",
    "llm.model.layers.1.self_attn.v_proj.weight",
    "llm.model.layers.0.self_attn.o_proj.weight",
    "llm.model.layers.0.mlp.gate_proj.weight",
    "llm.model.layers.2.mlp.down_proj.weight",
    "llm.model.layers.0.input_layernorm.weight",
    "llm.model.norm.weight",
    "llm.lm_head.weight",
    "connector.0.weight",
    "connector.2.bias",
    "vision.model.encoder.layers.0.self_attn.q_proj.weight",
    "vision.model.encoder.layers.0.mlp.fc1.weight",
]
WAYS = {"layers": (torch.float32, "raw"), "one call": (torch.float32, None), "bf16": (torch.bfloat16, None)}
WAYS |= {"int8": (torch.bfloat16, "int8"), "nf4": (torch.float32, "nf4")}


def engine_of(lmm, tokenizer, way, **options):
    dtype, weights = WAYS[way]
    lmm = lmm.to(dtype)
    model = PreparedModel(lmm) if weights == "raw" else prepare_model(lmm, weights)
    return make_engine(model, tokenizer, batch_tokens=1024, source="runs/broken", **options)


def named(lmm, ending):
    """The parameter of that name, or the one whose name ends as it does: towers differ in their inner names."""
    parameters = dict(lmm.named_parameters())
    tail = ending.partition(".")[2].removeprefix("model.")
    return next(p for n, p in parameters.items() if n == ending or (n[:3] == ending[:3] and n.endswith(tail)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", ["layers", "bf16", "nf4"])
def test_one_weight_that_is_no_number(lmm, tokenizer, images, way, part):
    broken = copy.deepcopy(lmm)
    named(broken, part).data.reshape(-1)[0] = NAN
    engine = engine_of(broken, tokenizer, way)
    with pytest.raises(CheckpointError, match=r"runs/broken: the model's numbers are not finite .* request 'q'"):
        list(engine.run([ask("what?", images[0], id="q")]))
    assert engine._decoder.pool.rows.free_rows == engine.batch_tokens
    with pytest.raises(CheckpointError, match="not finite"):
        list(engine.score([(ask("what?", images[0], id="q"), ("a", "b"))]))


@pytest.mark.parametrize(
    ("way", "value"),
    [(way, NAN) for way in WAYS]
    + [("one call", INF), ("bf16", -INF), pytest.param("compiled", NAN, marks=pytest.mark.slow)],
)
def test_numbers_that_break_in_the_middle_of_an_answer(tokenizer, way, value):
    """The embedding of a token of the answer: prompts are whole, so it is a step of decoding that must tell."""
    options = {"compile": True} if way == "compiled" else {}
    way = "layers" if way == "compiled" else way
    request = ask("what is it?", new=12)
    whole = engine_of(make_model(), tokenizer, way)
    said, prompt = whole.answers([request])[0].tokens, next(whole._prompts.sequences([request])).prompt
    bad = next(token for token in said[1:-1] if token not in (*prompt, said[0]))
    broken = make_model()
    broken.llm.model.embed_tokens.weight.data[bad] = value
    engine = engine_of(broken, tokenizer, way, **options)
    for requests in ([request], [request] * 3):
        with pytest.raises(CheckpointError, match="not finite"):
            engine.answers(requests)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_single_logit(lmm, tokenizer, value):
    """Whatever its sign, and though it would not be chosen."""
    broken = copy.deepcopy(lmm)
    broken.llm.lm_head.weight.data[100] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="not finite"):
            make_engine(broken, tokenizer).answers([ask("what?", temperature=temperature)])


def test_padding_of_the_vocabulary_may_hold_anything(tokenizer):
    """Its rows are never chosen."""
    lmm, broken = make_model(), make_model()
    broken.llm.lm_head.weight.data[tokenizer.vocab_size :] = NAN
    assert make_engine(broken, tokenizer).answers([ask("what?")]) == make_engine(lmm, tokenizer).answers([ask("what?")])


def test_every_weight_is_looked_at_when_a_model_is_opened(tokenizer):
    """Each in turn, also those that no request would use, or that a softmax hides."""
    broken = make_model()
    size = tokenizer.vocab_size
    check_finite(broken, size, "runs/broken")
    for number, (name, weight) in enumerate(broken.named_parameters()):
        before, value = weight.data.reshape(-1)[0].clone(), (NAN, INF, -INF)[number % 3]
        weight.data.reshape(-1)[0] = value
        with pytest.raises(CheckpointError, match=rf"runs/broken: the weight {name} is not finite"):
            check_finite(broken, size, "runs/broken")
        weight.data.reshape(-1)[0] = before
    broken.llm.lm_head.weight.data[size:] = NAN  # padding
    check_finite(broken, size, "runs/broken")


def test_finite_numbers():
    large = torch.full((3, 5), 3e38)
    assert all_finite(large) and all_finite(-large) and all_finite(torch.empty(0, 5))
    assert all_finite(torch.full((4, 70_000), -60_000, dtype=torch.float16))
    for value in (NAN, INF, -INF):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            one = torch.zeros(2, 300, dtype=dtype)
            one[1, 299] = value
            assert not all_finite(one)
    assert not all_finite(torch.tensor([INF, -INF]))


@pytest.mark.parametrize(
    ("value", "said"), [(NAN, "the weight llm.* is not finite"), (3e38, "the model's numbers are not finite")]
)
def test_commands_end_with_2_and_name_the_folder(folder, tmp_path, caplog, capsys, monkeypatch, value, said):
    """A damaged weight, and weights that are numbers but too large to be multiplied."""
    broken = tmp_path / "final"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    next(v for k, v in sorted(weights.items()) if k.startswith("llm.") and "mlp.up" in k).fill_(value)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("tinyllava_fast.log.log.handlers", [caplog.handler])
    assert chat.main([str(broken), "--question", "what?", "--device", "cpu"]) == 2
    assert re.search(f"{re.escape(str(broken))}: {said}", caplog.text) and capsys.readouterr().out == ""
    caplog.clear()
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "what?", "answer": "a"}])
    words = ["--benchmarks", "custom", "--data", tmp_path, "--output", tmp_path / "o", "--device", "cpu"]
    assert eval_cli.main([str(broken), *map(str, words)]) == 2
    assert re.search(f"{re.escape(str(broken))}: {said}", caplog.text)
    assert not (tmp_path / "o/results.json").exists()
    records = [json.loads(line) for line in (tmp_path / "o/custom/answers.jsonl").read_text().splitlines()]
    assert all("key" not in r for r in records)
