"""GGUF, the format of llama.cpp, Ollama and LM Studio: model.gguf (language model), mmproj.gguf (tower and connector).

Written with the ``gguf`` package. Beside the two files lies a Modelfile for Ollama. llama.cpp computes what we
compute, but for three things: its GELU is the tanh form, rounded to float16; a picture that is not square is always
padded; after an end token in the middle of a prompt, a SentencePiece tokenizer gets one more space.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.convert.formats._chat import chat_template, plain_template
from tinyllava_fast.data.templates.base import Template
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.errors import UserError, import_optional

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

MODEL, PROJECTOR, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
# llama.cpp's server puts a marker for each picture into the text: <__media_...__>. A line ends after each of ours.
_IMAGES = """\
{%- if '<__media' in found.text -%}{%- set found.text = found.text | replace('__>', '__>\\n') -%}{%- endif -%}
"""


@FORMATS.register("gguf")
class GgufFormat(Format):
    """Language models of llama.cpp with a CLIP or SigLIP tower and one or two linear maps between them."""

    name = "gguf"
    weights: ClassVar[tuple[str, ...]] = ("q8_0", "q4_0")
    keeps_first_patch = True

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        import_optional("gguf", "tlf-convert export --format gguf", "demo")
        from tinyllava_fast.convert.formats import _gguf_vision as vision
        from tinyllava_fast.convert.formats._gguf_llm import language_model
        from tinyllava_fast.convert.formats._gguf_patch import keep_first_patch
        from tinyllava_fast.convert.formats._gguf_shuffle import PREPARE
        from tinyllava_fast.convert.formats._gguf_tokenizer import add_tokenizer
        from tinyllava_fast.convert.formats._gguf_writer import precision, write_file

        template = plain_template(model.lmm.config.template)
        changed = ""
        if model.pictures is not None:
            if not vision.drops_patch(model.lmm):
                raise UserError("--keep-first-patch: the model's tower drops no patch; leave it out")
            model, changed = keep_first_patch(model, model.pictures)
        vision.check_vision(model.lmm)
        kinds = precision(model.weights, model.lmm.dtype)
        known = largest_id(model.tokenizer)[1] + 1
        llm = language_model(model.lmm, known)
        stops = [template.stop_id(model.tokenizer), *model.lmm.family.stop_ids(model.lmm.llm)]

        prepare = PREPARE if vision.shuffles(model.lmm) else _IMAGES

        def describe(writer: GGUFWriter) -> None:
            writer.add_name(f"TinyLLaVA {model.lmm.llm.config.model_type} {model.lmm.vision.name}")
            if changed:
                writer.add_description(changed)
            llm.describe(writer)
            add_tokenizer(writer, model.tokenizer, known, stops=stops, add_bos=_adds_bos(template, model.tokenizer))
            writer.add_chat_template(chat_template(template, image="", prepare=prepare))

        write_file(folder / MODEL, llm.arch, kinds, describe, llm.tensors)
        add_settings = partial(vision.describe_vision, model.lmm, model.processor)
        tensors = partial(vision.vision_tensors, model.lmm, template, model.tokenizer)
        write_file(folder / PROJECTOR, "clip", kinds.projector, add_settings, tensors)
        (folder / MODELFILE).write_text(_modelfile(template), encoding="utf-8")


def _adds_bos(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether prompts begin with the token that the tokenizer puts before a text."""
    ids = template.prompt([("Is it raining?", None)], tokenizer).ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _modelfile(template: Template) -> str:
    """Return Ollama's description: its files, the prompt in Go's template language, greedy decoding."""
    parts = [
        "{{- range $i, $message := .Messages }}{{ if eq $i 0 }}",
        template.system,
        ' {{ end }}{{ if eq $message.Role "user" }}USER: {{ $message.Content }}{{ end }}',
        '{{ if eq $message.Role "assistant" }}',
        f"{template.separator}{{{{ $message.Content }}}}{template.eos}",
        "{{ end }}{{ end }}",
        template.separator.rstrip(),
    ]
    lines = [f"FROM ./{MODEL}", f"FROM ./{PROJECTOR}", f'TEMPLATE """{"".join(parts)}"""', "PARAMETER temperature 0"]
    stop = template.eos.strip()
    return "\n".join(lines + [f"PARAMETER stop {json.dumps(stop)}"] * bool(stop)) + "\n"
