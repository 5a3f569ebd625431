"""Loading a tokenizer so that it gives the ids the model was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import models, normalizers, pre_tokenizers

from tinyllava_fast.errors import UserError

_WORD_START = "\u2581"  # SentencePiece's visible space


_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has the files of a tokenizer: tokenizer.json, tokenizer.model, or vocab.json with merges.txt."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_tokenizer(path: str | Path) -> Any:
    """A transformers ``PreTrainedTokenizerFast`` from a folder (or hub id) with its files.

    SentencePiece folders of the Llama kind get the rule of the slow tokenizer they stand for. ``legacy: false``: one
    word-start mark before the text of a call, none after a special token inside it; their tokenizer.json says
    otherwise, and transformers' own LlamaTokenizer leaves the mark out when the text begins with a space.
    ``legacy: true``, the default of old: a mark before every piece. UserError if nothing can be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(path)
    whole = (folder / "tokenizer.json").is_file()
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if whole else _from_parts(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {str(path)!r} cannot be loaded: {error}; give a folder with tokenizer.json, tokenizer.model, "
            "vocab.json and merges.txt, or a hub id"
        ) from error
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.BPE):
        return tokenizer
    legacy = _settings(folder).get("legacy", tokenizer.init_kwargs.get("legacy"))
    if legacy is False:
        _use_slow_llama_rule(backend)
    elif not whole and type(tokenizer).__name__ == "LlamaTokenizer" and (folder / "tokenizer.model").is_file():
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_WORD_START), normalizers.Replace(" ", _WORD_START)]
        )
        backend.pre_tokenizer = None
    return tokenizer


def _from_parts(path: str | Path) -> Any:
    """From tokenizer.model, or vocab.json and merges.txt, by the class that tokenizer_config.json names."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    settings = _settings(Path(path))
    named = tokenizer_class_from_name(str(settings.get("tokenizer_class")))
    if named is None or not has_tokenizer(path):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    # The class by its name, not by AutoTokenizer: that reads the config.json beside it, which may be of any model.
    # Classes add a <mask> past the end of the vocabulary unless told that there is none.
    return named.from_pretrained(str(path), mask_token=settings.get("mask_token"))


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _use_slow_llama_rule(backend: Any) -> None:
    """Put the word-start mark before a call's text, even one that begins with a space, and nowhere else.

    Metaspace leaves the mark out where the text already begins with its replacement, so the first step works with a
    plain space, which the normaliser has removed from the text; the second turns it into the mark.
    """
    backend.normalizer = normalizers.Replace(" ", _WORD_START)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(_WORD_START, prepend_scheme="never", split=False),
        ]
    )
