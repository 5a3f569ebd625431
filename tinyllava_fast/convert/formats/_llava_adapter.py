"""A LoRA adapter beside a model that was exported as transformers' llava: peft's format, that model's module names."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import LlavaForConditionalGeneration

from tinyllava_fast.errors import UserError
from tinyllava_fast.models import adapter

# What our modules begin with, and what the same modules begin with there. The first that fits counts.
_NAMES = (
    ("llm.model.", "model.language_model."),
    ("vision.", "model.vision_tower."),
    ("connector.layers.0", "model.multi_modal_projector.linear_1"),
    ("connector.layers.2", "model.multi_modal_projector.linear_2"),
    ("connector.linear", "model.multi_modal_projector.linear_1"),
)


def write_adapter(apart: adapter.Adapter, llava: LlavaForConditionalGeneration, scale: float, folder: Path) -> None:
    """Write the adapter of a model to a folder that ``peft.PeftModel.from_pretrained(llava, folder)`` reads.

    apart: the adapter, off its model. llava: the exported model. scale: what the exported projector's rows are
    multiplied by. Raises UserError for an adapted layer that the exported model does not have as it is here.
    """
    layers = {name: _renamed(name, llava) for name in apart.layers}
    if scale != 1.0 and any(name.startswith("connector.") for name in layers):
        raise UserError(
            "the adapter changes the connector, whose last layer is scaled in transformers' llava of this language "
            "model; leave out --keep-adapter, which merges it"
        )
    config = copy.deepcopy(apart.config)
    config.target_modules = sorted(layers.values())
    settings = {layers[name]: each for name, each in apart.layers.items()}
    config.rank_pattern = {name: each.r for name, each in settings.items() if each.r != config.r}
    config.alpha_pattern = {name: each.alpha for name, each in settings.items() if each.alpha != config.lora_alpha}
    tensors = {}
    for key, tensor in apart.tensors.items():
        owner = max((name for name in layers if key.startswith(f"{name}.")), key=len)
        tensors[layers[owner] + key.removeprefix(owner)] = tensor
    adapter.write_folder(config, tensors, folder)


def _renamed(name: str, llava: LlavaForConditionalGeneration) -> str:
    for ours, theirs in _NAMES:
        if name.startswith(ours):
            renamed = theirs + name.removeprefix(ours)
            if renamed in dict(llava.named_modules()):
                return renamed
    raise UserError(
        f"the adapter changes {name}, which transformers' llava has not as a layer of its own; leave out "
        "--keep-adapter, which merges it"
    )
