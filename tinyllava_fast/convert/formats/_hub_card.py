"""The model card of a Hub repository, from what the run folder holds; what it lacks is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from PIL import Image

from tinyllava_fast.config.compose import read_yaml
from tinyllava_fast.convert.formats._base import Model
from tinyllava_fast.data.images import load_image
from tinyllava_fast.errors import UserError
from tinyllava_fast.eval.machine import model_digest
from tinyllava_fast.eval.report.data import Shot, gather
from tinyllava_fast.eval.results import RESULTS, read_results
from tinyllava_fast.eval.types import MetricRow
from tinyllava_fast.log import log
from tinyllava_fast.models.lmm import COMPONENTS

_SHOTS, _SIDE = 6, 256
_USE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "REPOSITORY"
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
batch = processor(text=text, images=[Image.open("picture.png")], return_tensors="pt")
answer = model.generate(**batch, max_new_tokens=64, do_sample=False)[0, batch["input_ids"].shape[1]:]
print(processor.tokenizer.decode(answer, skip_special_tokens=True))
```"""


def write_card(model: Model, folder: Path) -> None:
    """Write README.md, and sample pictures to ``samples/``. Needs a run folder around the model for most of it."""
    source = model.source.resolve() if model.source is not None else None
    run = source.parent if source is not None and (source.parent / "config.yaml").is_file() else None
    title = run.name if run is not None else source.name if source is not None else "model"
    digest = model_digest(source) if source is not None else ""
    lines = [
        *_front(model),
        f"# {title}",
        "",
        "A multimodal model: it answers questions about pictures. Trained with tinyllava_fast.",
        "",
        "## Use",
        "",
        _USE,
        "",
        f"Made and tried with transformers {transformers.__version__}, which with torch is all that the code in this "
        "repository needs. tinyllava_fast opens the repository as a model folder, too.",
        "",
        *_parts(model),
        *_training(run),
        *_scores(run, digest),
        *_samples(run, digest, folder),
        "## What is not said here",
        "",
        "The licence of the weights, which follows from the parts and the data above; intended use, biases and limits: "
        "nobody has written them down yet.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _front(model: Model) -> list[str]:
    bases = sorted({name for name in model.names.values() if name.count("/") == 1 and not name.startswith((".", "/"))})
    listed = ["base_model:", *(f"- {name}" for name in bases)] if bases else []
    return ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", *listed, "tags:", "- llava",
            "- tinyllava_fast", "- custom_code", "---", ""]  # fmt: skip


def _parts(model: Model) -> list[str]:
    lmm, config = model.lmm, model.lmm.config
    counts = {name: sum(p.numel() for _, p in lmm.component_parameters()[name]) for name in COMPONENTS}
    kinds = {"vision": lmm.vision.name, "connector": lmm.connector.name, "llm": lmm.llm.config.model_type}
    rows = [f"| {name} | {kinds[name]} | {counts[name]:,} |" for name in COMPONENTS]
    return [
        "## Parts",
        "",
        "| part | type | parameters |",
        "|---|---|---|",
        *rows,
        "",
        f"A picture of {lmm.image_size} x {lmm.image_size} pixels becomes {lmm.tokens_per_image} tokens "
        f"(image mode {config.image_mode}). Chat template: {config.template}.",
        "",
    ]


def _training(run: Path | None) -> list[str]:
    head = ["## Training", ""]
    if run is None:
        return [*head, "Not known: there is no run folder around the model.", ""]
    stages = read_yaml(run / "config.yaml").get("stages")
    lines = [line for stage in (stages if isinstance(stages, list) else []) for line in _stage(stage)]
    summary = _json(run / "summary.json")
    if "train_seconds" in summary:
        lines += ["", f"{summary['steps']:,} steps on {summary['samples']:,} samples in "
                  f"{summary['train_seconds'] / 60:,.0f} minutes."]  # fmt: skip
    return [*head, "| stage | data | epochs | recipe | learning rate |", "|---|---|---|---|---|", *lines, ""]


