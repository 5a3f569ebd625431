"""Import a checkpoint of another project into a model folder, export a model folder to another project's format."""

from __future__ import annotations

from pathlib import Path

import torch

from tinyllava_fast.convert.formats.base import FORMATS, Model
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models import io
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.checkpoints.base import Sources
from tinyllava_fast.models.checkpoints.load import open_checkpoint


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    keep_adapter: bool = False,
    sources: Sources | None = None,
) -> Path:
    """Write a model folder of ours from a checkpoint of any known layout.

    template: chat template; None: the one that fits the tokenizer. dtype None: as stored. keep_adapter: leave a LoRA
    adapter apart from the weights, to be trained further. sources: folders of parts that the checkpoint lacks.
    Raises UserError if nothing can be made of the folder, or the target exists.
    """
    _check_free(target)
    if not io.is_foreign(source):
        io.read_config(source)  # says what is wrong if it is no model folder either
        raise UserError(f"{source}: is a model folder of this toolkit already; tlf-convert export makes others of it")
    opened = open_checkpoint(source, dtype=dtype, sources=sources, template=template, merge=not keep_adapter)
    if not opened.lmm.config.template:
        raise UserError(f"{source}: no chat template fits its tokenizer; name one: --template NAME")
    if keep_adapter and not opened.lmm.config.adapter:
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
) -> Path:
    """Write a model, of ours or of any known layout, in another project's format.

    names: hub ids of its parts where the format refers to them: {llm, tokenizer, vision, vision2}.
    sources: as for import, if the model is such a checkpoint.
    Raises UserError for a model that the format can't express, naming the field, and if the target exists.
    """
    _check_free(target)
    kind = FORMATS.get(format, "--format")()
    if io.is_foreign(source):
        opened = open_checkpoint(source, dtype=dtype, sources=sources, merge=kind.merge_adapter)
        lmm, tokenizer, processor = opened.lmm, opened.tokenizer, opened.processor
    else:
        lmm, tokenizer, processor = io.load_model(source, dtype=dtype, merge_adapter=kind.merge_adapter)
    model = Model(lmm, tokenizer, processor, {**lmm.config.origin, **(names or {})})
    with io.atomic_folder(target) as folder, torch.no_grad():
        kind.write(model, folder)
    log.info("%s: exported from %s as %s", target, source, format)
    return Path(target)


def _check_free(target: str | Path) -> None:
    if Path(target).exists():
        raise UserError(f"{target}: exists; choose another folder or remove it")
