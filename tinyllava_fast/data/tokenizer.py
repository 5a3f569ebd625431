"""Loading a tokenizer so that it gives the ids the model was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tinyllava_fast.data.hub import is_hub_id, no_answer
from tinyllava_fast.errors import UserError
from tinyllava_fast.fields import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_START = "\u2581"  # SentencePiece's visible space


_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ADVICE = "give a folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt, or a hub id"


def has_tokenizer(folder: str | Path) -> bool:
    """Return True if a folder holds tokenizer.json, tokenizer.model, or vocab.json with merges.txt."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder (or hub id) with its files.

    SentencePiece folders of the Llama kind get the rule of the slow tokenizer they stand for. ``legacy: false``: one
    word-start mark before the text of a call, none after a special token inside it; their tokenizer.json says
    otherwise, and transformers' own LlamaTokenizer leaves the mark out when the text begins with a space.
    ``legacy: true``, the default of old: a mark before every piece. UserError if nothing can be loaded, at once where
    the path cannot be a hub id.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(path)
    _check_path(str(path), folder)
    whole = (folder / "tokenizer.json").is_file()
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if whole else _from_parts(path)
    except Exception as error:  # Whatever is wrong with a file: tokenizers raises a bare Exception, others KeyErrors.
        what = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        raise UserError(
            f"tokenizer {str(path)!r} cannot be loaded: {_found(folder)}{' '.join(what.split()).rstrip('.')}; {_ADVICE}"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"tokenizer {str(path)!r} is a {type(tokenizer).__name__}, which says nothing about the characters of its "
            f"tokens, so answers could not be found in a prompt; {_ADVICE}"
        )
    backend = tokenizer.backend_tokenizer
    _check_certain(path, backend.model)
    tokenizer.split_special_tokens = False  # some folders set it; an end token has to be one token
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


def largest_id(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the token of the largest id, and that id. It may be more than the number of tokens: ids can have holes.

    UserError if the tokenizer has no token at all.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no tokens; give another one")
    return max(vocabulary.items(), key=lambda item: item[1])


def _check_path(path: str, folder: Path) -> None:
    """Raise UserError for what is neither a folder nor a name that the hub could know."""
    if folder.is_file():
        raise UserError(f"tokenizer {path!r} is a file; give its folder, {str(folder.parent)!r}")
    if path and folder.is_dir():
        _check_objects(path, folder)
        return
    missing = f"tokenizer {path!r}: no such folder (looked for {str(folder.absolute())!r})"
    if not is_hub_id(path):
        raise UserError(f"{missing}; {_ADVICE}")
    if reason := no_answer(path):
        raise UserError(f"{missing}, and as a hub id: {reason}; {_ADVICE}")


def _check_objects(path: str, folder: Path) -> None:
    """Raise UserError for a file of a tokenizer that holds anything but an object, which would be named by no error."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        with (folder / name).open("rb") as file:
            begins = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not begins.startswith(b"{"):
            found = f"expected a JSON object, it begins with {shown(begins[:20].decode(errors='replace'))}"
            raise UserError(f"tokenizer {path!r} cannot be loaded: {name}: {found}; {_ADVICE}")


def _check_certain(path: str | Path, model: models.Model) -> None:
    """Raise UserError for a tokenizer that draws its tokens: processes would disagree on the length of a sample."""
    for name in ("dropout", "alpha"):
        if value := getattr(model, name, None):
            raise UserError(
                f"tokenizer {str(path)!r}: {name} is {value} in its tokenizer.json, so it gives other tokens for the "
                f"same text each time; set model.{name} to null there"
            )


def _found(folder: Path) -> str:
    """Return the start of an error about the place: there is no folder, or a folder without a tokenizer holds these."""
    if not folder.is_dir():
        return "no such folder, and as a hub id: "
    if has_tokenizer(folder):
        return ""
    names = sorted(item.name for item in folder.iterdir())
    return f"the folder holds no tokenizer, only {', '.join(names[:8])}: " if names else "the folder is empty: "


def _from_parts(path: str | Path) -> PreTrainedTokenizerBase:
    """Load tokenizer.model, or vocab.json and merges.txt, by the class that tokenizer_config.json names."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    settings = _settings(Path(path))
    named = tokenizer_class_from_name(str(settings.get("tokenizer_class")))
    if named is None or not has_tokenizer(path):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    # The class by its name, not by AutoTokenizer: that reads the config.json beside it, which may be of any model.
    # Classes add a <mask> past the end of the vocabulary unless told that there is none.
    return named.from_pretrained(str(path), mask_token=settings.get("mask_token"))


def _settings(folder: Path) -> dict[str, object]:
    try:
        return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _use_slow_llama_rule(backend: Tokenizer) -> None:
    """Put the word-start mark before a call's text, even one that begins with a space, and nowhere else.

    Metaspace leaves the mark out where the text already begins with its replacement, so the first step works with a
    plain space, which the normalizer has removed from the text; the second turns it into the mark.
    """
    backend.normalizer = normalizers.Replace(" ", _WORD_START)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(_WORD_START, prepend_scheme="never", split=False),
        ]
    )
