"""tinyllava_fast: train, evaluate and serve small LLaVA-style multimodal models.

Importing the package loads neither torch nor transformers; ``load`` pulls them in when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from tinyllava_fast.infer.assistant import Assistant

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    **engine_options: Any,
) -> Assistant:
    """Open a trained model folder and return an assistant that answers questions about images.

    path: a folder written by ``tlf-train`` (``runs/<name>/final``).
    dtype: "float32" or "bfloat16"; None keeps the dtype the weights were saved in.
    device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
    weights: of the language model: "bf16", or on CPUs quantised to "int8" or "nf4"; None: as dtype says.
    engine_options: of infer.engine.Engine: batch_tokens or kv_cache_bytes, prefill_tokens, threads, compile.
    Raises UserError if the folder is not a model of this toolkit.

    >>> tlf = tinyllava_fast.load("runs/demo/final")
    >>> tlf.answer("cat.png", "What is this?")
    """
    from tinyllava_fast.infer.assistant import Assistant

    return Assistant.from_pretrained(path, dtype=dtype, device=device, weights=weights, **engine_options)
