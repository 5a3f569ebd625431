"""Language models of the reference's checkpoints give the logits that the reference computed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.models.checkpoints.golden import MODELS, arrays, folder
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.hf import LEGACY_FAMILIES, config_of, legacy_text_config
from tinyllava_fast.models.llm.base import LLMS

MONO = [name for name in MODELS if name.endswith("-mono")]
PREFIX = "language_model."


def text_config(name: str) -> dict[str, object]:
    return json.loads((folder(name) / "config.json").read_text())["text_config"]


def test_every_family_has_a_record() -> None:
    assert {text_config(name)["model_type"] for name in MONO} == set(LEGACY_FAMILIES)


@pytest.mark.parametrize("name", MONO)
@torch.no_grad()
def test_logits(name: str) -> None:
    stored = text_config(name)
    adapter = LLMS.get(LEGACY_FAMILIES[stored["model_type"]])()
    llm = adapter.from_config(legacy_text_config(stored), seed=0, where="model.llm").eval()
    weights = load_file(folder(name) / "model.safetensors")
    own = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    missing, unexpected = llm.load_state_dict(own, strict=False)
    assert not unexpected and set(missing) <= set(llm.all_tied_weights_keys)
    record = arrays(name)
    embeds = record["infer_inputs_embeds"][0] * adapter.embedding_scale(llm)
    bounds = torch.tensor([0, len(embeds)], dtype=torch.int32)
    hidden = adapter.hidden(llm, embeds[None], torch.arange(len(embeds))[None], cu_seqlens=bounds)[0]
    weight, bias = adapter.head(llm)
    got = torch.nn.functional.linear(hidden, weight, bias)
    want = record["infer_logits"][0]
    assert want.std() > 0.01 and len(got) > 20
    assert float((got[record["infer_positions"]] - want).abs().max()) <= 1e-4
    stop = stored.get("eos_token_id", llm.config.eos_token_id)
    assert adapter.stop_ids(llm) == {stop}


def test_left_out_keys_mean_the_defaults_of_the_release_that_wrote_them() -> None:
    phi = config_of(None, legacy_text_config({"model_type": "phi", "hidden_size": 64, "auto_map": {}}), "w")
    assert (phi.num_attention_heads, phi.num_hidden_layers) == (32, 24)
    assert phi.rope_parameters["partial_rotary_factor"] == 0.5
    gemma = {"model_type": "gemma", "hidden_act": "gelu", "torch_dtype": "float16", "_name_or_path": "x"}
    got = legacy_text_config(gemma)
    assert got["hidden_act"] == "gelu_pytorch_tanh" and got["tie_word_embeddings"] and got["head_dim"] == 256
    assert legacy_text_config(gemma | {"hidden_activation": "relu"})["hidden_act"] == "relu"
    assert not {"torch_dtype", "_name_or_path", "auto_map", "hidden_activation"} & set(got)
    for family in LEGACY_FAMILIES:
        values = legacy_text_config({"model_type": family, "junk": 1})
        assert config_of(None, values, "w").model_type == family, "every key is one of the class's"
    with pytest.raises(UserError, match=r"text_config.model_type: 'phi3' .*did you mean 'phi'"):
        legacy_text_config({"model_type": "phi3"})
