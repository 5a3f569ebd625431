"""tinyllava_fast: train, evaluate and serve small LLaVA-style multimodal models.

Importing the package loads neither torch nor transformers; ``load`` pulls them in when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllava_fast.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Any

    from tinyllava_fast.look.assistant import Assistant

__all__ = ["__version__", "load"]


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    plugins: Iterable[str] = (),
    system: str | None = None,
    adapter: str | Path | None = None,
    **engine_options: Any,
) -> Assistant:
    """Open a trained model folder and return an assistant that answers questions about images.

    path: a folder written by ``tlf-train`` (``runs/<name>/final``).
    dtype: "float32" or "bfloat16"; None keeps the dtype the weights were saved in.
    device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
    weights: of the language model: "bf16", or quantized to "int8" or "nf4"; None: as dtype says.
    plugins: Python files (ending in .py) or modules with components of yours that the model is made of.
    system: system text of every prompt; None: the one that the model was trained with.
    adapter: folder of a LoRA adapter that is added to the weights.
    engine_options: of infer.engine.Engine: batch_tokens or kv_cache_bytes, prefill_tokens, threads, compile.
    Raises UserError if the folder is not a model of this toolkit, or the device is not there.

    >>> tlf = tinyllava_fast.load("runs/demo/final")
    >>> tlf.answer("cat.png", "What is this?")
    >>> tlf.look("cat.png", "What is this?").maps()[0].raster(8, 8)
    """
    from tinyllava_fast.look.assistant import Assistant
    from tinyllava_fast.plugins import load_plugins

    load_plugins([plugins] if isinstance(plugins, str) else plugins)
    return Assistant.from_pretrained(
        path, dtype=dtype, device=device, weights=weights, system=system, adapter=adapter, **engine_options
    )
