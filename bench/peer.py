"""The peer, as a transformers user trains it: LlavaForConditionalGeneration under HF Trainer, with our weights.

Choices, each in the peer's favour where there was one:
- attention "sdpa", unless another is asked for; a right-padded batch as long as its longest sample; batches tokenized
  and preprocessed beforehand;
- weights loaded in bf16 and trained in bf16 without autocast ("bf16"): the fastest way that Trainer offers on a CPU.
  It keeps neither fp32 master weights nor fp32 moments, so it does less work than we do. "autocast" is
  Trainer(bf16=True) over bf16 weights, "master" is Trainer(bf16=True) over fp32 weights (what the documentation calls
  mixed precision), "float32" is the equivalence test's;
- Trainer's default optimizer, fused AdamW; no gradient checkpointing unless it is asked for; no logging, saving or
  evaluation between steps;
- LoRA: peft's layers on every linear layer of the decoder, in the dtype of the weights. peft by itself would keep
  adapters in float32 and cast each input, which is slower;
- no pooling head on the SigLIP tower. Like every Llava it runs one tower layer more than is read.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tinyllava_fast.bench.gate import Gate
from tinyllava_fast.bench.samples import PlainSample, pad
from tinyllava_fast.config.schema import RecipeConfig, StageConfig, TuneConfig
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import adapter
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes import lora


def build_peer(
    lmm: LMM, *, feature_layer: int, image_token: int, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """Return the stock model with the same weights as ours, in float32.

    feature_layer: negative, as in the run's config: the peer builds the whole tower. image_token: an id that no text
    uses. UserError for what Llava cannot express.
    """
    linears = [m for m in lmm.connector.modules() if isinstance(m, nn.Linear)]
    if feature_layer >= 0 or len(linears) != 2 or lmm.connector.name != "mlp" or len(lmm.vision.widths) != 1:
        raise UserError(
            "the peer is transformers' Llava: it needs vision.feature_layer < 0, one tower, and a connector of depth 2"
        )
    vision_config = cast(PreTrainedConfig, copy.deepcopy(lmm.vision.config))
    vision_config.num_hidden_layers += -1 - feature_layer
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=copy.deepcopy(lmm.llm.config),
        image_token_index=image_token,
        image_seq_length=lmm.tokens_per_image,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if lmm.vision.feature_select == "patch" else "full",
    )
    peer = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)
    peer.model.language_model.load_state_dict(lmm.llm.base_model.state_dict())
    # only what lies behind the selected layer may stay random
    report = peer.model.vision_tower.load_state_dict(lmm.vision.state_dict(), strict=False)
    assert not report.unexpected_keys, report.unexpected_keys  # noqa: S101 our towers carry stock names
    projector = peer.model.multi_modal_projector
    projector.linear_1.load_state_dict(linears[0].state_dict())
    projector.linear_2.load_state_dict(linears[1].state_dict())
    if not config.tie_word_embeddings:
        peer.lm_head.load_state_dict({"weight": lmm.llm.get_output_embeddings().weight})
    return peer


def adapt_peer(peer: LlavaForConditionalGeneration, lmm: LMM, recipe: RecipeConfig, *, seed: int) -> None:
    """Give the peer's decoder peft's own LoRA layers, with the settings and the first values of ours.

    lmm: gets the adapter too, which is how those values come about.
    """
    plan = lora.plan(lmm, recipe)
    if plan is None:
        return
    peft = adapter.import_peft()
    lora.inject(lmm, plan, None, seed)
    held = adapter.take(lmm)
    assert held is not None  # noqa: S101 injected above
    ours, theirs = f"llm.{lmm.llm.base_model_prefix}.", "model.language_model."
    config = copy.deepcopy(held.config)
    config.target_modules = [theirs + name.removeprefix(ours) for name in held.layers]
    config.lora_dropout = plan.dropout["llm"]
    peft.inject_adapter_in_model(config, peer)
    tensors = {theirs + name.removeprefix(ours): tensor for name, tensor in held.tensors.items()}
    outcome = peft.set_peft_model_state_dict(peer, tensors)
    assert not outcome.unexpected_keys, outcome.unexpected_keys  # noqa: S101 names are stock


def free_token(vocabulary: int, samples: list[PlainSample]) -> int:
    """Return the highest token id that no sample uses: Llava marks image positions by an id."""
    used = torch.cat([s.input_ids for s in samples]).unique()
    free = torch.ones(vocabulary, dtype=torch.bool)
    free[used[used >= 0]] = False
    if not free.any():
        raise UserError("every token of the vocabulary occurs in the samples; none is left to mark images for the peer")
    return int(free.nonzero().max())


def parts(peer: LlavaForConditionalGeneration, recipe: RecipeConfig) -> list[tuple[nn.Module, TuneConfig]]:
    """Return the components of the peer, each with what the recipe says of it."""
    return [
        (peer.model.language_model, recipe.llm),
        (peer.lm_head, recipe.llm),
        (peer.model.vision_tower, recipe.vision),
        (peer.model.multi_modal_projector, recipe.connector),
    ]


class _Paced(TrainerCallback):
    """Lets Trainer's own loop run a step only when the gate opens; the clock runs from there to the end of the step."""

    def __init__(self, gate: Gate, last_loss: Callable[[], Tensor]) -> None:
        self.gate, self.last_loss = gate, last_loss

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Data loading and callbacks lie before this point, so they are not charged to the peer."""
        self.gate.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Forward, backward, clipping, optimizer and zero_grad are over."""
        self.gate.end(float(self.last_loss()))


class _RecordingTrainer(Trainer):
    """Trainer that remembers the loss of the step (it logs rounded means only)."""

    loss_of_step: Tensor = torch.tensor(float("nan"))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As Trainer's; keeps the returned loss, which is the mean over supervised tokens."""
        self.loss_of_step = super().training_step(model, inputs, num_items_in_batch)
        return self.loss_of_step


def run_peer(
    peer: LlavaForConditionalGeneration,
    samples: list[PlainSample],
    gate: Gate,
    stage: StageConfig,
    *,
    per_step: int,
    precision: str,
    device: str,
    pad_token: int,
    checkpointing: bool = False,
    liger: bool = False,
) -> None:
    """Train on the samples in order, ``per_step`` a step, each step when the gate opens; returns after the last one."""
    optim = stage.optim
    for module, tune in parts(peer, stage.recipe):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(tune.tune == "full" or (tune.tune == "lora" and "lora_" in name))
    if precision in ("bf16", "autocast"):
        peer.to(torch.bfloat16)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=per_step,
            max_steps=len(samples) // per_step,
            train_sampling_strategy="sequential",
            bf16=precision in ("autocast", "master"),
            learning_rate=optim.lr,
            lr_scheduler_type="constant",
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_epsilon=optim.eps,
            max_grad_norm=optim.clip_norm,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            use_liger_kernel=liger,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=device == "cpu",
        )
        batches = [dict(vars(s)) for s in samples]
        trainer = _RecordingTrainer(
            model=peer,
            args=arguments,
            train_dataset=batches,
            data_collator=lambda rows: pad([PlainSample(**row) for row in rows], pad_token),
        )
        trainer.add_callback(_Paced(gate, lambda: trainer.loss_of_step))
        trainer.train()
