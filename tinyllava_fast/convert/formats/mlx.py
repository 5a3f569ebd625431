"""MLX, Apple's library: a folder for mlx-vlm's llava loader. It is the ``llava`` folder with some names changed.

mlx-vlm keeps the tower one level deeper and reads ``rope_theta`` beside the sizes of the language model. Its llava is
one fixed architecture, so what it would compute otherwise is refused, or warned of, here.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from tinyllava_fast.convert.formats._base import FORMATS, Model
from tinyllava_fast.convert.formats._towers import plain_encoder
from tinyllava_fast.convert.formats.llava import LlavaFormat
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import LMM

_TOWER = "vision_tower."
_DEEPER = "vision_tower.vision_model."


@FORMATS.register("mlx")
class MlxFormat(LlavaFormat):
    """Llama and Qwen2 with a CLIP or SigLIP tower and two linear maps with a gelu between them."""

    name = "mlx"
    keeps_adapter = False

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        _check_llm(model.lmm.llm.config)
        _check_vision(model.lmm)
        super().write(model, folder)
        for file in folder.glob("*.safetensors"):
            named = {name.replace(_TOWER, _DEEPER, 1): tensor for name, tensor in load_file(file).items()}
            save_file(named, file, metadata={"format": "pt"})
        for file in folder.glob("*.safetensors.index.json"):  # a model past 50 GB
            file.write_text(file.read_text(encoding="utf-8").replace(f'"{_TOWER}', f'"{_DEEPER}'), encoding="utf-8")
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["text_config"]["rope_theta"] = model.lmm.llm.config.rope_parameters["rope_theta"]
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_llm(config: PreTrainedConfig) -> None:
    """Raise UserError naming the field of a language model that mlx-vlm's llava lacks."""
    kind = config.model_type
    if kind not in ("llama", "qwen2"):
        raise UserError(f"llm: mlx-vlm's llava does not know {kind}; it knows llama, qwen2")
    wanted = {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for name, value in wanted.items():
        given = getattr(config, name, None)
        if given is not None and given != value:
            raise UserError(f"llm.config.{name}: {given}; mlx-vlm's llava has {value}")
    if (rope := config.rope_parameters.get("rope_type", "default")) != "default":
        raise UserError(f"llm.config.rope_parameters.rope_type: {rope}; mlx-vlm's llava has default")


def _check_vision(lmm: LMM) -> None:
    """Raise UserError naming the field of a tower or connector that mlx-vlm's llava lacks; warn of its activation."""
    encoder = plain_encoder(lmm.vision)
    kinds = {"clip_vision_model", "siglip_vision_model"}
    if encoder is None or encoder.config.model_type not in kinds:
        raise UserError(f"vision.type: {lmm.vision.name}; mlx-vlm's llava has CLIP and SigLIP towers")
    options = asdict(lmm.connector.options)
    if lmm.connector.name != "mlp" or (options["depth"], options["activation"]) != (2, "gelu"):
        settings = ", ".join(f"{name}: {value}" for name, value in options.items()) or "no options"
        raise UserError(
            f"connector: {lmm.connector.name} ({settings}); mlx-vlm's llava has two linear maps with a gelu between "
            "them: model.connector: {type: mlp2x_gelu}"
        )
    if (act := encoder.config.hidden_act) != "quick_gelu":
        log.warning(
            "vision.config.hidden_act: %s; mlx-vlm 0.7 computes quick_gelu in every tower, so answers about pictures "
            "differ from this model's; CLIP's are right",
            act,
        )
