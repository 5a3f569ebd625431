"""OpenELM's sizes, its files as Apple publishes them, and transformers' generate with its cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.llm.families import CONFIGS, build, stock
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.hf import config_of, config_to_dict, legacy_text_config
from tinyllava_fast.models.llm.base import LLMS
from tinyllava_fast.models.llm.openelm import PRESETS, OpenELM, OpenELMForCausalLM

# Parameters that arXiv:2404.14619 and the repositories' model cards state.
PUBLISHED = {"270M": 0.27e9, "450M": 0.45e9, "1_1B": 1.08e9, "3B": 3.04e9}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_sizes(preset: str) -> None:
    config = config_of("openelm", PRESETS[preset], "w")
    with torch.device("meta"):
        count = sum(p.numel() for p in OpenELMForCausalLM(config).parameters())
    assert count == pytest.approx(PUBLISHED[preset], rel=0.02)


def test_layers_of_the_smallest_preset() -> None:
    config = config_of("openelm", PRESETS["270M"], "w")
    assert config.num_query_heads == [12] * 5 + [16] * 7 + [20] * 4
    assert config.num_kv_heads == [3] * 5 + [4] * 7 + [5] * 4
    assert config.ffn_multipliers[:4] == [0.5, 0.73, 0.97, 1.2] and config.ffn_sizes[:3] == [768, 1024, 1280]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads[0]) == (1280, 16, 12)
    bigger = config_of("openelm", PRESETS["450M"], "w").ffn_multipliers
    assert bigger[:6] == [0.5, 0.68, 0.87, 1.05, 1.24, 1.42] and bigger[-2:] == [3.82, 4.0]


def test_a_stored_config_is_expanded_and_stays_what_it_is() -> None:
    config = config_of("openelm", PRESETS["450M"], "w")
    stored = config_to_dict(config)
    again = config_of(None, stored, "w", strict=False)
    assert (
        config_to_dict(again) == stored and config_to_dict(config_of(None, legacy_text_config(stored), "w")) == stored
    )


def test_the_preset_option() -> None:
    small = {"num_transformer_layers": 2, "model_dim": 64, "head_dim": 4, "vocab_size": 61}
    llm = OpenELM(OpenELM.Options(preset="270M")).from_config(small, seed=0, where="model.llm")
    assert llm.config.num_gqa_groups == 4 and llm.config.share_input_output_layers and len(llm.transformer.layers) == 2
    with pytest.raises(UserError, match=r"model\.llm\.options\.preset: unknown size '270'; did you mean '270M'"):
        OpenELM(OpenELM.Options(preset="270")).from_config(small, seed=0, where="model.llm")


def test_files_as_published_load_without_running_their_code(tmp_path: Path) -> None:
    """auto_map names code beside the weights; a head of its own brings a matrix that nothing reads."""
    _, llm = build("openelm", share_input_output_layers=False)
    stock(llm).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_openelm.OpenELMConfig",
        "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_openelm.py").write_text("raise SystemExit('remote code ran')")
    (tmp_path / "configuration_openelm.py").write_text("raise SystemExit('remote code ran')")
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" in weights and "transformer.layers.2.attn.qkv_proj.weight" in weights
    weights["transformer.classifier.weight"] = torch.zeros(61, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    adapter = LLMS.get("openelm")()
    loaded = adapter.from_pretrained(
        str(tmp_path), gguf_file=None, overrides={}, dtype=torch.float32, where="model.llm"
    )
    assert adapter.head(loaded)[0] is loaded.lm_head.weight and loaded.config._attn_implementation == "tlf_packed"
    assert all(torch.equal(v, weights[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_generate_with_a_cache_equals_no_cache(attention: str) -> None:
    _, llm = build("openelm")
    plain = stock(llm)
    plain.set_attn_implementation(attention)
    ids = torch.randint(3, 61, (1, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = plain.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, plain.generate(ids, use_cache=False, **options)) and cached.shape == (1, 16)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    both = plain.generate(padded, attention_mask=mask, **options)
    assert torch.equal(both[:, 9:], cached[:, 6:]), "left padding changes nothing"
    loss = plain(ids, labels=ids).loss
    logits = plain(ids).logits[0, :-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def test_a_plain_feed_forward_and_heads_without_norms() -> None:
    _, llm = build("openelm", ffn_with_glu=False, normalize_qk_projections=False)
    names = set(llm.state_dict())
    assert not any("q_norm" in n or "k_norm" in n for n in names)
    layer = llm.transformer.layers[0]
    assert layer.ffn.proj_1.out_features == layer.ffn.proj_2.in_features == llm.config.ffn_sizes[0]
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.silu(x @ layer.ffn.proj_1.weight.t()) @ layer.ffn.proj_2.weight.t()
    torch.testing.assert_close(layer.ffn(x), want)
    assert CONFIGS["openelm"]["ffn_multipliers"] == [0.5, 2.0]
