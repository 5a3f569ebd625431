"""From a ModelConfig to a model, a tokenizer and an image processor: the only place that composes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.config.load import parse_into
from tinyllava_fast.config.schema import LLMConfig, ModelConfig, VisionConfig
from tinyllava_fast.data.images import pixel_shape
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.log import log
from tinyllava_fast.models import io
from tinyllava_fast.models.architecture import ConnectorPart, LLMPart, LMMConfig, Values, VisionPart
from tinyllava_fast.models.connectors.base import CONNECTORS
from tinyllava_fast.models.construct import Weights, build, build_tower
from tinyllava_fast.models.llm.base import LLMS, LLMFamily
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.models.sources import ask_hub, read_tokenizer, resolve
from tinyllava_fast.models.vision.base import VISION


def build_model(model: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> LMM:
    """Return the model of a run: pretrained parts from their paths, the others with weights drawn from the seed.

    A LoRA adapter of ``path`` stays live: the recipe merges it or goes on with it.
    Raises UserError naming the config key.
    """
    if model.path is not None:
        return io.load_model(_folder(model.path), dtype=dtype, merge_adapter=False)[0].train()
    llm, vision, connector = model.llm, model.vision, model.connector
    architecture = LMMConfig(
        llm=LLMPart(type=llm.type, config=_llm_config(llm), options=llm.options),
        vision=VisionPart(
            type=vision.type, config=vision.config, feature_select=vision.feature_select, options=vision.options
        ),
        connector=ConnectorPart(type=connector.type, options=connector.options),
    )
    weights = Weights(llm=llm.path, gguf_file=llm.gguf_file, vision=vision.path, connector=connector.path, seed=seed)
    lmm = build(architecture, weights, dtype=dtype, feature_layer=vision.feature_layer)
    log.info("model: %s", ", ".join(f"{k} {_millions(v)}" for k, v in lmm.component_parameters().items()))
    return lmm.train()


def build_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run: of the model folder, of ``llm.tokenizer``, or of ``llm.path``."""
    if model.path is not None:
        return io.load_tokenizer(_folder(model.path))
    return _tokenizer(model.llm)


def tokens_per_image(model: ModelConfig) -> int:
    """Return the positions that an input of the tower takes, by the configs alone. UserError as above."""
    config, weights, layer = None, Weights(vision=model.vision.path), model.vision.feature_layer
    if model.path is not None:
        config, weights, layer = io.read_config(_folder(model.path))[0], Weights(), -1
    vision, connector = (model.vision, model.connector) if config is None else (config.vision, config.connector)
    part = VisionPart(
        type=vision.type, config=vision.config, feature_select=vision.feature_select, options=vision.options
    )
    with torch.device("meta"):  # where no weights are read
        tower = build_tower(part, weights, feature_layer=layer, file=model.path)
        cls = CONNECTORS.get(connector.type, "model.connector.type")
        options = parse_into(cls.Options, connector.options, "", key="model.connector.options")
        return cls(tower.hidden_size, tower.hidden_size, options).num_tokens(tower.num_tokens)


def build_image_processor(model: ModelConfig) -> BaseImageProcessor:
    """Return the PIL image processor of the tower: its own files where the path has them, else made from image_size."""
    if model.path is not None:
        return io.load_processor(_folder(model.path))
    processor = _image_processor(model.vision)
    for name in ("image_mean", "image_std"):
        values = getattr(model.vision, name)
        if values is not None:
            setattr(processor, name, list(values))
    return processor


def _folder(path: str) -> str:
    """``model.path``, if it is a model folder: nothing else is asked of the network or of a tokenizer library."""
    try:
        io.check_folder(path)
    except CheckpointError as error:
        raise CheckpointError(f"model.path: {error}") from None
    return path


def _image_processor(config: VisionConfig) -> BaseImageProcessor:
    cls = VISION.get(config.type, "model.vision.type")
    options = parse_into(cls.Options, config.options, "", key="model.vision.options")
    stored = None
    if config.path is not None and not Path(config.path).is_file():  # a file holds weights alone
        ask_hub(config.path, "model.vision.path")
        try:
            stored = cls.processor_class.from_pretrained(config.path)
        except OSError as error:
            if not Path(config.path).is_dir():
                raise UserError(f"model.vision.path: no image processor at {config.path!r}: {error}") from None
            log.info("%s has no preprocessor_config.json; using the %s defaults", config.path, cls.name)
    default = cls.image_processor(cls.input_size(config.path, config.config, options, "model.vision"))
    if stored is None:
        return default
    if pixel_shape(stored) != pixel_shape(default):
        log.info("%s: images become %s, which this tower takes, not %s", config.path, *map(_pixels, (default, stored)))
        for name in ("size", "crop_size", "do_center_crop"):
            setattr(stored, name, getattr(default, name))
    return stored


def _pixels(processor: BaseImageProcessor) -> str:
    _, height, width = pixel_shape(processor)
    return f"{width} x {height}"


def check_vocabulary(lmm: LMM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer makes ids that the model has no embedding for."""
    _check_ids(lmm.vocab_size, tokenizer)


def check_stated_vocabulary(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """``check_vocabulary``, as far as a run's configuration itself states the number of embeddings."""
    stated = model.llm.config.get("vocab_size")
    if model.path is None and isinstance(stated, int):
        _check_ids(stated, tokenizer)


def _check_ids(embeddings: int, tokenizer: PreTrainedTokenizerBase) -> None:
    token, largest = largest_id(tokenizer)
    if largest >= embeddings:
        raise UserError(
            f"the largest id of the tokenizer is {largest}, of {token!r}, but the language model has only "
            f"{embeddings} embeddings, for ids 0 to {embeddings - 1}: give model.llm.tokenizer the tokenizer "
            f"of that model, remove the token, or set model.llm.config.vocab_size to {largest + 1} or more"
        )


def _llm_config(config: LLMConfig) -> Values:
    """Return the transformers config of random weights, or what overrides the pretrained one."""
    given = config.path is not None or not config.config or "vocab_size" in config.config
    if given or config.tokenizer is None:
        return config.config
    return config.config | {"vocab_size": largest_id(_tokenizer(config))[1] + 1}


def _family(config: LLMConfig) -> LLMFamily:
    cls = LLMS.get(config.type, "model.llm.type")
    return cls(parse_into(cls.Options, config.options, "", key="model.llm.options"))


def _tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    path = config.tokenizer if config.tokenizer is not None else config.path
    if path is None:
        raise UserError("model.llm.tokenizer: a language model with random weights needs a tokenizer folder")
    key = "path" if config.tokenizer is None else "tokenizer"
    source, gguf_file = resolve(path, config.gguf_file if config.tokenizer is None else None, "model.llm", key)
    tokenizer = read_tokenizer(source, gguf_file)
    _family(config).prepare_tokenizer(tokenizer)
    return tokenizer


def _millions(parameters: list[tuple[str, torch.nn.Parameter]]) -> str:
    return f"{sum(p.numel() for _, p in parameters) / 1e6:.1f} M"
