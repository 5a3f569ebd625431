"""A loaded model that answers questions: what ``tinyllava_fast.load`` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from tinyllava_fast.data.templates.base import TEMPLATES, Template
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError
from tinyllava_fast.infer.engine import Engine
from tinyllava_fast.infer.fast_model.adapters import Adapters
from tinyllava_fast.infer.fast_model.prepare import PreparedModel, check_finite, check_weights, prepare_model
from tinyllava_fast.infer.grammar import Grammar
from tinyllava_fast.infer.types import SETTINGS, Images, Request, Sampling, Scores
from tinyllava_fast.models.io import load_model
from tinyllava_fast.models.lmm import LMM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Assistant:
    """Answers questions about images. Wraps an Engine; ``assistant.engine`` takes conversations and streams."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        device: str = "auto",
        weights: str | None = None,
        system: str | None = None,
        adapter: str | Path | None = None,
        prepare: bool = True,
        **engine_options: Any,
    ) -> Assistant:
        """Open a model folder.

        dtype: "float32", "bfloat16", "float16"; None: as saved. device: "auto" (CUDA when there is
            one), "cpu", "cuda", ...
        weights: of the language model. "bf16" is dtype="bfloat16"; "int8", "nf4": quantized; None: dense.
        system: system text of every prompt; None: the one that the model was trained with.
        adapter: folder of a LoRA adapter that is added to the weights. (``assistant.engine.load_adapter`` keeps several
            beside them, one for each request that names it.)
        prepare: make the weights ready for decoding; False leaves a plain model, slower, which gradients pass through.
        engine_options: keyword arguments of Engine (batch_tokens or kv_cache_bytes, prefill_tokens, threads, compile).
        Raises UserError for an unknown dtype or weights, a device that is not there, and a system text where the chat
        template has no place for one, CheckpointError if the folder is not a model of this toolkit.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}; have {', '.join(DTYPES)}")
        check_weights(weights)
        if weights and not prepare:
            raise UserError(f"weights={weights!r} with prepare=False: plain weights are dense; leave one of them out")
        if weights == "bf16":
            if dtype not in (None, "bfloat16"):
                raise UserError(f"weights='bf16' with dtype={dtype!r}; leave one of them out")
            dtype = "bfloat16"
        device = _device(device)
        lmm, tokenizer, processor = load_model(path, dtype=DTYPES[dtype] if dtype else None, device=device)
        check_finite(lmm, largest_id(tokenizer)[1] + 1, str(path))
        if adapter is not None:
            adapters = Adapters(lmm)
            adapters.merge(adapters.read(adapter))
        engine_options.setdefault("source", path)
        model = prepare_model(lmm.eval(), weights) if prepare else lmm.eval().requires_grad_(False)
        return cls.around(model, tokenizer, processor, system=system, **engine_options)

    @classmethod
    def around(
        cls,
        model: LMM | PreparedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: BaseImageProcessor,
        *,
        system: str | None = None,
        template: str | None = None,
        **engine_options: Any,
    ) -> Assistant:
        """Return an assistant around a model in memory, which is in eval mode; arguments as for ``from_pretrained``.

        Prompts and pictures are made as the model's configuration says, with the chat template of that name if one is
        given. An LMM is left as it is: it may go on training.
        """
        config = (model if isinstance(model, LMM) else model.lmm).config
        name = template or config.template
        chat = under_system(TEMPLATES.get(name, "config.json: template"), tokenizer, system)
        engine_options.setdefault("image_mode", config.image_mode)
        if engine_options["image_mode"] == "anyres":
            engine_options.setdefault("image_grid", config.image_grid)
        return cls(Engine(model, tokenizer, processor, chat, **engine_options))

    def answer(
        self,
        image: Images | None,
        question: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        grammar: Grammar | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer one question. Greedy unless temperature > 0; the settings are those of Sampling.

        Images and beginnings of prompts that earlier answers have seen are not computed again.

        image: path, PIL image, or None; or a list of them, which the question's ``<image>`` markers stand for in order
            (none: they precede the question).
        on_text: called with each piece of the answer as soon as it is certain; the pieces add up to the answer.
        """
        sampling = _sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop,
            grammar=grammar,
        )

        def on_token(_: str, piece: str) -> None:
            if on_text is not None:
                on_text(piece)

        request = Request.ask(question, image, sampling=sampling)
        return self.engine.answer(request, on_token if on_text is not None else None).text

    def answer_many(self, questions: Iterable[tuple[Images | None, str]], *, max_new_tokens: int = 64) -> list[str]:
        """Answer (image, question) pairs together, greedily, in order; questions about one image share its work.

        UserError for an item that is no such pair.
        """
        sampling = _sampling(max_new_tokens=max_new_tokens)
        requests = []
        for number, pair in enumerate(questions):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise UserError(f"questions, item {number}: expected an (image, question) pair, got {pair!r:.80}")
            requests.append(Request.ask(pair[1], pair[0], sampling=sampling))
        return [a.text for a in self.engine.answers(requests)]

    def score(self, image: Images | None, question: str, options: Sequence[str]) -> Scores:
        """Score each option as the answer, all in one pass; ``options[scores.best]`` is the likeliest.

        Arguments as for ``answer``. UserError if there are no options, or they are not a list of texts.
        """
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise UserError(f"options: expected a list of texts such as ['red', 'blue'], got {options!r:.80}")
        (scores,) = self.engine.score([(Request.ask(question, image), list(options))])
        return scores


def _sampling(**settings: Any) -> Sampling:
    """Sampling. Raises UserError for a setting out of range or of another kind."""
    for name in SETTINGS.keys() & settings.keys():
        value, whole = settings[name], SETTINGS[name] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise UserError(f"{name}: expected {'a whole number' if whole else 'a number'}, got {value!r:.80}")
    try:
        return Sampling(**settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def _device(name: str) -> str:
    """The device to run on. Raises UserError if it is not one that this package runs on, or is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = str(name).partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdigit() or name == kind):
        raise UserError(f"device: {name!r}; known: auto, cpu, cuda, cuda:1 (the second GPU)")
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and count <= int(number or 0):
        seen = f"torch sees {count} CUDA devices" if count else "torch sees no CUDA device"
        raise UserError(f"device: {name}, but {seen}; use device='cpu' or 'auto'")
    return str(name)


def under_system(template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None) -> Template:
    """Return the template with another system text; None: as it is. UserError if its prompts would not show the text.

    Raises UserError also as ``Template.with_system`` and ``render`` do.
    """
    if system is None:
        return template
    changed = template.with_system(system)
    if system.strip() not in changed.render([("", None)], tokenizer).text:
        raise UserError("the chat template of this model shows no system text; leave it out")
    return changed
