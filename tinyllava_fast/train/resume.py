"""Where a run continues: which checkpoint, and whether it belongs to the configuration at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyllava_fast.config.load import parse_into, to_dict
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState, load_state

FREE = frozenset(
    {
        "output_dir",
        "data_root",  # the data may have moved; the loader knows whether it is the same
        "plugins",  # files that may have moved; what they register is named by the model's own keys
        "checkpoint",
        "log_every",
        *(f"engine.{k}" for k in "type device compile cuda_graphs zero_stage offload threads workers prefetch".split()),
    }
)
"""Keys that may change between a checkpoint and its continuation: they move work around, not the mathematics."""


def find_checkpoint(store: CheckpointStore, config: RunConfig, resume: str) -> tuple[Path, TrainState] | None:
    """The checkpoint to continue from, or None to start.

    resume: "auto" (the run folder's latest, if any), "never", or the path of a checkpoint or of a run folder.
    Raises CheckpointError if the configuration differs from the checkpoint's in a key that changes the training.
    """
    if resume == "never":
        return None
    if resume == "auto":
        folder = store.latest()
        if folder is None:
            return None
    else:
        folder = Path(resume)
        if not (folder / "state.json").is_file():
            inner = folder if folder.name == "checkpoints" else folder / "checkpoints"
            folder = CheckpointStore(inner, 1).latest() or folder
    state = load_state(folder)
    differing = differences(_completed(state.config), to_dict(config))
    if differing:
        lines = "\n".join(f"  {key}: checkpoint {old!r}, now {new!r}" for key, old, new in differing)
        raise CheckpointError(
            f"{folder}: was trained with another configuration:\n{lines}\n"
            "Undo these changes, choose another output_dir, or start over with --resume never"
        )
    if state.stage_index >= len(config.stages):
        raise UserError(f"{folder}: belongs to stage {state.stage_index}, the configuration has {len(config.stages)}")
    return folder, state


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with today's defaults for the keys that are younger than it: they change nothing."""
    try:
        return to_dict(parse_into(RunConfig, old, "state.json"))
    except UserError:  # a key that no longer exists: as it is, so that the comparison names it
        return old


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every key that matters and differs."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = [k for k in {**flat_old, **flat_new} if not _is_free(k)]
    return [(k, flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists of dicts as {dotted key: leaf}; named list items go by name."""
    flat: dict[str, Any] = {}
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(item.get("name", i)): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _is_free(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: i + 1]) in FREE for i in range(len(parts)))
