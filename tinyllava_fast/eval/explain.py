"""``tlf-eval --explain N``: a look inside N right and N wrong answers of each benchmark.

output/<benchmark>/looks/ has a page each and looks.json, from which the report shows them beside the numbers: whether
maps of right answers are better than those of wrong ones, and than chance.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast.data.pictures import naming
from tinyllava_fast.errors import DataError, UserError, writing
from tinyllava_fast.eval.report.looks import INDEX, LOOKS
from tinyllava_fast.eval.results import read_verdicts, write_json
from tinyllava_fast.eval.types import Verdict
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.log import log
from tinyllava_fast.look.assistant import Assistant
from tinyllava_fast.look.curves import RANDOM
from tinyllava_fast.look.overlay import overlay
from tinyllava_fast.look.page import page
from tinyllava_fast.look.types import METHODS
from tinyllava_fast.pace import EVERY_S, Pace
from tinyllava_fast.page import inline

THUMBNAIL = 256


def explain(
    assistant: Assistant, folder: Path, count: int, *, max_new_tokens: int, seed: int = 0
) -> list[dict[str, object]]:
    """Look inside ``count`` right and as many wrong answers of the results in a folder; returns what looks.json lists.

    Which ones is a seeded random draw. Answers are generated anew, with the plain weights. A question whose picture
    cannot be read any more is left out with a warning. UserError for results without scored questions about pictures.
    """
    chosen = _chosen(read_verdicts(folder), count, seed)
    if not chosen:
        raise UserError(
            f"{folder}: no scored question about a picture, so there is nothing to explain; leave --explain out"
        )
    place, found = folder / LOOKS, []
    pace = Pace(wait_s=EVERY_S, every_s=EVERY_S)
    with writing(place):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    for number, verdict in enumerate(chosen):
        if pace.due():
            log.info("looks: %d of %d", number, len(chosen))
        try:
            found.append(_one(assistant, verdict, place, number, max_new_tokens))
        except DataError as error:
            log.warning("not explained: %s", error)
    write_json(place / INDEX, {"looks": found})
    return found


def _chosen(verdicts: Sequence[Verdict], count: int, seed: int) -> list[Verdict]:
    order = [v for v in verdicts if v["images"] and v["answer"]]
    random.Random(seed).shuffle(order)
    return [v for credit in (1, 0) for v in [v for v in order if v["credit"] == credit][:count]]


def _one(assistant: Assistant, verdict: Verdict, place: Path, number: int, new_tokens: int) -> dict[str, object]:
    shown = [Path(image) for image in verdict["images"]]
    request = Request.ask(
        verdict["prompt"], shown if len(shown) > 1 else shown[0], sampling=Sampling(max_new_tokens=new_tokens)
    )
    look = assistant.looker.look(request, assistant.engine.answer(request).tokens)
    kind = "right" if verdict["credit"] == 1 else "wrong"
    name = f"{kind}_{number:03}.html"
    facts = [("question", verdict["key"]), ("pictures", ", ".join(map(naming, verdict["images"])))]
    facts += [("expected", verdict["truth"]), ("answer in the evaluation", verdict["answer"] or "")]
    with writing(place / name):
        (place / name).write_text(page(look, facts), encoding="utf-8", errors="replace")
    return {
        "page": name,
        "kind": kind,
        "prompt": verdict["prompt"],
        "truth": verdict["truth"],
        "answer": look.answer,
        "thumbnail": inline(overlay(look.pictures[0], look.maps()[0], side=THUMBNAIL)),
        "deletion": {m: look.curves[m].deletion_area for m in (*METHODS, RANDOM)},
        "insertion": {m: look.curves[m].insertion_area for m in (*METHODS, RANDOM)},
    }
