"""OpenVINO GenAI's continuous batching over `tlf-convert export --format openvino`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TITLE = "OpenVINO GenAI 2026.4"
REQUIREMENTS = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "nncf==3.4.0",
    "pillow",
    "numpy",
)
PRECISIONS: dict[str, tuple[str, ...]] = {
    "bf16": ("--dtype", "bfloat16"),
    "int8": ("--weights", "int8"),
    "int4": ("--weights", "int4"),
}
FORMAT = "openvino"
CANNOT = "16-bit weights are float16; it computes in bfloat16 where the CPU has it"


class Side:
    """The loaded pipeline."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import openvino_genai

        del precision  # the export holds it
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        self.pipe: Any = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.tokenizer: Any = self.pipe.get_tokenizer()

    def ask(self, questions: Sequence[tuple[str, str | None]], tokens: int) -> list[list[int]]:
        """Answer the questions, (text, image file), all at once, greedily, in so many tokens each."""
        import numpy
        import openvino
        import openvino_genai
        from PIL import Image

        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        images = [
            [] if image is None else [openvino.Tensor(numpy.asarray(Image.open(image).convert("RGB"))[None])]
            for _, image in questions
        ]
        texts = [text for text, _ in questions]
        results = self.pipe.generate(texts, images=images, generation_config=[config] * len(texts))
        return [self._ids(result.texts[0]) for result in results]

    def _ids(self, text: str) -> list[int]:
        """Return the tokens of an answer: this pipeline gives its text alone."""
        found = self.tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]
        return [int(token) for token in found]
