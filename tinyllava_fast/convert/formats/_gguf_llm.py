"""Language models as llama.cpp stores them: architecture, settings, tensors under its names.

A family is one entry of ``_FAMILIES``. What llama.cpp would compute otherwise is refused, naming the field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig

from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import Values
from tinyllava_fast.models.lmm import LMM

Named = Iterator[tuple[str, Tensor]]


def _rope(config: PreTrainedConfig) -> Values:
    return getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_freq_constant}


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _common(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Settings that every decoder has; OpenELM's sizes are lists with one entry a layer."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "ffn_sizes", None) or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))


def _rms(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    _common(writer, config)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))  # OpenELM's is no setting
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(_head_dim(config))


def _partial(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Layer norms with a bias, and positions turned into a part of each head."""
    _common(writer, config)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(int(_head_dim(config) * _rope(config).get("partial_rotary_factor", 1.0)))


def _stablelm(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    _partial(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


def _gemma2(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    _rms(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Return rows of q or k for positions that turn neighbours (2i, 2i + 1), where transformers turns halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _llama_tensor(name: str, tensor: Tensor, config: PreTrainedConfig) -> Named:
    if ".q_proj." in name:
        tensor = _interleaved(tensor, config.num_attention_heads)
    if ".k_proj." in name:
        tensor = _interleaved(tensor, config.num_key_value_heads)
    yield name, tensor


def _gemma_tensor(name: str, tensor: Tensor, _: PreTrainedConfig) -> Named:
    """A weight of transformers' Gemma says by how much a norm differs from one."""
    yield name, tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _openelm_tensor(name: str, tensor: Tensor, _: PreTrainedConfig) -> Named:
    if name.endswith("ffn.proj_1.weight"):
        layer = name.split(".")[2]
        gate, up = tensor.chunk(2)
        yield f"model.layers.{layer}.mlp.gate_proj.weight", gate
        yield f"model.layers.{layer}.mlp.up_proj.weight", up
    else:
        yield name, tensor


def _same(name: str, tensor: Tensor, _: PreTrainedConfig) -> Named:
    yield name, tensor


def _biased(config: PreTrainedConfig) -> str:
    return "attention_bias: true" if config.attention_bias else _window(config)


def _tied(config: PreTrainedConfig) -> str:
    return "tie_word_embeddings: true" if config.tie_word_embeddings else _qk_norm(config)


def _window(config: PreTrainedConfig) -> str:
    window = getattr(config, "sliding_window", None)
    used = window is not None and getattr(config, "use_sliding_window", True)
    return f"sliding_window: {window}" if used else ""


def _gemma(config: PreTrainedConfig) -> str:
    return "" if config.tie_word_embeddings else "tie_word_embeddings: false"


def _gemma2_scale(config: PreTrainedConfig) -> str:
    scale, width = config.query_pre_attn_scalar, _head_dim(config)
    return f"query_pre_attn_scalar: {scale} (llama.cpp has {width})" if scale != width else _gemma(config)


def _qk_norm(config: PreTrainedConfig) -> str:
    return "qk_layernorm: true" if getattr(config, "qk_layernorm", False) else ""


@dataclass(frozen=True)
class _Family:
    """A model type of transformers as llama.cpp holds it."""

    arch: MODEL_ARCH
    describe: Callable[[GGUFWriter, PreTrainedConfig], None] = _rms
    adapt: Callable[[str, Tensor, PreTrainedConfig], Named] = _same
    """Changes a tensor of transformers' name; several may come of it."""
    lacks: Callable[[PreTrainedConfig], str] = _window
    """Returns the setting that llama.cpp lacks, "" if it has all."""
    activations: tuple[str, ...] = ("silu", "swish")
    """transformers' names of the function that llama.cpp has in the feed-forward layers."""


_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_FAMILIES = {
    "llama": _Family(MODEL_ARCH.LLAMA, adapt=_llama_tensor),
    "mistral": _Family(MODEL_ARCH.LLAMA, adapt=_llama_tensor),
    "qwen2": _Family(MODEL_ARCH.QWEN2),
    "qwen3": _Family(MODEL_ARCH.QWEN3, lacks=_biased),
    "phi": _Family(MODEL_ARCH.PHI2, describe=_partial, lacks=_tied, activations=_GELU),
    "stablelm": _Family(MODEL_ARCH.STABLELM, describe=_stablelm, lacks=_tied),
    "gemma": _Family(MODEL_ARCH.GEMMA, adapt=_gemma_tensor, lacks=_gemma, activations=_GELU),
    "gemma2": _Family(MODEL_ARCH.GEMMA2, describe=_gemma2, adapt=_gemma_tensor, lacks=_gemma2_scale, activations=_GELU),
    "openelm": _Family(MODEL_ARCH.OPENELM, adapt=_openelm_tensor),
}
"""By transformers' model type."""


@dataclass(frozen=True)
class LanguageModel:
    """A language model that llama.cpp has. known: tokens that are stored; rows for padding are left out."""

    lmm: LMM
    family: _Family
    known: int

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return gguf.MODEL_ARCH_NAMES[self.family.arch]

    def describe(self, writer: GGUFWriter) -> None:
        """Add the settings."""
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_vocab_size(self.known)
        self.family.describe(writer, self.lmm.llm.config)

    def tensors(self) -> Named:
        """Yield (llama.cpp's name, tensor)."""
        llm = self.lmm.llm
        table = gguf.get_tensor_name_map(self.family.arch, llm.config.num_hidden_layers)
        rows = {self.lmm.family.embedding(llm).weight.data_ptr(), self.lmm.family.head(llm)[0].data_ptr()}
        tied = self.lmm.tied_names()
        for name, tensor in llm.state_dict().items():
            if f"llm.{name}" in tied:
                continue
            stored = tensor[: self.known] if tensor.data_ptr() in rows or name == "lm_head.bias" else tensor
            for ours, value in self.family.adapt(name, stored, llm.config):
                theirs = table.get_name(ours, try_suffixes=(".weight", ".bias"))
                if theirs is None:
                    raise UserError(f"llm.{ours}: llama.cpp's {self.arch} has no such tensor")
                yield theirs, value


def _activation(config: PreTrainedConfig) -> str:
    names = ("hidden_activation", "hidden_act", "activation_fn_name")
    return next(str(value) for name in names if (value := getattr(config, name, None)) is not None)


def language_model(lmm: LMM, known: int) -> LanguageModel:
    """Return how llama.cpp holds a model. Raises UserError for one that it lacks, naming the field."""
    config = lmm.llm.config
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"llm: gguf export does not know {config.model_type}; it knows {', '.join(_FAMILIES)}")
    rope = _rope(config).get("rope_type", "default")
    wrong = f"rope_parameters.rope_type: {rope}" if rope != "default" else family.lacks(config)
    if (act := _activation(config)) not in family.activations:
        wrong = f"hidden_act: {act} (llama.cpp has {family.activations[0]})"
    if wrong:
        raise UserError(f"llm.config.{wrong}; gguf export has no such model")
    return LanguageModel(lmm, family, known)
