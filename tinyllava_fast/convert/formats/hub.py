"""A Hub repository: a model folder of ours that transformers also loads, by the code that lies in it.

``AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`` needs transformers and torch, not this
toolkit. Every connector, tower and language model can be in it; the weights are the model folder's own file, so this
toolkit opens the repository as it is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from transformers import GenerationConfig

from tinyllava_fast.convert import hub
from tinyllava_fast.convert.formats._base import FORMATS, Format, Model
from tinyllava_fast.convert.formats._chat import chat_template, plain_template
from tinyllava_fast.convert.formats._hub_card import write_card
from tinyllava_fast.convert.formats._hub_code import parts_source
from tinyllava_fast.data.tokenizer import largest_id
from tinyllava_fast.data.types import IMAGE_TOKEN
from tinyllava_fast.errors import UserError
from tinyllava_fast.models import io

CODE = Path(hub.__path__[0])
_COPIED = ("configuration_tinyllava.py", "modeling_tinyllava.py", "processing_tinyllava.py")
_PARTS = "parts_tinyllava.py"
_MODEL = "TinyLlavaForConditionalGeneration"
_AUTO = {
    "AutoConfig": "configuration_tinyllava.TinyLlavaConfig",
    "AutoProcessor": "processing_tinyllava.TinyLlavaProcessor",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), f"modeling_tinyllava.{_MODEL}"
    ),
}


@FORMATS.register("hub")
class HubFormat(Format):
    """Every model of this toolkit but those of ``image_mode: anyres`` and of a tokenizer's own chat template."""

    name = "hub"
    is_repository = True

    def write(self, model: Model, folder: Path) -> None:
        """See the base class."""
        lmm = model.lmm
        template = plain_template(lmm.config.template)
        if lmm.config.image_mode not in ("square", "pad"):
            raise UserError(
                f"image_mode: {lmm.config.image_mode}; the code of a Hub repository makes one row of tiles a "
                "picture: --format factory keeps it"
            )
        kind = type(model.processor)
        if not kind.__module__.startswith("transformers.models."):
            raise UserError(
                f"vision.type: {lmm.vision.name}; its image processor, {kind.__module__}.{kind.__name__}, is none of "
                "transformers', so a Hub repository could not make it"
            )
        parts = parts_source(lmm)
        whole = folder / "model"
        io.save_model(lmm, model.tokenizer, model.processor, whole)
        for path in list(whole.iterdir()):
            shutil.move(path, folder / path.name)
        whole.rmdir()
        # transformers takes two repositories for one whose configuration has the same code.
        mark = f"# Of the parts {hashlib.sha256(parts.encode()).hexdigest()[:16]}.\n"
        for name in _COPIED:
            code = (CODE / name).read_text(encoding="utf-8").replace(f"from {hub.__name__}.", "from .")
            (folder / name).write_text(mark + code, encoding="utf-8")
        (folder / _PARTS).write_text(parts, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(chat_template(template, image=f"{IMAGE_TOKEN}\n"), encoding="utf-8")
        self._configure(model, folder)
        write_card(model, folder)

    def _configure(self, model: Model, folder: Path) -> None:
        """Add to config.json what the code reads, and write generation_config.json."""
        lmm, path = model.lmm, folder / "config.json"
        known = largest_id(model.tokenizer)[1] + 1
        token = max(known, lmm.vocab_size)
        kind = type(model.processor)
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {
            "architectures": [_MODEL],
            "auto_map": _AUTO,
            "image_token_id": token,
            "image_token_count": lmm.tokens_per_image,
            "image_processor": f"{kind.__module__}.{kind.__name__}",
        }
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        template = plain_template(lmm.config.template)
        ends = sorted({template.stop_id(model.tokenizer), *lmm.family.stop_ids(lmm.llm)})
        pad = model.tokenizer.pad_token_id
        GenerationConfig(
            bos_token_id=model.tokenizer.bos_token_id,
            eos_token_id=ends,
            pad_token_id=pad if pad is not None else ends[0],
            suppress_tokens=list(range(known, lmm.vocab_size)) or None,
            use_cache=True,
        ).save_pretrained(folder)
