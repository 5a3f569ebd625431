"""The best models of a run's stages, so far: <run>/best/<stage>-<step>/, model folders.

A best model stays for as long as the run's state or one of its checkpoints calls it the best. So whatever checkpoint a
killed run goes on from, the model that was the best then is still there, though a later one may have beaten it since.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tinyllava_fast.errors import CheckpointError
from tinyllava_fast.files import TMP, atomic_folder, remove
from tinyllava_fast.log import log
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState, load_state

FOLDER = "best"
LAST = "last"
"""Beside it: the models of the last steps, of stages whose output is the best one."""


class BestModels:
    """The ``best`` folder of a run. store: of its checkpoints."""

    def __init__(self, run: Path, store: CheckpointStore) -> None:
        self.folder, self._store = run / FOLDER, store

    def path(self, stage: str, step: int) -> Path:
        """Return the model folder of a step of the run."""
        return self.folder / f"{stage}-{step:08d}"

    def recover(self, state: TrainState, checkpoint: Path | None) -> None:
        """See to it that the best model of the state's stage is there, or that the state knows of none.

        checkpoint: that the run goes on from, perhaps of another run folder, from where the model is fetched.
        """
        standing = state.validation.get(state.stage, {})
        if "best" not in standing:
            return
        step = standing["best"]["step"]
        here = self.path(state.stage, step)
        if _is_model(here):
            return
        if checkpoint is not None:
            there = checkpoint.parent.parent / FOLDER / here.name
            if _is_model(there):
                copy_model(there, here)
                return
        log.warning("%s: the best model so far, of step %d, is not there: the search for it begins anew", here, step)
        del standing["best"]

    def prune(self, state: TrainState) -> None:
        """Remove the models that neither the state nor a checkpoint calls the best of their stage."""
        if not self.folder.is_dir():
            return
        try:
            states = [state, *(load_state(self._store.folder / name) for name in self._store.names())]
        except CheckpointError:  # nobody knows what it calls the best
            return
        named = [(stage, one["best"]["step"]) for s in states for stage, one in s.validation.items() if "best" in one]
        kept = {self.path(stage, step) for stage, step in named}
        for found in self.folder.iterdir():
            if found not in kept and not found.name.startswith(TMP):
                remove(found)

    def clear(self) -> None:
        """Remove all of them (--resume never), and the last models beside them."""
        for folder in (self.folder, self.folder.with_name(LAST)):
            shutil.rmtree(folder, ignore_errors=True)


def copy_model(model: Path, target: Path) -> None:
    """Put a copy of a folder at ``target``, at once; hard links where the file system has them."""

    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination)
        except OSError:
            shutil.copy2(source, destination)

    with atomic_folder(target) as temporary:
        shutil.copytree(model, temporary, copy_function=link, dirs_exist_ok=True)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()