def _stage(stage: dict[str, Any]) -> Iterator[str]:
    data, recipe, optim = stage.get("data", {}), stage.get("recipe", {}), stage.get("optim", {})
    sources = [source.get("records") for source in data.get("sources") or []] or [data.get("records")]
    names = ", ".join(Path(str(name)).name for name in sources if name)
    tuned = ", ".join(
        f"{part}: {recipe[part].get('tune')}" for part in COMPONENTS if isinstance(recipe.get(part), dict)
    )
    epochs, rate = _number(stage.get("epochs")), _number(optim.get("lr"))
    yield f"| {stage.get('name')} | {names} | {epochs} | {tuned or recipe.get('type')} | {rate} |"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _scores(run: Path | None, digest: str) -> list[str]:
    head = ["## Scores", ""]
    seen, blind = (_evaluations(run, name, digest) for name in ("eval", "eval-blind"))
    if not seen:
        return [
            *head,
            "None: no run folder holds an evaluation of it (`tlf-eval MODEL --benchmarks ... --data ...`).",
            "",
        ]
    rows = []
    for name, row in seen.items():
        control = _score(blind[name]) if name in blind else "not made"
        rows.append(f"| {name} | {row['questions']:,} | {row['name']} | {_score(row)} | {control} |")
    note = (
        "The number behind ± is the standard error. The blind control answers the same questions without the pictures."
    )
    lacks = [] if blind else ["The control was not made (`tlf-eval ... --blind`), so these scores do not show what the "
                              "pictures add."]  # fmt: skip
    return [
        *head,
        "| benchmark | questions | metric | score | blind |",
        "|---|---|---|---|---|",
        *rows,
        "",
        note,
        *lacks,
        "",
    ]


def _score(row: MetricRow) -> str:
    error = f" ± {row['stderr']:.{row['digits']}f}" if row["stderr"] is not None else " (no standard error)"
    return f"{row['value']:.{row['digits']}f}{error}"


def _evaluations(run: Path | None, folder: str, digest: str) -> dict[str, MetricRow]:
    """Return the headline of each benchmark on which this model was evaluated into a folder of the run."""
    read = [read_results(path) for path in _finished(run, folder, digest)]
    return {r["title"]: next(m for m in r["metrics"] if m["name"] == r["headline"]) for r in read}


def _finished(run: Path | None, folder: str, digest: str) -> list[Path]:
    """Return the folders of finished evaluations of the model with this digest."""
    found = []
    for path in sorted((run / folder).glob(f"*/{RESULTS}") if run is not None else []):
        try:
            results = read_results(path.parent)
        except UserError as error:
            log.warning("%s; it is left out of the model card", error)
            continue
        if results.get("model_digest") == digest:
            found.append(path.parent)
        else:
            log.warning("%s: is of another model; it is left out of the model card", path)
    return found


def _samples(run: Path | None, digest: str, folder: Path) -> list[str]:
    """Copy a few pictures, made smaller, and return their questions and answers."""
    head = ["## Samples", ""]
    shots = _shots(run, digest)
    if not shots:
        return [*head, "None: no evaluation of it, whose pictures are at hand, lies in a run folder.", ""]
    lines = []
    (folder / "samples").mkdir()
    for number, (shot, image) in enumerate(shots):
        image.thumbnail((_SIDE, _SIDE))
        image.save(folder / "samples" / f"{number}.png")
        lines.append(
            f"| ![](samples/{number}.png) | {_cell(shot.question)} | {_cell(shot.answer)} | {_cell(shot.truth)} |"
        )
    said = "Drawn at random from an evaluation, right or wrong."
    return [*head, said, "", "| picture | question | answer | expected |", "|---|---|---|---|", *lines, ""]


def _shots(run: Path | None, digest: str) -> list[tuple[Shot, Image.Image]]:
    drawn = [
        shot
        for path in _finished(run, "eval", digest)
        for shot in gather(path.parent.parent, path, None, shots=_SHOTS).shots
        if shot.image.is_file()
    ]
    return [(shot, load_image(shot.image)) for shot in drawn[:_SHOTS]]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
