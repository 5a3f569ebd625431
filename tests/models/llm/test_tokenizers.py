"""Adapters give special tokens the roles that the reference's hooks give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_tokenizer
from tests.vectors import GOLDEN, load
from tinyllava_fast.config.schema import LLMConfig, ModelConfig
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.models.build import build_tokenizer
from tinyllava_fast.models.llm.base import LLMS

GROUPS = load(GOLDEN / "templates.json")["groups"]
CASES = sorted({(g["llm_hook"], g["tokenizer"]) for g in GROUPS})


def group(hook: str, tokenizer: str) -> dict[str, object]:
    return next(g for g in GROUPS if (g["llm_hook"], g["tokenizer"]) == (hook, tokenizer))


@pytest.mark.parametrize(("hook", "name"), CASES)
def test_special_tokens(hook: str, name: str) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / name)
    adapter, want, size = LLMS.get(hook)(), group(hook, name), len(tokenizer)
    for _ in range(2):
        adapter.prepare_tokenizer(tokenizer)
        assert (tokenizer.pad_token, tokenizer.unk_token) == (want["pad_token"], want["unk_token"])
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        assert ids == (want["pad_token_id"], want["eos_token_id"], want["bos_token_id"])
    assert len(tokenizer) == size, "no token is ever added"


def test_default_templates_are_the_references() -> None:
    used = {hook: [g["template"] for g in GROUPS if g["llm_hook"] == hook] for hook, _ in CASES}
    assert len(used) == 6
    assert all(LLMS.get(hook).template in templates for hook, templates in used.items())


def test_the_tokenizer_of_a_run_is_prepared(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    llms = [LLMConfig(type=name, tokenizer=str(tmp_path)) for name in ("auto", "phi")]
    assert [build_tokenizer(ModelConfig(llm=llm)).pad_token for llm in llms] == ["<pad>", "<unk>"]


def test_tokenizers_without_the_token_keep_what_they_have() -> None:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None
    LLMS.get("phi")().prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    LLMS.get("qwen2")().prepare_tokenizer(tokenizer)
    assert tokenizer.unk_token == "<unk>"
