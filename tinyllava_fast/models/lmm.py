"""The multimodal model: vision tower -> connector -> splice -> decoder -> loss, over one packed row of tokens.

The components are transformers' own modules. Three things differ from running them side by side, all by supported
hooks: attention is block-diagonal over the packed segments (models/attention.py), the tower ends at the layer that is
read, and the output projection runs on supervised rows only, inside the loss.

Legend: T tokens, N images, K tokens an image, D width, V vocabulary, S segments, M supervised slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tinyllava_fast.data.pictures import PictureReading
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.architecture import LMMConfig
from tinyllava_fast.models.attention import KVView
from tinyllava_fast.models.connectors.base import Connector
from tinyllava_fast.models.llm.base import LLMFamily
from tinyllava_fast.models.vision.base import VisionTower
from tinyllava_fast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_by_token
from tinyllava_fast.ops.splice import splice

COMPONENTS = ("vision", "connector", "llm")


class LMM(nn.Module):
    """A LLaVA-style model. ``lmm(**batch.tensors())`` is the training loss of a PackedBatch."""

    def __init__(
        self, llm: PreTrainedModel, vision: VisionTower, connector: Connector, family: LLMFamily, config: LMMConfig
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.llm = llm
        self.family = family
        self.config = config
        connector.check_widths(vision.widths)
        self.tokens_per_image = connector.num_tokens(vision.num_tokens)  # K
        self.image_size = vision.image_size
        text = llm.config
        self.hidden_size: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        # OpenELM's number differs from layer to layer
        self.num_kv_heads: list[int] = kv_heads if isinstance(kv_heads, list) else [kv_heads] * self.num_layers
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.embedding_scale = family.embedding_scale(llm)
        self.logit_softcap = family.logit_softcap(llm)
        self.set_loss(label_smoothing=0.0, z_loss=0.0)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.family.embedding(self.llm).num_embeddings

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated layers of tower and decoder, in the order they run."""
        return [*self.vision.layers, *self.family.layers(self.llm)]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        return self.family.embedding(self.llm).weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.family.embedding(self.llm).weight.device

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        image_slots: Tensor,
        supervised: Tensor,
        pixel_values: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return the SUM of the losses of all supervised tokens, a float32 scalar.

        Arguments as in data.types.PackedBatch. With no image (N == 0) the tower does not run. After
        ``set_loss(by_segment=True)``: [1 + S], that sum and those of the segments, which have no gradient.
        """
        features = self.encode_images(pixel_values).flatten(0, 1)  # [N * K, D]
        embeds = self.embed(input_ids, features, image_slots)
        hidden = self.decode(embeds, position_ids, cu_seqlens=cu_seqlens, prefix=prefix)
        weight, bias = self.family.head(self.llm)
        loss_of = linear_cross_entropy_by_token if self.loss_by_segment else linear_cross_entropy
        found = loss_of(
            hidden,
            weight,
            labels,
            supervised,
            bias=bias,
            softcap=self.logit_softcap,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        if isinstance(found, Tensor):
            return found
        loss, losses = found
        positions = torch.arange(len(losses), device=losses.device, dtype=cu_seqlens.dtype)
        segments = torch.bucketize(positions, cu_seqlens[1:], right=True)  # S: the tail that nothing uses
        sums = losses.new_zeros(len(cu_seqlens)).index_add(0, segments, losses)
        return torch.cat([loss[None], sums[:-1]])

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, K, D] rows for the language model, before any embedding scale.

        Features of the tower, [N, K', V], go to the connector as they are. With N == 0 the tower does not run. (Engines
        of several processes, whose collectives need every process to call every module in every step, put a blank
        image into such a batch.)
        """
        if pixel_values.shape[0] > 0:
            is_feature = pixel_values.dim() == 3
            return self.connector(pixel_values.to(self.dtype) if is_feature else self.vision(pixel_values))
        shape = (0, self.vision.num_tokens, self.vision.hidden_size)
        return self.connector(torch.zeros(shape, dtype=self.dtype, device=pixel_values.device))

    def embed(self, input_ids: Tensor, features: Tensor, image_slots: Tensor) -> Tensor:
        """Token embeddings [T, D] with image rows [R, D] at image_slots [R]; slot T means nowhere."""
        weight = self.family.embedding(self.llm).weight
        return self.scale_embeddings(splice(input_ids, weight, features.to(weight.dtype), image_slots))

    def scale_embeddings(self, embeds: Tensor) -> Tensor:
        """Rows [T, D] as they enter the decoder, from rows of the embedding or of an image."""
        if self.embedding_scale == 1.0:
            return embeds
        # Gemma scales every row that enters the decoder. Its image rows are scaled too, as they were in training.
        # The factor is rounded to the model's dtype, as Gemma's is: 45.25 in bf16 where sqrt(D) is 45.2548.
        return embeds * torch.full((), self.embedding_scale, dtype=embeds.dtype, device=embeds.device)

    def decode(self, embeds: Tensor, position_ids: Tensor, **attention_kwargs: Tensor | KVView | None) -> Tensor:
        """Return the hidden states [T, D] after the final norm.

        attention_kwargs: ``cu_seqlens`` and ``prefix`` of a PackedBatch, or ``kv``, a models.attention.KVView.
        """
        hidden = self.family.hidden(self.llm, embeds.unsqueeze(0), position_ids.unsqueeze(0), **attention_kwargs)
        return hidden.squeeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, V] in the model's dtype."""
        return self.cap_logits(nn.functional.linear(hidden, *self.family.head(self.llm)))

    def cap_logits(self, logits: Tensor) -> Tensor:
        """Return products with the head [R, V] as logits: Gemma 2 squashes them into +-softcap."""
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap) if self.logit_softcap else logits

    def set_loss(self, *, label_smoothing: float, z_loss: float, by_segment: bool = False) -> None:
        """Set what the training loss has besides the cross-entropy, as ops.linear_cross_entropy defines it.

        A new model's loss has none. by_segment: let ``forward`` return the sums of the segments, too.
        """
        self.label_smoothing, self.z_loss, self.loss_by_segment = label_smoothing, z_loss, by_segment

    def describe_training(
        self, *, template: str, turns: str, image_mode: str, image_grid: list[tuple[int, int]], reading: PictureReading
    ) -> None:
        """State in ``config`` how prompts and images are made in training: whoever uses the model has to know."""
        self.config = replace(
            self.config, template=template, turns=turns, image_mode=image_mode, image_grid=image_grid, reading=reading
        )

    def set_gradient_checkpointing(self, which: bool | Literal["selective"]) -> None:
        """Recompute decoder layers in the backward pass instead of keeping their activations: all, or every other one.

        Raises UserError for "selective" where transformers checkpoints the layers of an architecture together.
        """
        # transformers renamed the two methods on its way to version 6
        name = "activation" if hasattr(self.llm, "activation_checkpointing_enable") else "gradient"
        if not which:
            getattr(self.llm, f"{name}_checkpointing_disable")()
            return
        options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(self.llm, f"{name}_checkpointing_enable")(**options)
        if which != "selective":
            return
        layers = [layer for layer in self.family.layers(self.llm) if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            raise UserError(
                f"engine.gradient_checkpointing: selective, but the layers of {type(self.llm).__name__} are "
                "checkpointed together; set true or false"
            )
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False

    def component_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of each component; a tied weight is listed once."""
        return {name: list(getattr(self, name).named_parameters()) for name in COMPONENTS}

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that ``forward`` reads outside the module that owns them: ZeRO-3 has to gather them for it."""
        weight, bias = self.family.head(self.llm)
        used = [self.family.embedding(self.llm).weight, weight, bias]
        unique = {id(p): p for p in used if isinstance(p, nn.Parameter)}
        return list(unique.values())

    def tied_names(self) -> dict[str, str]:
        """State-dict names that are another name's tensor: {"llm.lm_head.weight": "llm.model.embed_tokens.weight"}."""
        tied: dict[str, str] = getattr(self.llm, "all_tied_weights_keys", None) or {}
        return {f"llm.{name}": f"llm.{source}" for name, source in tied.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LMM:
        """Moves go through; a change of dtype spares float buffers: bf16 rotary frequencies misplace tokens."""
        before = {name: b for name, b in self.named_buffers() if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            owner = self.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            moved = getattr(owner, leaf)
            if moved.dtype != old.dtype:
                setattr(owner, leaf, old.to(moved.device))
        return self
