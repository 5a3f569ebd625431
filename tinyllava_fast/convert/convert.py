"""Import a checkpoint of another project into a model folder, export a model folder to another project's format."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from tinyllava_fast.convert.formats._base import FORMATS, Model
from tinyllava_fast.convert.push import check_name
from tinyllava_fast.convert.push import push as put
from tinyllava_fast.data.pictures import REFERENCE, PictureReading
from tinyllava_fast.errors import UserError
from tinyllava_fast.files import atomic_folder
from tinyllava_fast.log import log
from tinyllava_fast.models import adapter, io
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.checkpoints._base import Sources
from tinyllava_fast.models.checkpoints._load import open_checkpoint


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    keep_adapter: bool = False,
    sources: Sources | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write a model folder of ours from a checkpoint of any known layout.

    template: chat template; None: the one that fits the tokenizer. dtype None: as stored. keep_adapter: leave a LoRA
    adapter apart from the weights, to be trained further. sources: folders of parts that the checkpoint lacks. base:
    the model that an adapter alone, as ``export_model`` writes it, was trained on.
    Raises UserError if nothing can be made of the folder, or the target exists.
    """
    check_free(target)
    if base is not None or _is_adapter(source):
        if base is None:
            raise UserError(f"{source}: holds an adapter alone; name the model that it was trained on: --base MODEL")
        return _import_adapter(Path(source), Path(base), Path(target), dtype, keep_adapter)
    if not io.is_foreign(source):
        io.read_config(source)  # says what is wrong if it is no model folder either
        raise UserError(
            f"{source}: is a model folder of this toolkit already; tlf-convert merge adds its adapter to the weights, "
            "tlf-convert export writes other formats"
        )
    opened = open_checkpoint(source, dtype=dtype, sources=sources, template=template, merge=not keep_adapter)
    if not opened.lmm.config.template:
        raise UserError(f"{source}: no chat template fits its tokenizer; name one: --template NAME")
    if keep_adapter and not opened.lmm.config.has_lora:
        raise UserError(f"{source}: holds no adapter to keep; leave out --keep-adapter")
    check_vocabulary(opened.lmm, opened.tokenizer)
    io.save_model(opened.lmm, opened.tokenizer, opened.processor, target)
    log.info("%s: imported from %s (%s)", target, source, opened.layout)
    return Path(target)


