"""What a decoder's configuration says of positions: whether K and V can serve other sequences than their own."""

from __future__ import annotations

from transformers import PreTrainedConfig

from tinyllava_fast.infer.fast_model.fused_step import FIXED_ANGLES


def has_window(config: PreTrainedConfig) -> bool:
    """Return whether some layer attends only to the last tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None))


def has_fixed_angles(config: PreTrainedConfig) -> bool:
    """Return whether K depends on a token's position alone, and not on how long the longest sequence of the pass is."""
    scaling = getattr(config, "rope_parameters", None) or {}
    kinds = [scaling, *scaling.values()]
    return all(k.get("rope_type", "default") in FIXED_ANGLES for k in kinds if isinstance(k, dict))
