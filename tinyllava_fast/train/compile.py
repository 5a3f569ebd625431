"""Optional torch.compile of the whole training graph or of its repeated layers, and an eye on what it costs.

``dynamic=False``: one graph per shape. The shapes of a run are fixed but for the number of images in a pack
(batch.image_multiple), so a few graphs are expected; any further compilation is a bug worth an error-level line.

``engine.compile: regional`` compiles one layer of each kind, not the model: layers that differ in their weights alone
share its code. What lies between the layers (embedding, norm, loss) runs eagerly. A layer that differs in anything
that its code read, such as the window of its attention, or in what learns, is another kind. torch has
``nested_compile_region`` for the same within one graph; in 2.13 its results were wrong (docs/LOG.md).

``engine.compile: auto`` compiles when the steps that are planned repay it:

    steps * (eager step - compiled step) >= compilation

All three are measurements of earlier runs on this machine where there are any (train/timings.py). Where there are none:

    eager step = FLOPs of a step / (EAGER_RATE * measured GEMM peak)        saved of it: COMPILED_SAVES
    compilation = COMPILE_SECONDS_A_LAYER * layers

These three were measured once (ops/_policy.py).
Inductor's results are kept in the user's cache folder, so the next run starts in seconds.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler

from tinyllava_fast.config.schema import EngineConfig
from tinyllava_fast.hardware import cache_folder, gemm_flops_per_s
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.ops import _policy
from tinyllava_fast.train import graph_passes

P = ParamSpec("P")
R = TypeVar("R")


class CompiledForward:
    """Replaces ``model.forward`` by its compiled self; state-dict names and module hooks are untouched.

    layers: compile these, which ``model.forward`` calls, instead of the whole (regional). Called by others without
    gradients, as by the feature cache, they run eagerly. cuda_graphs: replay the whole model's graphs on a GPU; what a
    call returned, and its gradients, are overwritten by the next one.

    seconds: spent compiling, backward graphs (made at the first backward pass) included. graphs: number of forward
    graphs, of layers if these are compiled. recompiles: graphs made in a step whose shapes had been seen, each
    reported with torch's reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[nn.Module] = (),
        cuda_graphs: bool = False,
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        # Tracing starts afresh: graphs of an earlier stage guard on other frozen parameters.
        torch.compiler.reset()
        # An element-wise result that a product reads is made again in the backward pass, not kept: a third of what a
        # decoder layer keeps, for a pass over memory that is fused with others.
        torch._functorch.config.ban_recompute_materialized_backward = False
        for name in ("recompile_limit", "accumulated_recompile_limit"):
            limit = max(getattr(torch._dynamo.config, name), 64 * max(len(layers), 1))
            setattr(torch._dynamo.config, name, limit)
        self.seconds, self.graphs, self.recompiles = 0.0, 0, 0
        self._began = 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._seen: set[tuple[object, ...]] = set()
        self._known = _graphs()
        self._model = model
        self._cuda_graphs = cuda_graphs
        options = graph_passes.options(cuda_graphs=cuda_graphs) if backend == "inductor" else None

        def compiled(function: Callable[P, R]) -> Callable[P, R]:
            return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)

        self._layers, self._running = len(layers), False
        self._forward = model.forward if layers else compiled(model.forward)
        model.forward = self._call
        region = compiled(_forward_layer)
        for layer in layers:
            layer.forward = functools.partial(self._call_layer, region, layer)

    def close(self) -> None:
        """Stop counting."""
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, _: object) -> None:
        self._began = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._began

    def _call(self, **tensors: Tensor) -> Tensor:
        seconds = self.seconds
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        slots = tensors.get("supervised")
        if slots is not None and len(slots) < len(tensors["input_ids"]):  # of which the loss alone knows the number
            torch._dynamo.maybe_mark_dynamic(slots, 0)
        self._running = True
        try:
            loss: Tensor = self._forward(**tensors)
        finally:
            self._running = False
        made, self._known = _graphs() - self._known, _graphs()
        if made:
            self._report(made, self.seconds - seconds, tensors)
        return loss

    def _call_layer(self, region: Callable[..., object], layer: nn.Module, *args: object, **kwargs: object) -> object:
        # Gradient checkpointing around a layer calls it again in the backward pass, where it must compute the same.
        compiles = self._running or torch.is_grad_enabled()
        return (region if compiles else _forward_layer)(layer, *args, **kwargs)

    def _report(self, made: int, seconds: float, tensors: dict[str, Tensor]) -> None:
        self.graphs += made
        kind = self._model.training, torch.is_grad_enabled(), *(tuple(t.shape) for t in tensors.values())
        if kind in self._seen:
            self.recompiles += made
            log.error("recompiled a known shape in %.1f s, because: %s", seconds, _last_reason())
        else:
            images = tensors["pixel_values"].shape[0] if "pixel_values" in tensors else "?"
            what = f"{made} kinds of {self._layers} layers" if self._layers else f"forward graph {self.graphs}"
            log.info("compiled %s (%s images) in %.1f s", what, images, seconds)
        self._seen.add(kind)


def compile_forward(lmm: LMM, engine: EngineConfig) -> CompiledForward:
    """Compile the model as engine.compile (whole, or regional) and engine.cuda_graphs say."""
    layers = lmm.layers if engine.compile == "regional" else ()
    return CompiledForward(lmm, layers=layers, cuda_graphs=engine.cuda_graphs)


def _graphs() -> int:
    """Graphs that this process has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _forward_layer(layer: nn.Module, *args: object, **kwargs: object) -> object:
    """Call a layer through one code object, whose compiled versions all layers share."""
    return type(layer).forward(layer, *args, **kwargs)


def repays(
    steps: int, *, flops: float, layers: int, dtype: torch.dtype, measured: Mapping[str, float] | None = None
) -> bool:
    """Return True if compiling repays in so many steps of so many FLOPs (see above); say why, at info level.

    layers: of decoder and tower. measured: what is known of such steps, see timings.read. The answer may differ from
    machine to machine; a run keeps the one it began with.
    """
    known = measured or {}
    eager = known["eager_s"] if "eager_s" in known else flops / (_policy.EAGER_RATE * gemm_flops_per_s(dtype))
    compiled = known.get("compiled_s", eager * (1 - _policy.COMPILED_SAVES))
    cost = known.get("compile_s", _policy.COMPILE_SECONDS_A_LAYER["training"] * layers)
    saved = steps * (eager - compiled)
    answer = saved >= cost
    log.info(
        "engine.compile: auto: %s; it would save %.0f s of %d steps (%.3g s each, compiled %.3g s) and cost about "
        "%.0f s (%s)",
        "compiling" if answer else "not compiling",
        saved,
        steps,
        eager,
        compiled,
        cost,
        "measured: " + ", ".join(known) if known else "all estimated",
    )
    return answer


def _last_reason() -> str:
    """Return torch's reason, in its words, for compiling the last graph again."""
    metrics = torch._dynamo.utils.get_compilation_metrics()
    reasons = [m.recompile_reason for m in metrics if m.recompile_reason]
    return reasons[-1] if reasons else "torch gives no reason"
