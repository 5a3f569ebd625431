"""transformers' causal LMs whose attention goes through AttentionInterface: llama, qwen2, phi, gemma, smollm3, ..."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import LLMPart, Values
from tinyllava_fast.models.attention import PACKED
from tinyllava_fast.models.described import reading
from tinyllava_fast.models.hf import cast_parameters, check_keys, config_of, config_to_dict, load_pretrained, seeded
from tinyllava_fast.models.llm.base import LLMS, LLMFamily, families_for
from tinyllava_fast.models.sources import ask_hub, resolve

# Transformations of the logits that the loss and the decoder of this package do not apply.
_LOGIT_CHANGES = {"logits_scaling": 1.0, "logit_scale": 1.0}


@LLMS.register("auto")
class AutoLLM(LLMFamily):
    """AutoModelForCausalLM with packed attention. Remote code is never executed."""

    name = "auto"

    @classmethod
    def tiny(cls) -> Values:
        """See the base class. A family that takes any model names one that has no family of its own."""
        return super().tiny() | ({} if cls.model_types else {"model_type": "smollm3", "no_rope_layers": [1, 0]})

    def complete(self, config: Values, where: str) -> Values:
        """Return the config of a model that is built from one, with what the family's options add to it."""
        return config

    def from_config(
        self,
        config: Values,
        *,
        seed: int | None,
        dtype: torch.dtype = torch.float32,
        where: str,
        strict: bool = True,
    ) -> PreTrainedModel:
        """See the base class."""
        default = self.model_types[0] if self.model_types and strict else None
        built = config_of(default, self.complete(config, where), f"{where}.config", strict=strict)
        self._check(built, where)
        built.use_cache = False
        with (
            reading(f"{where}.config: this {built.model_type} is not usable as a language model", UserError),
            seeded(seed),
        ):
            llm = AutoModelForCausalLM.from_config(built, attn_implementation=PACKED, dtype=dtype)
        llm.tie_weights()  # construction without initialization skips it
        self.adapt(llm)
        return llm

    def from_pretrained(
        self, path: str, *, gguf_file: str | None, overrides: Values, dtype: torch.dtype, where: str
    ) -> PreTrainedModel:
        """See the base class. GGUF weights are dequantized to plain tensors."""
        source, gguf_file = resolve(path, gguf_file, where)
        ask_hub(source, f"{where}.path")
        extra: Values = {"gguf_file": gguf_file} if gguf_file else {}
        with reading(f"{where}.path: cannot load {path!r} as a language model", UserError):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)
            check_keys(type(config), overrides, f"{where}.config")
            for key, value in overrides.items():
                setattr(config, key, value)
            self._check(config, where)
            config.use_cache = False
            if gguf_file:  # transformers 5 keeps blocks packed unless told otherwise, and every matmul then casts
                extra["quantization_config"] = GgufConfig(dequantize=True)
            settings: Values = {"config": config, "dtype": dtype, "attn_implementation": PACKED, **extra}
            llm, missing = load_pretrained(AutoModelForCausalLM, source, trust_remote_code=False, **settings)
        if missing:
            raise UserError(f"{where}.path: {path!r} lacks weights: {', '.join(missing)}")
        if gguf_file:
            _forget_quantization(llm)
        cast_parameters(llm, dtype)
        self.adapt(llm)
        return llm.train()

    def describe(self, llm: PreTrainedModel) -> LLMPart:
        """See the base class."""
        return LLMPart(type=self.name, config=config_to_dict(llm.config), options=asdict(self.options))

    def adapt(self, llm: PreTrainedModel) -> None:
        """Change what has to be changed in a built model; nothing, for a family that transformers runs as it is."""

    def _check(self, config: PreTrainedConfig, where: str) -> None:
        """Raise UserError for a model of another family, or one that packed training would change."""
        if self.model_types and config.model_type not in self.model_types:
            fitting = " or ".join(families_for(config.model_type))
            raise UserError(
                f"{where}.type: {self.name} takes {' or '.join(self.model_types)} models, this one is "
                f"{config.model_type!r}; set {where}.type: {fitting}"
            )
        for key, neutral in _LOGIT_CHANGES.items():
            value = getattr(config, key, neutral)
            if value != neutral:
                raise UserError(f"{where}: {config.model_type} has {key}={value}, which linear_cross_entropy lacks")
        if getattr(config, "attention_dropout", 0):
            raise UserError(
                f"{where}: attention_dropout={config.attention_dropout}: packed attention has no dropout; "
                f"set {where}.config.attention_dropout: 0"
            )
        if not hasattr(config, "num_attention_heads"):
            raise UserError(f"{where}: {config.model_type} is not a decoder of attention layers")
        heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise UserError(f"{where}.config.num_key_value_heads: {shared} do not divide num_attention_heads, {heads}")


def _forget_quantization(llm: PreTrainedModel) -> None:
    """A dequantized model is an ordinary one: saving and training must not meet its origin."""
    if hasattr(llm.config, "quantization_config"):
        del llm.config.quantization_config
    for name, value in (("is_quantized", False), ("hf_quantizer", None), ("quantization_method", None)):
        setattr(llm, name, value)
