"""Every engine against one process: the same samples and the same losses. Prints a Markdown table.

    python -m tests.train.matrix [--steps 50] [--engines ddp,zero2] [--processes 1,2,4] [--recipes full,lora]

A cell is the largest difference of a step's loss from the run of ``engine.type: torch`` with as many packs a step, over
all steps and accumulations of 1, 2 and 4; float32, over gloo. That every step takes the packs of one process, whatever
the number of processes, is checked as well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from tests.train.conftest import prepare
from tests.train.notes import Notes, take_note
from tests.train.processes import PRELOADED, Ranks, fork_server
from tests.train.soak import losses
from tinyllava_fast.config.load import load_run
from tinyllava_fast.train.loop import train

ENGINES = {
    "ddp": ["engine.type=ddp"],
    "fsdp": ["engine.type=fsdp"],
    **{f"zero{stage}": ["engine.type=deepspeed", f"engine.zero_stage={stage}"] for stage in (1, 2, 3)},
}
_LORA = "{tune: lora, lora: {r: 4, alpha: 8, dropout: 0.0, target_modules: [q_proj]}}"
RECIPES = {
    "full": "{llm: {tune: full}, vision: {tune: full}, connector: {tune: full}}",
    "frozen tower": "{vision: {tune: frozen}}",
    "LoRA": f"{{llm: {_LORA}, vision: {_LORA}}}",
    "partial": "{llm: {tune: partial, from_layer: 1}, vision: {tune: full}}",
}
PROCESSES, ACCUMULATIONS = (1, 2, 4), (1, 2, 4)
TOLERANCE = 1e-4
Runs = Sequence[tuple[str, Sequence[str]]]
"""Names of runs with the changes of the configuration."""


def train_all(path: Path, runs: Runs) -> None:
    """In a process: train one run after another beside the YAML, and end."""
    try:
        for name, changes in runs:
            undo = take_note(path.parent / "notes" / name)
            train(load_run(path, [f"output_dir={path.parent / name}", *changes]))
            undo()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _of(recipe: str, packs: int) -> list[str]:
    return [f"stages.finetune.recipe={RECIPES[recipe]}", f"stages.finetune.batch.packs_per_step={packs}"]


def _folder(*parts: object) -> str:
    return "-".join(map(str, parts)).replace(" ", "_")


class Matrix:
    """Runs of some steps in a folder, and their reference."""

    def __init__(self, folder: Path, steps: int, recipes: Sequence[str]) -> None:
        shape = {"loggers": [], "checkpoint__every_steps": 0, "stages__finetune__max_steps": steps}
        self.path = prepare(folder, **shape, records=120)
        run = yaml.safe_load(self.path.read_text())
        run["stages"] = [stage for stage in run["stages"] if stage["name"] == "finetune"]
        self.path.write_text(yaml.safe_dump(run))
        self.recipes, self.steps = recipes, steps
        self.server = fork_server()
        self.server.set_forkserver_preload([*PRELOADED, "tests.train.conftest"])

    def run(self, runs: Runs, processes: int) -> None:
        """Train some runs in so many processes."""
        work = partial(train_all, self.path, runs)
        folder = self.path.parent / "said" / runs[0][0]
        faults = dict.fromkeys(range(processes), work)
        with Ranks(self.server, folder, [str(self.path)], processes, faults=faults) as ranks:
            assert ranks.wait(1200) == [0] * processes, ranks.said(0)[-3000:]

    def reference(self, packs: Sequence[int]) -> None:
        """Train with plain torch in one process, with so many packs a step each."""
        each = itertools.product(self.recipes, packs)
        self.run([(_folder("torch", r, p), _of(r, p)) for r, p in each], 1)

    def difference(self, engine: str, processes: int, accumulations: Sequence[int]) -> dict[str, float]:
        """Recipe -> the largest difference from the reference. AssertionError if a step takes other packs."""
        each = list(itertools.product(self.recipes, accumulations))
        runs = [(_folder(engine, processes, r, a), [*ENGINES[engine], *_of(r, processes * a)]) for r, a in each]
        self.run(runs, processes)
        found: dict[str, float] = {}
        for (recipe, accumulation), (name, _) in zip(each, runs, strict=True):
            twin = _folder("torch", recipe, processes * accumulation)
            mine, reference = (losses(self.path.parent / folder) for folder in (name, twin))
            assert mine.keys() == reference.keys() and len(mine) == self.steps
            packs = [Notes(self.path.parent / "notes" / folder) for folder in (name, twin)]
            assert packs[0].packs(processes) == packs[1].packs(1), f"{name}: other packs than one process"
            most = max(abs(mine[step] - reference[step]) for step in mine)
            found[recipe] = max(found.get(recipe, 0.0), most)
        return found


def main() -> None:
    """Run the command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--processes", default=",".join(map(str, PROCESSES)))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    args = parser.parse_args()
    recipes, counts = args.recipes.split(","), [int(count) for count in args.processes.split(",")]
    say = sys.stdout.write
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        matrix = Matrix(Path(folder), args.steps, recipes)
        matrix.reference(sorted({count * accumulation for count in counts for accumulation in ACCUMULATIONS}))
        say(f"| engine | processes | {' | '.join(recipes)} |\n|---|---|{'---|' * len(recipes)}\n")
        worst = 0.0
        for engine, count in itertools.product(args.engines.split(","), counts):
            found = matrix.difference(engine, count, ACCUMULATIONS)
            say(f"| {engine} | {count} | {' | '.join(f'{found[recipe]:.1e}' for recipe in recipes)} |\n")
            sys.stdout.flush()
            worst = max(worst, *found.values())
    say(f"\n{args.steps} steps; the largest difference is {worst:.1e}\n")
    if worst > TOLERANCE:
        sys.exit(f"more than {TOLERANCE}")


if __name__ == "__main__":
    main()
