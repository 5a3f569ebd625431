"""A loaded model's language model made ready for decoding: weights dense or quantized, products at memory speed.

A step of decoding reads every weight once and does little else, so its time is bytes over bandwidth: huge pages raise
the bandwidth, int8 halves the bytes, nf4 quarters them. More rows than decode_linear takes (prompts, images) run
through ops.prefill_linear on AMX and torch's GEMM elsewhere; nf4, and int8 for a GEMM, is dequantized for that product.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from tinyllava_fast.errors import CheckpointError, UserError, nearest
from tinyllava_fast.infer.fast_model.decoder_layer import DecodeLayer, takes
from tinyllava_fast.infer.fast_model.linear import DecodeLinear
from tinyllava_fast.infer.fast_model.tower_layer import prepare_tower
from tinyllava_fast.infer.sampling import all_finite
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops import linear
from tinyllava_fast.ops.decode_linear import in_huge_pages
from tinyllava_fast.recipes.linears import linears

WEIGHTS = ("bf16", "int8", "nf4")
_RUNS = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
"""The dtypes of the kernels of each device: C++, Triton."""


def check_weights(weights: str | None) -> None:
    """Raise UserError for an unknown storage of weights; None is dense, in the model's dtype."""
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}; {nearest(weights, WEIGHTS)}")


def check_finite(lmm: LMM, vocab: int, source: str) -> None:
    """CheckpointError, naming the model ``source`` and the tensor, for a weight that is nan or infinite.

    A softmax can hide one from the logits. vocab: rows of the embedding and the projection beyond it are padding, which
    was never trained and is never used.
    """
    padded = {id(t) for t in (lmm.family.embedding(lmm.llm).weight, lmm.family.head(lmm.llm)[0])}
    for name, weight in lmm.named_parameters():
        if not all_finite(weight.detach()[:vocab] if id(weight) in padded else weight.detach()):
            raise CheckpointError(
                f"{source}: the weight {name} is not finite (nan or infinity): the file is damaged or the training "
                "diverged; take an earlier checkpoint or copy the folder again"
            )


class PreparedModel:
    """An LMM as the engine runs it: made ready for decoding by ``prepare_model``, or left as it is.

    head: how hidden states [R, D] become products with the output head [R, V], once the model is ready; None: the
    model is left as it is and multiplies by its own head.
    """

    def __init__(self, lmm: LMM, head: Callable[[Tensor], Tensor] | None = None) -> None:
        self.lmm = lmm
        self._head = head

    @property
    def ready(self) -> bool:
        """Return whether prepare_model has replaced its layers."""
        return self._head is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] of hidden states [R, D], in the model's dtype."""
        return self.lmm.logits(hidden) if self._head is None else self.lmm.cap_logits(self._head(hidden))


def prepare_model(lmm: LMM, weights: str | None = None) -> PreparedModel:
    """Replace the layers that decoder_layer.py, tower_layer.py and linear.py compute faster by theirs, in place.

    weights: None or "bf16" (dense), "int8" (a scale for each output), "nf4" (layers; the projection, whose errors
    choose tokens, in int8). A tied projection that is quantized leaves the embedding as it is, for look-ups. The model
    can then neither train nor be saved. Dense models on other devices, or on a CPU in float16, stay as they are.
    Raises UserError for unknown weights, and for quantized ones where the kernel does not run.
    """
    check_weights(weights)
    if lmm.dtype not in _RUNS.get(lmm.device.type, ()):
        if weights in ("int8", "nf4"):
            raise UserError(
                f"weights={weights!r}: quantized decoding runs on CPUs in float32 or bfloat16 and on CUDA, the model "
                f"is on {lmm.device} in {str(lmm.dtype).removeprefix('torch.')}; load it with dtype='bfloat16'"
            )
        return PreparedModel(lmm)
    if lmm.device.type == "cpu":
        prepare_tower(lmm.vision)
    dense = weights in (None, "bf16")
    layers = lmm.family.layers(lmm.llm)
    for i, layer in enumerate(layers):  # one by one: the old weights of a layer are free before the next copy is made
        if takes(layer, lmm.llm.config):
            layers[i] = DecodeLayer(layer, weights).eval()
    for name in [name for name, _ in linears(lmm, "llm")]:
        lmm.set_submodule(name, DecodeLinear([lmm.get_submodule(name)], weights).eval())
    weight, bias = lmm.family.head(lmm.llm)
    if dense:
        weight.data = in_huge_pages(weight.data)  # in place: it may be the embedding's, too
        return PreparedModel(lmm, lambda hidden: linear(hidden, *lmm.family.head(lmm.llm)))
    tied = weight is lmm.family.embedding(lmm.llm).weight
    head = DecodeLinear([SimpleNamespace(weight=weight, bias=bias)], "int8")
    if not tied:
        weight.data = weight.data.new_empty(0)
    return PreparedModel(lmm, head)
