"""OpenELM (Apple, arXiv:2404.14619): decoders whose heads and feed-forward widths grow from layer to layer.

transformers has no class for it, so here is one. Parameters carry the names of Apple's own files, so their weights load
without running their code.

Legend: B batch, T tokens, D width, Hq and Hkv query and key/value heads of a layer, Dh head size, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.llm.auto import AutoLLM
from tinyllava_fast.models.llm.base import LLMS, PAD_WITH_UNK, LLMFamily

_NORM_EPS = 1e-6
_SHARED: Values = {
    "num_gqa_groups": 4,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "ffn_multipliers": [0.5, 4.0],
    "qkv_multipliers": [0.5, 1.0],
}
PRESETS: dict[str, Values] = {
    name: {"num_transformer_layers": layers, "model_dim": dim, "head_dim": head, **_SHARED}
    for name, layers, dim, head in (
        ("270M", 16, 1280, 64),
        ("450M", 20, 1536, 64),
        ("1_1B", 28, 2048, 64),
        ("3B", 36, 3072, 128),
    )
}
"""The released sizes, by the names of their repositories."""


@strict
class OpenELMConfig(PreTrainedConfig):
    """Keys and defaults of Apple's config.json.

    A multiplier is one number, a pair (ends of a line over the layers), or, for ffn_multipliers, one number a layer.
    The head counts follow from them and are lists with one entry a layer, whatever a file says. Raises ValueError for
    values that make no model.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "num_attention_heads": "num_query_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "max_context_length",
    }

    vocab_size: int = 32000
    max_context_length: int = 2048
    num_transformer_layers: int = 12
    model_dim: int = 2048
    head_dim: int = 128
    qkv_multipliers: int | float | list[int | float] = 1.0
    num_query_heads: int | list[int] | None = None
    num_kv_heads: int | list[int] | None = None
    num_gqa_groups: int = 1
    ffn_multipliers: int | float | list[int | float] = 4.0
    ffn_with_glu: bool = True
    ffn_dim_divisor: int = 256
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = False
    share_input_output_layers: bool = False
    rope_freq_constant: int | float = 10000
    rope_max_length: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Derive the layers' sizes from the multipliers."""
        super().__post_init__(**kwargs)
        if self.normalization_layer_name != "rms_norm":
            raise ValueError(f"normalization_layer_name is {self.normalization_layer_name!r}; only 'rms_norm' exists")
        layers, divisor = self.num_transformer_layers, self.head_dim * self.num_gqa_groups
        widths = [_divisible(m * self.model_dim, divisor) for m in _per_layer(self.qkv_multipliers, layers)]
        self.num_query_heads = [width // self.head_dim for width in widths]
        self.num_kv_heads = [heads // self.num_gqa_groups for heads in self.num_query_heads]
        self.ffn_multipliers = _per_layer(self.ffn_multipliers, layers)
        self.tie_word_embeddings = self.share_input_output_layers

    @property
    def ffn_sizes(self) -> list[int]:
        """F of each layer."""
        multipliers = self.ffn_multipliers if isinstance(self.ffn_multipliers, list) else [self.ffn_multipliers]
        return [_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in multipliers]


def _per_layer(multipliers: float | list[int | float], layers: int) -> list[float]:
    if not isinstance(multipliers, list):
        return [multipliers] * layers
    if len(multipliers) == 2:  # the files state these values with two decimals, and the sizes are made from those
        return np.linspace(multipliers[0], multipliers[1], num=layers).round(2).tolist()
    if len(multipliers) != layers:
        raise ValueError(f"{len(multipliers)} multipliers for {layers} layers; give one, two or {layers}")
    return multipliers


def _divisible(value: float, divisor: int) -> int:
    """Return the multiple of divisor nearest to value, at least one, and not more than a tenth below it."""
    nearest_multiple = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest_multiple + divisor if nearest_multiple < 0.9 * value else nearest_multiple


class OpenELMAttention(nn.Module):
    """Grouped-query attention with normalized heads; [B, T, D] -> [B, T, D]."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_heads: int = config.num_query_heads[layer_idx]  # type: ignore[index]
        self.num_kv_heads: int = config.num_kv_heads[layer_idx]  # type: ignore[index]
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        total = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.model_dim, total * self.head_dim, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.normalize_qk_projections:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=_NORM_EPS)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=_NORM_EPS)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """position_embeddings: cosines and sines [B, T, Dh] in float32. Other keywords go to the attention function."""
        shape = hidden_states.shape[:-1]
        qkv = self.qkv_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)  # [B, Hq + 2 Hkv, T, Dh]
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        query, key = self.q_norm(query), self.k_norm(key)
        query, key = (x.to(value.dtype) for x in apply_rotary_pos_emb(query.float(), key.float(), *position_embeddings))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.out_proj(out.reshape(*shape, -1)), weights


class OpenELMFeedForward(nn.Module):
    """[B, T, D] -> [B, T, D] through width F, gated or not."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.ffn_sizes[layer_idx]
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, 2 * size if self.gated else size, bias=False)
        self.proj_2 = nn.Linear(size, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        y = self.proj_1(x)
        if not self.gated:
            return self.proj_2(self.act(y))
        gate, up = y.chunk(2, dim=-1)
        return self.proj_2(self.act(gate) * up)


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn = OpenELMFeedForward(config, layer_idx)
        self.attn_norm = LlamaRMSNorm(config.model_dim, eps=_NORM_EPS)
        self.ffn_norm = LlamaRMSNorm(config.model_dim, eps=_NORM_EPS)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """hidden_states [B, T, D] -> the same shape; keywords as in OpenELMAttention."""
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))


