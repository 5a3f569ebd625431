"""Model folders: config.json, model.safetensors, tokenizer files and preprocessor_config.json; adapter/ after LoRA.

Weights carry transformers' own names under ``llm.``, ``vision.`` and ``connector.``; a tied weight is stored once.
A folder needs nothing but itself to be loaded, no file is a pickle, and a save that fails leaves the old one alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.fields import Fields, read_json
from tinyllava_fast.files import atomic_folder
from tinyllava_fast.models import adapter
from tinyllava_fast.models.architecture import LMMConfig
from tinyllava_fast.models.checkpoints._load import open_checkpoint, open_processor, open_tokenizer
from tinyllava_fast.models.construct import build
from tinyllava_fast.models.described import check_parts, read_processor
from tinyllava_fast.models.hf import cast_parameters
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.sources import folders_in, read_tokenizer
from tinyllava_fast.models.vision.base import VISION
from tinyllava_fast.models.weights_file import WEIGHTS, load_weights
from tinyllava_fast.version import __version__

MODEL_TYPE = "tinyllava_fast"
_HUB_KEYS = ("architectures", "auto_map", "image_processor", "image_token_count", "image_token_id")
"""Of config.json in a Hub repository: what its code reads (convert/formats/hub.py)."""
_GIVE = "give a folder that tlf-train wrote"


def save_model(
    lmm: LMM,
    tokenizer: PreTrainedTokenizerBase,
    processor: BaseImageProcessor,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model folder, atomically: either all of it is there or what was there before.

    state_dict: the full weights under ``lmm.state_dict()``'s names where the module holds only a shard of them.
    LoRA layers go to ``adapter/``, and config.json says so; model.safetensors keeps the stock names.
    Raises CheckpointError if the folder cannot be written, for instance because the disk is full.
    """
    weights, adapted = adapter.split(lmm, state_dict if state_dict is not None else lmm.state_dict())
    tied = lmm.tied_names()
    stored = {k: v.detach().cpu().contiguous() for k, v in weights.items() if k not in tied}
    config = {
        "model_type": MODEL_TYPE,
        **asdict(lmm.config),
        "dtype": str(_dtype_of(stored)).removeprefix("torch."),
        "versions": {
            "tinyllava_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    with atomic_folder(folder) as temporary:
        save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if adapted:
            adapter.write(lmm, adapted, temporary / adapter.FOLDER)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    return next((t.dtype for name, t in weights.items() if name.startswith("llm.") and t.is_floating_point()))


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    merge_adapter: bool = True,
) -> tuple[LMM, PreTrainedTokenizerBase, BaseImageProcessor]:
    """(model in eval mode, tokenizer, image processor) of a model folder. dtype None: the stored one.

    The folder may also be of another project, in a layout that models/checkpoints knows; it is opened in place.
    merge_adapter: add a LoRA adapter to the weights, in float32; False keeps its layers in the model.
    Raises CheckpointError if the folder is of no known layout, is damaged, or does not fit its own config.
    """
    if not isinstance(folder, (str, Path)):
        raise CheckpointError(f"{folder!r:.80}: expected the path of a model folder, such as 'runs/demo/final'")
    folder = Path(folder)
    if is_foreign(folder):
        opened = open_checkpoint(folder, dtype=dtype, device=device, merge=merge_adapter)
        return opened.lmm, opened.tokenizer, opened.processor
    config, stored_dtype = read_config(folder)
    merging = config.has_lora and merge_adapter
    lmm = build(
        replace(config, has_lora=False),
        dtype=stored_dtype if merging else dtype or stored_dtype,
        file=str(folder / "config.json"),
    )
    load_weights(lmm, folder)
    if config.has_lora:
        path = folder / adapter.FOLDER
        live = lmm.dtype
        adapter.attach(lmm, adapter.read(path), str(path), dtype=torch.float32)
        if not merging:
            adapter.lower(lmm, live)
    if merging:
        adapter.merge(lmm, dtype)
        cast_parameters(lmm, dtype or stored_dtype)
    return lmm.to(device).eval(), load_tokenizer(folder), load_processor(folder)


def is_foreign(folder: str | Path) -> bool:
    """Return whether the folder has a config.json that another project wrote."""
    try:
        values = read_json(Path(folder) / "config.json")
    except UserError:
        return False
    return isinstance(values, dict) and values.get("model_type") not in (None, MODEL_TYPE)


def check_folder(folder: str | Path) -> None:
    """Raise CheckpointError if it is no model folder, with a hint at the one inside a run folder or of a like name."""
    folder = Path(folder)
    if os.path.isfile(folder / "config.json"):
        return
    inside = [name for name in ("final", *folders_in(folder)) if os.path.isfile(folder / name / "config.json")]
    if inside:
        raise CheckpointError(f"{folder}: not a model folder, but one lies in it: give {folder / inside[0]}")
    if os.path.exists(folder):
        if os.path.isfile(folder):
            raise CheckpointError(
                f"{folder}: not a model folder: it is a file; give the folder that it is in: {folder.parent}"
            )
        around = Path(os.path.abspath(folder)).parent
        hint = f"the folder around it is one: {around}" if (around / "config.json").is_file() else _GIVE
        raise CheckpointError(f"{folder}: not a model folder: it has no config.json; {hint}")
    close = get_close_matches(folder.name, folders_in(folder.parent), n=1)
    hint = f"did you mean {folder.parent / close[0]}?" if close else _GIVE
    raise CheckpointError(f"{folder}: not a model folder: it does not exist; {hint}")


def read_config(folder: str | Path) -> tuple[LMMConfig, torch.dtype]:
    """Return the config.json of a model folder and the dtype that its weights are stored in."""
    check_folder(folder)
    path = Path(folder) / "config.json"
    values = read_json(path, CheckpointError)
    found = values.pop("model_type", None) if isinstance(values, dict) else None
    if found != MODEL_TYPE:
        raise CheckpointError(f"{path}: model_type is {found!r}, expected {MODEL_TYPE!r}: not a model of this toolkit")
    for key in ("versions", *_HUB_KEYS):
        values.pop(key, None)
    if "adapter" in values:  # as folders before version 0.2 call it
        values["has_lora"] = values.pop("adapter")
    dtype = getattr(torch, str(values.pop("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{path}: dtype is not a torch dtype")
    check_parts(Fields(values, str(path), CheckpointError))
    for name in ("llm", "vision", "connector"):  # options may be null
        values[name] = {k: v for k, v in values[name].items() if v is not None}
    try:
        return parse_into(LMMConfig, values, str(path)), dtype
    except UserError as error:
        raise CheckpointError(str(error)) from None


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer stored in a model folder."""
    if is_foreign(folder):
        return open_tokenizer(folder)
    return read_tokenizer(str(folder), None)


def load_processor(folder: str | Path) -> BaseImageProcessor:
    """Return the image processor stored in a model folder: the PIL class of its tower."""
    if is_foreign(folder):
        return open_processor(folder)
    config, _ = read_config(folder)
    return read_processor(VISION.get(config.vision.type, f"{Path(folder) / 'config.json'}: vision.type"), folder)
