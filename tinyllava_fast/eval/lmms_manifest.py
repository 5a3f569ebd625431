"""The entry point by which lmms-eval finds our models. Nothing heavy: it is imported on every run of lmms-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return the entry that lmms-eval 0.7 registers: the id ``tinyllava_fast`` and the place of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="tinyllava_fast", simple_class_path="tinyllava_fast.eval.lmms_model.TinyLLaVAFast", aliases=()
    )
