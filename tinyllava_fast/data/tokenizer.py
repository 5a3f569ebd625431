"""Loading a tokenizer so that it gives the ids the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import models, normalizers, pre_tokenizers

from tinyllava_fast.errors import UserError

_WORD_START = "\u2581"  # SentencePiece's visible space


def load_tokenizer(path: str | Path) -> Any:
    """A transformers ``PreTrainedTokenizerFast`` from a folder (or hub id) with its files.

    Llama folders with ``legacy: false`` get the rule of the slow tokenizer they stand for: one word-start mark before
    the text of a call, none after a special token inside it. Their tokenizer.json says otherwise, and transformers'
    own LlamaTokenizer leaves the mark out when the text begins with a space. UserError if nothing can be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {str(path)!r} cannot be loaded: {error}; give a folder with tokenizer.json or a hub id"
        ) from error
    if tokenizer.init_kwargs.get("legacy") is False and isinstance(tokenizer.backend_tokenizer.model, models.BPE):
        _use_slow_llama_rule(tokenizer.backend_tokenizer)
    return tokenizer


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