def export_model(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    dtype: torch.dtype | None = None,
    names: dict[str, str] | None = None,
    sources: Sources | None = None,
    keep_adapter: bool = False,
    weights: str | None = None,
    keep_first_patch: str | Path | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write a model, of ours or of any known layout, in another project's format.

    names: hub ids of its parts where the format refers to them: {llm, tokenizer, vision, vision2}.
    sources: as for import, if the model is such a checkpoint. keep_adapter: write a LoRA adapter apart from the weights
    instead of merging it, for a format that can hold one (llava). weights: number format to quantize the language model
    to, for a format that has some (gguf: q8_0, q4_0; onnx: int8; openvino: int8, int4). keep_first_patch: folder of
    pictures; a tower that drops its first patch keeps it in the export (gguf), and how often answers about these
    pictures agree is said. push: name of a repository on the Hub to put it in (hub), private or not.
    Raises UserError for a model that the format can't express, naming the field, and if the target exists.
    """
    check_free(target)
    kind = FORMATS.get(format, "--format")()
    if keep_adapter and not kind.keeps_adapter:
        able = [name for name in FORMATS if FORMATS.get(name).keeps_adapter]
        raise UserError(f"--keep-adapter: {format} has no place for one beside the weights; {', '.join(able)} has")
    if weights is not None and weights not in kind.weights:
        formats = {name: FORMATS.get(name).weights for name in FORMATS}
        known = "; ".join(f"{name} has {', '.join(values)}" for name, values in formats.items() if values)
        raise UserError(f"--weights: {format} has no {weights}; {known}")
    if names and not kind.takes_names:
        raise UserError(
            f"--{next(iter(names))}-name: {format} states no hub ids; leave it out, or give --format factory"
        )
    if keep_first_patch is not None and not kind.keeps_first_patch:
        raise UserError(f"--keep-first-patch: {format} takes such a model as it is; leave it out")
    if push is not None:
        if not kind.is_repository:
            raise UserError(f"--push: {format} is no repository of the Hub; give --format hub")
        check_name(push)
    merge = kind.merge_adapter and not keep_adapter
    foreign = io.is_foreign(source)
    if not foreign and sources is not None:
        _check_unused(sources, source)
    if foreign:
        opened = open_checkpoint(source, dtype=dtype, sources=sources, merge=merge)
        lmm, tokenizer, processor = opened.lmm, opened.tokenizer, opened.processor
    else:
        lmm, tokenizer, processor = io.load_model(source, dtype=dtype, merge_adapter=merge)
    if keep_adapter and not lmm.config.has_lora:
        raise UserError(f"{source}: holds no adapter to keep; leave out --keep-adapter")
    if not kind.is_repository:
        _say_reading(source, format, lmm.config.reading)
    pictures = Path(keep_first_patch) if keep_first_patch is not None else None
    model = Model(lmm, tokenizer, processor, {**lmm.config.origin, **(names or {})}, weights, Path(source), pictures)
    with atomic_folder(target) as folder, torch.no_grad():
        kind.write(model, folder)
    log.info("%s: exported from %s as %s", target, source, format)
    if push is not None:
        put(Path(target), push, private=private)
    return Path(target)


def merge_adapter(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model folder of ours with its LoRA adapter added to the weights, in float32, rounded once to dtype.

    dtype None: as stored. Raises UserError if the model has no adapter, and if the target exists.
    """
    check_free(target)
    if io.is_foreign(source):
        raise UserError(f"{source}: is of another project; tlf-convert import merges its adapter")
    config, _ = io.read_config(source)
    if not config.has_lora:
        raise UserError(f"{source}: holds no adapter; there is nothing to merge")
    lmm, tokenizer, processor = io.load_model(source, dtype=dtype)
    io.save_model(lmm, tokenizer, processor, target)
    log.info("%s: merged from %s", target, source)
    return Path(target)


def _is_adapter(source: str | Path) -> bool:
    """Return whether a folder holds a peft adapter and no model."""
    folder = Path(source)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _import_adapter(source: Path, base: Path, target: Path, dtype: torch.dtype | None, keep: bool) -> Path:
    """Write the model ``base`` with the adapter in ``source``, merged unless it is to be kept apart."""
    if not _is_adapter(source):
        raise UserError(f"{source}: --base is for a folder that holds an adapter alone (adapter_config.json)")
    lmm, tokenizer, processor = io.load_model(base, dtype=dtype, merge_adapter=False)
    if lmm.config.has_lora:
        raise UserError(
            f"{base}: has an adapter already; give the model that it was trained on, or merge it first: "
            f"tlf-convert merge {base} FOLDER"
        )
    live = lmm.dtype
    adapter.attach(lmm, adapter.read(source), str(source), dtype=torch.float32)
    adapter.lower(lmm, live) if keep else adapter.merge(lmm, live)
    io.save_model(lmm, tokenizer, processor, target)
    log.info("%s: %s with the adapter of %s", target, base, source)
    return target


def _say_reading(source: str | Path, format: str, reading: PictureReading) -> None:
    """Warn of pictures that whoever loads the export sees otherwise: no format has a place for how they are read."""
    turned = ["turned pictures as they are stored"] * (reading.orientation != REFERENCE.orientation)
    clear = ["transparent ones without their transparency"] * (reading.background != REFERENCE.background)
    if turned or clear:
        log.warning(
            "%s: was trained with data.orientation=%s and data.background=%s, for which %s has no place: there, and "
            "when it is imported again, it sees %s",
            source, reading.orientation, reading.background, format, " and ".join(turned + clear),
        )  # fmt: skip


def _check_unused(sources: Sources, source: str | Path) -> None:
    """Raise UserError for a part that is given beside a model folder, which has all its parts."""
    for name, given in dataclasses.asdict(sources).items():
        if given:
            raise UserError(
                f"--{name} {given}: {source} is a model folder of this toolkit and has that part; leave it out"
            )


def check_free(target: str | Path) -> None:
    """Raise UserError for a target that exists."""
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; choose another folder or remove it")