class OpenELMPreTrainedModel(PreTrainedModel):
    """The features of the architecture that transformers asks for."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "token_embeddings"
    _no_split_modules = ["OpenELMDecoderLayer"]  # noqa: RUF012 transformers declares lists
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Apple's files hold it where the head is a matrix of its own; nothing reads it
    _keys_to_ignore_on_load_unexpected = ["transformer.classifier.weight"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class OpenELMModel(OpenELMPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMDecoderLayer(config, i) for i in range(config.num_transformer_layers))
        self.norm = LlamaRMSNorm(config.model_dim, eps=_NORM_EPS)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Either input_ids [B, T] or inputs_embeds [B, T, D]; position_ids [B, T], by default those after the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = _rotary(position_ids, self.config.head_dim, self.config.rope_freq_constant)
        for layer in self.layers:
            hidden = layer(
                hidden,
                position_embeddings=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


def _rotary(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, Dh], in float32 whatever the model's dtype: bf16 cannot tell far positions apart."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() * (1.0 / base ** (steps / head_dim))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """The decoder and its head, which is the token embedding or, unshared, a matrix of its own."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.vocab_size = config.vocab_size
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the module whose weight [V, D] makes the logits."""
        if self.config.share_input_output_layers:
            return self.transformer.token_embeddings
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the last ``logits_to_keep`` positions (0: of all), and with labels [B, T] the loss."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0: all of them
        hidden = outputs.last_hidden_state[:, kept]
        logits = nn.functional.linear(hidden, self.get_output_embeddings().weight)  # type: ignore[arg-type]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)


@LLMS.register("openelm")
class OpenELM(AutoLLM):
    """OpenELM through the class above. Its repositories hold no tokenizer: it uses Llama 2's."""

    name = "openelm"
    model_types = ("openelm",)
    template = "llama"
    roles = PAD_WITH_UNK

    @classmethod
    def tiny(cls) -> Values:
        """See the base class."""
        return {
            "model_dim": 32,
            "num_transformer_layers": 3,
            "head_dim": 8,
            "num_gqa_groups": 2,
            "qkv_multipliers": [0.5, 1.5],
            "ffn_multipliers": [0.5, 2.0],
            "ffn_dim_divisor": 8,
            "normalize_qk_projections": True,
            "share_input_output_layers": True,
            "vocab_size": 61,
        }

    @dataclass(frozen=True, kw_only=True)
    class Options(LLMFamily.Options):
        """Settings of this family alone."""

        preset: str | None = None
        """Released size whose config random weights start from: 270M, 450M, 1_1B or 3B."""

    options: Options

    def complete(self, config: Values, where: str) -> Values:
        """See the base class; the preset's keys come first."""
        preset = self.options.preset
        if preset is not None and preset not in PRESETS:
            raise UserError(f"{where}.options.preset: unknown size {preset!r}; {nearest(preset, PRESETS)}")
        return (PRESETS[preset] if preset else {}) | config
