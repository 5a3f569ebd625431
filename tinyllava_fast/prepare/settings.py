"""A run configuration for a data set: configs/mine.yaml with every value that depends on the data filled in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.config.schema import LLMConfig, ModelConfig
from tinyllava_fast.data.bpe import texts_of, train_tokenizer
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_tokenizer
from tinyllava_fast.models.checkpoints._parts import fitting_template
from tinyllava_fast.prepare.survey import ANSWER, Lengths, Pictures, lengths, pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_A_STEP = 32
STEPS = 1500
MOST_EPOCHS = 60
MOST_TOKENS = 8192  # of a pack: what activations of small models take a few GiB for
LARGEST_SIDE = 224
LARGE = 64  # from this side on patches are 16 pixels wide, below 8 or 4


@dataclass(frozen=True)
class Prepared:
    """The files written: the run configuration, the tokenizer's folder (None with a pretrained language model)."""

    config: Path
    tokenizer: Path | None
    facts: str
    """A summary of the data in one line."""
    turns: int
    """The most questions that one record has."""


def prepare(
    records: str | Path, images: str | Path, out: str | Path, *, llm: str | None = None, vocabulary: int = 2048
) -> Prepared:
    """Look at a data set and write a run configuration for it, and a tokenizer unless there is a language model.

    out: the YAML file; the tokenizer goes to a folder beside it. llm: folder, hub id or "package:NAME" of a pretrained
    language model; None: a small one with random weights. vocabulary: most tokens of the tokenizer.
    Raises UserError if a target exists or nothing can be made of the language model, DataError for data that cannot
    be used.
    """
    config = Path(out)
    folder = config.with_name(f"{config.stem}-tokenizer")
    if config.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: name the file to write with the end .yaml")
    for path in (config, *([] if llm else [folder])):
        if path.exists():
            raise UserError(f"{path}: exists; choose another name or remove it")
    seen = pictures(records, images)
    side, patch = geometry(seen.side if seen else LARGE)
    tokenizer: PreTrainedTokenizerBase
    if llm is None:
        tokenizer, name = train_tokenizer(texts_of([records]), vocabulary), "llama"
    else:
        tokenizer = build_tokenizer(ModelConfig(llm=parse_into(LLMConfig, {"path": llm}, "--llm", key="llm")))
        name = _template(tokenizer, llm)
    measured = lengths(records, TEMPLATES.get(name), tokenizer, (side // patch // 2) ** 2)
    text = filled(template_text(), _values(config.stem, records, images, folder, seen, side, patch, measured, name))
    if llm is not None:
        text = with_language_model(text, llm)
    shown = f"{seen.count:,} images, {seen.side} pixels wide" if seen else "no images"
    facts = f"{measured.records:,} records, {shown}; the longest sample has {measured.longest:,} tokens"
    config.parent.mkdir(parents=True, exist_ok=True)
    if llm is None:
        tokenizer.save_pretrained(folder)
    config.write_text(headed(text, facts), encoding="utf-8")
    return Prepared(config, None if llm else folder, facts, measured.turns)


def template_text() -> str:
    """Return the text of configs/mine.yaml, which lies inside the installed package or beside it in a clone."""
    package = Path(__file__).parents[1]
    places = [package / "configs" / "mine.yaml", package.parent / "configs" / "mine.yaml"]
    return next(path for path in places if path.is_file()).read_text(encoding="utf-8")


def geometry(side: int) -> tuple[int, int]:
    """Return (image size, patch size) for images of this longer side: at least 4 x 4 patches, an even number a side.

    >>> geometry(16), geometry(64), geometry(1000)
    ((32, 4), (64, 8), (224, 16))
    """
    patch = 4 if side <= LARGE // 2 else 8 if side <= LARGE else 16
    unit = 2 * patch
    return max(8 * patch, unit * math.ceil(min(side, LARGEST_SIDE) / unit)), patch


def filled(text: str, values: Mapping[str, object]) -> str:
    """Return the YAML text with the values of some keys replaced; every key must stand in it exactly once.

    A key may be the last part of a line's mapping, as in ``batch``; values are written as JSON, which YAML reads.
    """
    for key, value in values.items():
        line = re.compile(rf"^( *){re.escape(key)}: (?:\{{.*\}}|\[.*\]|[^ #\n]+)", re.MULTILINE)
        written = _flow(value)
        text, count = line.subn(lambda m, k=key, w=written: f"{m.group(1)}{k}: {w}", text)  # type: ignore[misc]
        assert count == 1, key  # noqa: S101 our own template
    return text


def headed(text: str, facts: str) -> str:
    """Return the YAML text with a head that names its data, in place of the comment that it begins with."""
    body = text[text.index("output_dir:") :]
    head = f"# Written by tlf-data init: {facts}.\n# What was chosen from the data is marked; change what you like.\n"
    return head + body


def with_language_model(text: str, llm: str) -> str:
    """Return the run with a pretrained language model: lower learning rate, no settings of a model from scratch."""
    start, end = text.index("  llm:\n"), text.index("stages:\n")
    text = text[:start] + f"  llm: {{path: {json.dumps(llm)}}}\n" + text[end:]
    return filled(
        text,
        {"recipe": {"vision": {"tune": "full"}, "connector": {"tune": "full"}, "llm": {"tune": "full", "lr": 1e-4}}},
    )


def _values(
    name: str,
    records: str | Path,
    images: str | Path,
    tokenizer: Path,
    seen: Pictures | None,
    side: int,
    patch: int,
    measured: Lengths,
    template: str,
) -> dict[str, object]:
    most = max(1, measured.images)
    tokens = max(measured.longest, min(MOST_TOKENS, math.ceil(measured.mean * SAMPLES_A_STEP)))
    a_step = max(1, min(SAMPLES_A_STEP, int(tokens / measured.mean)))
    values = {
        "output_dir": f"runs/{name}",
        "image_size": side,
        "patch_size": patch,
        "tokenizer": str(tokenizer),
        "max_position_embeddings": max(2048, _round_up(measured.longest + ANSWER, 256)),
        "records": str(records),
        "image_folder": str(images),
        "template": template,
        "batch": {
            "tokens": _round_up(tokens, 32),
            "max_images": max(most, a_step),
            "image_multiple": max(most, a_step),
            "max_segments": a_step,
        },
        "epochs": max(1, min(MOST_EPOCHS, round(STEPS * a_step / measured.records))),
    }
    return values | ({"image_mean": list(seen.mean), "image_std": list(seen.std)} if seen else {})


def _template(tokenizer: PreTrainedTokenizerBase, llm: str) -> str:
    """Return the chat template that fits a pretrained language model's tokenizer."""
    if tokenizer.chat_template:
        return "tokenizer"
    if name := fitting_template(tokenizer, ""):
        return name
    raise UserError(
        f"--llm {llm}: no chat template ends its answers with {tokenizer.eos_token!r}; the templates are "
        f"{', '.join(TEMPLATES)}. Leave out --llm, and set model.llm and data.template in the file that is written"
    )


def _flow(value: object) -> str:
    """Return a value in YAML's flow style, without quotes where none are needed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and re.fullmatch(r"[\w/.+-]+", value) and yaml.safe_load(value) == value:
        return value  # not one that YAML takes for a number, null or yes
    return json.dumps(value, ensure_ascii=False)


def _round_up(value: int, unit: int) -> int:
    return unit * math.ceil(value / unit)
