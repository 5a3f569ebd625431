"""A LoRA adapter alone, as peft stores it, with the module names of our models."""

from __future__ import annotations

from pathlib import Path

from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log


@FORMATS.register("adapter")
class AdapterFormat(Format):
    """adapter_config.json and adapter_model.safetensors."""

    name = "adapter"
    merge_adapter = False

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        from tinyllava_fast.models import adapter

        lmm = model.lmm
        if not lmm.config.has_lora:
            raise UserError("the model has no adapter; --format llava or factory export the whole model")
        log.info(
            "this is the low-rank part alone: what trained in full beside it (a connector, biases) is not in it. "
            "tlf-convert import takes it back onto a model folder that has those weights: --base MODEL"
        )
        _, tensors = adapter.split(lmm, lmm.state_dict())
        folder.rmdir()  # write makes it
        adapter.write(lmm, tensors, folder)
