"""llama.cpp's server, in the process, by the package xllamacpp over `tlf-convert export --format gguf`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STREAMS = 32
CONTEXT = 512  # tokens of each stream
TITLE = "llama.cpp"
REQUIREMENTS = ("xllamacpp==2026.10.11549",)
PRECISIONS: dict[str, tuple[str, ...]] = {
    "bf16": ("--dtype", "bfloat16"),
    "int8": ("--weights", "q8_0"),
    "int4": ("--weights", "q4_0"),
}
FORMAT = "gguf"
CANNOT = "the wheel of PyPI; which kernels it loads is not told"


class Side:
    """The loaded server, which listens on no port of ours."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import xllamacpp

        del precision  # the export holds it
        params = xllamacpp.CommonParams()
        decoder, projector = params.model, params.mmproj  # where the files are, not modules
        decoder.path, projector.path = str(Path(model, "model.gguf")), str(Path(model, "mmproj.gguf"))
        params.n_ctx, params.n_parallel, params.verbosity = CONTEXT * STREAMS, STREAMS, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server: Any = xllamacpp.Server(params)

    def ask(self, questions: Sequence[tuple[str, str | None]], tokens: int) -> list[list[int]]:
        """Answer the questions, (text, image file), all at once, greedily, in so many tokens each."""
        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(lambda asked: self._one(asked[0], asked[1], tokens), questions))

    def _one(self, text: str, image: str | None, tokens: int) -> list[int]:
        parts: list[dict[str, object]] = [{"type": "text", "text": text}]
        if image is not None:
            data = base64.b64encode(Path(image).read_bytes()).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}})
        message = {"role": "user", "content": parts}
        order = {"messages": [message], "max_tokens": tokens, "temperature": 0, "logprobs": True, "ignore_eos": True}
        reply = self.server.handle_chat_completions(order)
        if "choices" not in reply:
            raise RuntimeError(f"llama.cpp refused the request: {reply}")
        return [piece["id"] for piece in reply["choices"][0]["logprobs"]["content"]]
