"""A Hugging Face tokenizer as llama.cpp stores it: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

llama.cpp does not read the rules that cut a text into words; it knows some sets of them by name (tokenizer.ggml.pre).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TypedDict

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from tinyllava_fast.errors import UserError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# By the regular expression that a tokenizer.json splits by.
_SPLITS = {f"{_WORDS}\\p{{N}}{_REST}": "qwen2", f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe"}


class _Step(TypedDict, total=False):
    """One step of a tokenizer.json's normalizer or pre_tokenizer."""

    type: str
    pretokenizers: list[_Step]
    normalizers: list[_Step]
    pattern: dict[str, str]
    prepend_scheme: str
    add_prefix_space: bool
    use_regex: bool
    individual_digits: bool


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, known: int, *, stops: Sequence[int], add_bos: bool
) -> None:
    """Add the first ``known`` tokens, the rules of cutting and the special ids.

    stops: ids that end an answer, the chat template's first. Raises UserError for a tokenizer that llama.cpp lacks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("tokenizer: gguf needs a fast tokenizer (tokenizer.json)")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizer: a {model['type']} model; gguf export takes BPE, of bytes or of SentencePiece")
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model.get("byte_fallback"):
        _check_steps(state, "normalizer", ("Prepend", "Replace"))
        _check_steps(state, "pre_tokenizer", ("Metaspace", "Split"))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefixes(state))
        _add_tokens(writer, tokenizer, known, _scores(merges))
    else:
        _check_steps(state, "normalizer", ("NFC",))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(state))
        _add_tokens(writer, tokenizer, known, None)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    _add_special_ids(writer, tokenizer, list(dict.fromkeys(stops)))


def _add_tokens(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, known: int, scores: dict[str, float] | None
) -> None:
    """Add text, type and, for SentencePiece, score of each id. Ids without a token are never made from text."""
    texts = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(known):
        token = texts.get(index, f"[PAD{index}]")
        if scores is not None and index in added and not added[index].special:
            token = token.replace("\u2581", " ")  # llama.cpp matches and prints such tokens as they are stored
        tokens.append(token)
        if index not in texts:
            kinds.append(TokenType.UNUSED)
        elif scores is not None and index == tokenizer.unk_token_id:
            kinds.append(TokenType.UNKNOWN)
        elif index in added:
            kinds.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        elif scores is not None and _BYTE.fullmatch(token):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_types(kinds)
    if scores is not None:
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])


def _scores(merges: list[list[str]]) -> dict[str, float]:
    """Return SentencePiece's score of each merged piece: the sooner it is merged, the higher."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank + 1))
    return scores


def _add_special_ids(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> None:
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(stops) > len(places):
        raise UserError(f"llm.config.eos_token_id: {len(stops)} tokens end an answer; a gguf file names {len(places)}")
    for place, stop in zip(places, stops, strict=False):
        place(stop)
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None:
            add(index)


def _steps(step: _Step | None) -> list[_Step]:
    """Return the single steps of a sequence of them."""
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [single for part in inner for single in _steps(part)] if inner else [step]


def _check_steps(state: dict[str, _Step | None], part: str, known: tuple[str, ...]) -> None:
    """Raise UserError for a step that llama.cpp does not make."""
    for step in _steps(state[part]):
        if step["type"] not in known:
            raise UserError(f"tokenizer: its {part} has {step['type']}, which llama.cpp does not do")


def _prefixes(state: dict[str, _Step | None]) -> bool:
    """Return whether SentencePiece's mark of a space is put before a text."""
    steps = _steps(state["normalizer"]) + _steps(state["pre_tokenizer"])
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _pre(state: dict[str, _Step | None]) -> str:
    """Return llama.cpp's name of the rules that cut a text. Raises UserError if it has none."""
    steps = _steps(state["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name:
                return name
    raise UserError(
        f"tokenizer: llama.cpp has no name for the rules by which this one cuts a text ({', '.join(kinds) or 'none'}); "
        f"known are those of gpt-2, smollm, {' and '.join(_SPLITS.values())}"
    )
