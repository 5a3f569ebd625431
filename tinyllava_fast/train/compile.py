"""Optional torch.compile of the whole training graph, and an eye on what it costs.

``dynamic=False``: one graph per shape. The shapes of a run are fixed but for the number of images in a pack
(batch.image_multiple), so a few graphs are expected; any further compilation is a bug worth an error-level line.

``engine.compile: auto`` compiles when the steps that are planned repay it:

    steps * SAVED_SHARE * (FLOPs of a step / (EAGER_RATE * measured GEMM peak)) >= SECONDS_PER_LAYER * layers

SECONDS_PER_LAYER is measured: about 70 s for the 41 layers of SmolLM2-135M under SigLIP-B/16-224, from an empty cache
on two cores. The other two are estimates, not measurements: the share of the GEMM peak that an eager step reaches, and
what is saved of it. Inductor's results are kept in the user's cache folder, so the next run starts in seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler

from tinyllava_fast.hardware import cache_folder, gemm_flops_per_s
from tinyllava_fast.log import log
from tinyllava_fast.train import graph_passes

SECONDS_PER_LAYER = 1.7
EAGER_RATE = 0.2
SAVED_SHARE = 0.2


class CompiledForward:
    """Replaces ``model.forward`` by its compiled self; state-dict names and module hooks are untouched.

    seconds: spent compiling, backward graphs (made at the first backward pass) included. graphs: number of forward
    graphs. recompiles: graphs for a shape that had one already, each reported with torch's reason.
    """

    def __init__(self, model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        # Tracing starts afresh: graphs of an earlier stage guard on other frozen parameters.
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.seconds, self.graphs, self.recompiles = 0.0, 0, 0
        self._began = 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        options = graph_passes.options() if backend == "inductor" else None
        self._compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend, options=options)
        model.forward = self._call

    def close(self) -> None:
        """Stop counting."""
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, _: object) -> None:
        self._began = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._began

    def _call(self, **tensors: Tensor) -> Tensor:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        seconds = self.seconds
        loss: Tensor = self._compiled(**tensors)
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        if made:
            self._report(made, self.seconds - seconds, tensors)
        return loss

    def _report(self, made: int, seconds: float, tensors: dict[str, Tensor]) -> None:
        self.graphs += made
        shapes = tuple(tuple(t.shape) for t in tensors.values())
        if shapes in self._seen:
            self.recompiles += made
            log.error("recompiled a known shape in %.1f s, because: %s", seconds, _last_reason())
        else:
            images = tensors["pixel_values"].shape[0] if "pixel_values" in tensors else "?"
            log.info("compiled forward graph %d (%s images) in %.1f s", self.graphs, images, seconds)
        self._seen.add(shapes)


def repays(steps: int, *, flops: float, layers: int, dtype: torch.dtype) -> bool:
    """Whether compiling is worth it for so many steps of so many FLOPs (see above); says why, at info level.

    layers: of decoder and tower. The answer may differ from machine to machine; a run keeps the one it began with.
    """
    eager = flops / (EAGER_RATE * gemm_flops_per_s(dtype))
    saved, cost = steps * SAVED_SHARE * eager, SECONDS_PER_LAYER * layers
    answer = saved >= cost
    verb = "compiling" if answer else "not compiling"
    log.info(
        "engine.compile: auto: %s; it would save %.0f s of %d steps and cost about %.0f s", verb, saved, steps, cost
    )
    return answer


def _last_reason() -> str:
    """Why torch compiled the last graph again; its wording is torch's."""
    metrics = torch._dynamo.utils.get_compilation_metrics()
    reasons = [m.recompile_reason for m in metrics if m.recompile_reason]
    return reasons[-1] if reasons else "torch gives no reason"
