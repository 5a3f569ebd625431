"""Our model folders as a model of lmms-eval: ``lmms-eval --model tinyllava_fast --model_args pretrained=DIR``.

lmms-eval gives all requests of a task at once, each with functions that open its images. They are opened twice here:
once to find out which requests are about the same images, then in that order for the engine, which encodes every image
once and keeps only those in use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from tinyllava_fast.data.pictures import PictureReading, of_object
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.infer.assistant import Assistant
from tinyllava_fast.infer.types import Request, Sampling

MAX_NEW_TOKENS = 1024  # where a task names no limit, as lmms-eval's LLaVA models
ARGUMENTS = ("pretrained", "dtype", "device", "batch_tokens", "threads")


class TinyLLaVAFast(lmms):
    """A "simple" model of lmms-eval 0.7: a text and images in, a text out.

    pretrained: a model folder. dtype: float32, bfloat16, float16 (default: as saved). device: auto, cpu, cuda, cuda:1;
    among several processes each takes the GPU of its LOCAL_RANK. batch_tokens: tokens in flight. threads: of the CPU.
    batch_size and max_batch_size are lmms-eval's own and mean nothing here: the engine fills its batch by itself.
    Raises UserError for another argument, or a folder that is no model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        device: str = "auto",
        batch_tokens: int = 16384,
        threads: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            name = next(iter(unknown))
            raise UserError(f"--model_args: tinyllava_fast takes no {name!r}; {nearest(name, ARGUMENTS)}")
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if threads is not None:
            torch.set_num_threads(threads)
        self.assistant = Assistant.from_pretrained(
            pretrained,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            threads=threads or torch.get_num_threads(),
        )

    @property
    def device(self) -> torch.device:
        """The model's device; lmms-eval gathers counts there."""
        return next(self.assistant.engine.lmm.parameters()).device

    @property
    def _reading(self) -> PictureReading:
        return self.assistant.engine.lmm.config.reading

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, with the numbers of their tokens."""
        samplings = [_sampling(r.args[1], r.args[4]) for r in requests]
        prompts = [(r.args[0], self._opener(*r.args[2:6])) for r in requests]
        results: list[GenerationResult | None] = [None] * len(requests)
        queue = (
            replace(request, sampling=samplings[int(request.id)]) for request in _by_images(prompts, self._reading)
        )
        for answer in self.assistant.engine.run(queue):
            number = int(answer.id)
            context, options = requests[number].args[:2]
            self.cache_hook.add_partial("generate_until", (context, options), answer.text)
            counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=len(answer.tokens))
            results[number] = GenerationResult(text=answer.text, token_counts=counts)
        return [r for r in results if r is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it; the options of a question share
        its prompt."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, request in enumerate(requests):
            context, _, _, doc_id, task, split = request.args
            groups.setdefault((context, doc_id, task, split), []).append(number)
        members = list(groups.values())
        prompts = [(requests[one].args[0], self._opener(*requests[one].args[2:6])) for one, *_ in members]
        options = [tuple(dict.fromkeys(self._continuation(requests[n]) for n in numbers)) for numbers in members]
        results: dict[int, tuple[float, bool]] = {}
        for scores in self.assistant.engine.score(
            (request, options[int(request.id)]) for request in _by_images(prompts, self._reading)
        ):
            found = dict(zip(scores.options, zip(scores.sums, scores.greedy, strict=True), strict=True))
            for number in members[int(scores.id)]:
                results[number] = found[self._continuation(requests[number])]
        return [results[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(
            "tinyllava_fast answers single turns only; choose tasks with output_type generate_until"
        )

    def _continuation(self, request: Instance) -> str:
        _, target, _, doc_id, task, split = request.args
        return target if isinstance(target, str) else str(target(self.task_dict[task][split][doc_id]))

    def _opener(self, visual: Callable[[object], Visuals], doc_id: int, task: str, split: str) -> Callable[[], Images]:
        return lambda: _images(visual(self.task_dict[task][split][doc_id]), task)


Images = tuple[Image.Image, ...]
Visuals = Iterable[object] | None  # what a task gives for its images, None among them where one is missing


class GenerationOptions(TypedDict, total=False):
    """A task's generation_kwargs, as far as they are used here; null stands for lmms-eval's default."""

    num_beams: int | None
    do_sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_new_tokens: int | None
    until: str | Sequence[str] | None


def _images(visuals: Visuals, task: str) -> Images:
    found = []
    for one in visuals or ():
        if isinstance(one, Image.Image):
            found.append(one)
        elif one is not None:
            raise UserError(f"task {task}: {type(one).__name__} is no image; tinyllava_fast takes images only")
    return tuple(found)


def _by_images(prompts: Sequence[tuple[str, Callable[[], Images]]], reading: PictureReading) -> Iterator[Request]:
    """Requests of (text, opener of the images), those about the same images together; the id is the number."""
    keys = [_digest(opened(), reading) for _, opened in prompts]
    shown: Images = ()
    last: bytes | None = None
    for number in sorted(range(len(prompts)), key=lambda n: (keys[n], n)):
        text, opened = prompts[number]
        if keys[number] != last:  # the engine knows an image by its object
            shown, last = opened(), keys[number]
        yield _request(text, shown, str(number))


def _digest(images: Images, reading: PictureReading) -> bytes:
    """Of what the model sees of the images: the bytes of their own modes leave out palettes and turns."""
    digest = hashlib.sha256()
    for image in images:
        seen = of_object(image, reading)
        digest.update(repr(seen.size).encode() + seen.tobytes())
    return digest.digest()


def _request(text: str, images: Images, id: str) -> Request:
    """Markers in the text stay where they are if there is one for each image; else the images precede it."""
    if text.count(IMAGE_TOKEN) != len(images):
        text = text.replace(IMAGE_TOKEN, "")
    if len(images) > 1:
        return Request.ask(text, list(images), id=id)
    return Request.ask(text, images[0] if images else None, id=id)


def _sampling(options: GenerationOptions, task: str) -> Sampling:
    """lmms-eval's generation_kwargs. UserError for what the engine doesn't do, rather than another result."""
    if (options.get("num_beams") or 1) > 1:
        raise UserError(f"task {task}: num_beams={options['num_beams']}; tinyllava_fast decodes without beams")
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
    until = options.get("until") or ()
    return Sampling(
        max_new_tokens=int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature=temperature,
        top_p=float(options.get("top_p") or 1.0),
        top_k=int(options.get("top_k") or 0),
        stop=[stop for stop in ([until] if isinstance(until, str) else until) if stop],
    )
