"""The update rule of a stage: optimizer, learning rate, loss, and what happens to a step that is no number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tinyllava_fast.config.ranges import (
    Named,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
    Settings,
    Share,
    ShareBelowOne,
    Text,
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update rule, its schedule and the loss it minimizes."""

    type: Annotated[Text, Named("optimizer")] = "adamw"
    """Registered optimizer. adamw is torch's. bitsandbytes' keep moments in 8 bits, let CUDA move them to the host when
    the GPU is full (paged), or keep one alone: Lion wants a third to a tenth of AdamW's lr, and betas of (0.9, 0.99).
    """
    lr: PositiveFloat = 1e-3
    """Peak learning rate of components without their own."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Range(above=0, most=1)] = 1e-8
    """Added to the root of the mean square, so that nothing is divided by zero."""
    weight_decay: NonNegativeFloat = 0.0
    """Applied to matrices only, never to biases, norms and embeddings."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """After the warm-up. wsd: the peak, then a linear fall over the last ``decay_ratio`` of the steps. inverse_sqrt: by
    the square root of the steps so far, whatever number is to come."""
    warmup_ratio: Share = 0.03
    """Share of the stage's steps spent in linear warm-up."""
    min_lr_ratio: Share = 0.0
    """Final learning rate as a share of the peak."""
    decay_ratio: Share = 0.1
    """wsd only: share of the stage's steps in which the learning rate falls."""
    ema: ShareBelowOne = 0.0
    """Decay of a running mean of the trained weights (0.999 remembers about 1,000 steps): what validation looks at, and
    what the stage ends with, instead of the weights of its last step. 0: none."""
    noise_scale: bool = False
    """Estimate about how large a step would pay (the gradient noise scale, train/noise.py), for one more pass over the
    gradients a step. It changes nothing in the training."""
    label_smoothing: Share = 0.0
    """Share of each token's target that is spread evenly over the vocabulary. It raises the reported loss."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the logits, added to each token's loss (1e-4 keeps logits from drifting)."""
    options: Settings = field(default_factory=dict)
    """Settings of this optimizer alone."""
    on_nonfinite: Literal["fail", "skip"] = "fail"
    """A step whose loss or gradient norm is no finite number. fail: stop; skip: let the step change nothing, count it,
    and go on. Its records are listed in output_dir/nonfinite.jsonl in both cases."""
    most_skipped_in_a_row: PositiveInt = 5
    """Stop nevertheless after more of such steps, one behind the other."""
    most_skipped: PositiveInt = 100
    """Stop nevertheless after more of such steps in the stage."""
