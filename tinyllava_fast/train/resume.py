"""The checkpoint that a run continues from, and the keys of the configuration that may differ from the checkpoint's.

Everything of a stage that has not begun may change. Of what has begun, keys that only move work around may change, and
those that say how the optimizer goes on while the stage has steps left. What decided the weights, the tokens or the
packs so far may not: the refusal names each such key, says why, and names a way that works.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast import group
from tinyllava_fast.config.load import parse_into, to_dict
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import CheckpointError, UserError
from tinyllava_fast.hardware import torchrun_number
from tinyllava_fast.log import log
from tinyllava_fast.train import attempts
from tinyllava_fast.train.checkpoint import (
    CheckpointStore,
    TrainState,
    another,
    damage,
    is_checkpoint,
    load_state,
)
from tinyllava_fast.train.parts import MODEL_FILES

_ENGINE = (
    "type device compile cuda_graphs zero_stage offload deepspeed threads workers prefetch gradient_checkpointing "
    "silence_timeout"
)
FREE = frozenset(
    {
        "output_dir",
        "data_root",  # the data may have moved; the loader knows whether it is the same
        "plugins",  # files that may have moved; what they register is named by the model's own keys
        "checkpoint",
        "log_every",
        "loggers",
        *(f"engine.{k}" for k in _ENGINE.split()),
    }
)
"""Keys that may always change: they move work around, not the mathematics."""
_FILES = "records image_folder sources[].path sources[].image_folder sources[].name"
_VALIDATION = "records image_folder every_steps max_packs samples max_new_tokens benchmarks benchmarks[] metric keep"
STAGE_FREE = frozenset(
    {
        *(f"data.{k}" for k in f"{_FILES} on_error on_bad_image overlong feature_cache".split()),
        *(f"validation.{k}" for k in _VALIDATION.split()),  # it leaves no trace in the training
    }
)
"""The same, of a stage: the loader refuses other tokens and packs, wherever their files are now."""
_OPTIM = "lr betas eps weight_decay clip_norm schedule warmup_ratio min_lr_ratio decay_ratio ema on_nonfinite"
_OPTIM += " most_skipped_in_a_row most_skipped noise_scale"
_RATES = "lr layer_decay lora.b_lr_ratio"
STAGE_GOES_ON = frozenset(
    {
        *(f"optim.{k}" for k in _OPTIM.split()),
        *(f"recipe.{part}.{k}" for part in ("llm", "vision", "connector") for k in _RATES.split()),
        "max_steps",
        "epochs",
        "data.augment",
        "validation.patience",
    }
)
"""Keys of a stage that say how its next steps go: they may change while it has steps left."""
_WHY = {
    "model": "the weights of the checkpoint are of that model",
    "seed": "it decided the first weights and the order of the data",
    "engine.dtype": "the weights and the optimizer's state are kept in it",
    "name": "the stage has begun under that name",
    "batch": "it decides the packs, so the position in the data would mean nothing",
    "data": "it decides what the samples are, and with them the position in the data",
    "validation": "it decides which samples train",
    "recipe": "the optimizer's state belongs to the weights that trained so far",
    "optim.type": "the optimizer's state is of that rule",
    "optim": "losses before and after would mean different things",
}


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the checkpoint's. why_not: why it may not; empty: it may."""

    key: str
    old: object
    new: object
    why_not: str = ""

    def __str__(self) -> str:
        reason = f" ({self.why_not})" if self.why_not else ""
        return f"{self.key}: checkpoint {self.old!r}, now {self.new!r}{reason}"


def find_checkpoint(store: CheckpointStore, config: RunConfig, resume: str) -> tuple[Path, TrainState] | None:
    """The checkpoint to continue from, or None to start.

    resume: "auto" (the run folder's newest that is intact, if any), "never", or the path of a checkpoint or of a run
    folder. The state's ``changes`` gain the keys that differ. Raises CheckpointError if one of them may not. All
    processes call it; rank 0 reads all of the checkpoint.
    """
    folder = group.decided(lambda: _folder(store, resume))
    if folder is None:
        return None
    state = load_state(folder)
    if state.stage_index >= len(config.stages):
        raise UserError(
            f"{folder}: belongs to stage {state.stage_index + 1}, {state.stage!r}, but the configuration has "
            f"{len(config.stages)}; put the stage back, or set another output_dir"
        )
    changes = differences(_completed(state.config), to_dict(config), state)
    if any(change.why_not for change in changes):
        raise _refusal(folder, state, changes)
    if changes:
        log.info("changed from step %d on: %s", state.step + 1, "; ".join(map(str, changes)))
    for change in changes:
        state.changes.append({"step": state.step, "key": change.key, "old": change.old, "new": change.new})
    return folder, state


def differences(old: Mapping[str, object], new: Mapping[str, object], state: TrainState) -> list[Change]:
    """Return every key that differs, with the reason why it may not at this state of the run, if there is one."""
    plain = ({key: value for key, value in tree.items() if key != "stages"} for tree in (old, new))
    found = [
        Change(key, before, now, "" if _among(key, FREE) else _moved(key, now, state))
        for key, before, now in _pairs(*plain)
    ]
    before_stages, now_stages = _stages(old), _stages(new)
    begun = state.stage_index + 1
    for index, (stage, now) in enumerate(zip(before_stages[:begun], now_stages[:begun], strict=False)):
        over = index < state.stage_index or 0 < state.stage_steps <= state.stage_step
        found += _stage_changes(stage, now, over=over)
    ahead = [{str(s.get("name")): s for s in stages[begun:]} for stages in (before_stages, now_stages)]
    for name in {**ahead[0], **ahead[1]}:
        stage, now = (stages.get(name, {}) for stages in ahead)
        if stage and now:
            found += [Change(f"stages.{name}.{k}", a, b) for k, a, b in _pairs(stage, now)]
        elif stage or now:
            found.append(Change(f"stages.{name}", *(("there", "gone") if stage else ("not there", "added"))))
    return found


def _moved(key: str, now: object, state: TrainState) -> str:
    """Return the reason why a key of the model, the seed or the engine may not change.

    Empty: it names files that may have moved.
    """
    if key not in MODEL_FILES or now is None:
        return _reason(key)
    return "" if state.parts else "this checkpoint does not tell what those files held: put them back where they were"


def _stage_changes(old: Mapping[str, object], new: Mapping[str, object], *, over: bool) -> list[Change]:
    """Return the keys of a stage that has begun which differ. over: it has no steps left."""
    name = old.get("name")
    if new.get("name") != name:
        return [Change(f"stages.{name}.name", name, new.get("name"), _WHY["name"])]
    found = []
    for key, before, now in _pairs(old, new):
        why = _reason(key)
        if _among(key, STAGE_FREE):
            why = ""
        elif _among(key, STAGE_GOES_ON):
            why = "the stage is over, no step is left that it could change" if over else ""
        found.append(Change(f"stages.{name}.{key}", before, now, why))
    return found


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Return nested dicts as {dotted key: leaf}; those in a list have its index in the key."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        return {k: v for i, item in enumerate(tree) for k, v in _flatten(item, f"{prefix}[{i}]").items()}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _of_attempt(store: CheckpointStore, resume: str) -> str:
    """Return where this attempt of a launcher goes on from: one that follows another keeps what that one trained."""
    launched = attempts.launched()
    if launched is not None:
        return "auto" if attempts.attempt() and store.written_since(launched) else resume
    # torchrun without --nproc: nothing tells the checkpoints of before from its own
    return "auto" if resume == "never" and torchrun_number("TORCHELASTIC_RESTART_COUNT", 0) else resume


def _folder(store: CheckpointStore, resume: str) -> Path | None:
    resume = _of_attempt(store, resume)
    if resume == "never":
        return None
    if resume == "auto":
        return store.intact()
    folder = Path(resume)
    if (folder / "state.json").is_file() or is_checkpoint(folder):
        own = folder.resolve().parent == store.folder.resolve()
        if found := store.verified(folder.resolve()) if own else damage(folder):
            raise CheckpointError(f"{found}; {another(folder)}")
        return folder
    inner = folder if folder.name == "checkpoints" else folder / "checkpoints"
    own = inner.resolve() == store.folder.resolve()
    return (store if own else CheckpointStore(inner, 1)).intact() or folder


def _completed(old: dict[str, object]) -> dict[str, object]:
    """Add today's defaults to a checkpoint's configuration for the keys that are younger: they change nothing."""
    try:
        return to_dict(parse_into(RunConfig, old, "state.json"))
    except UserError:  # a key that no longer exists: as it is, so that the comparison names it
        return old


def _refusal(folder: Path, state: TrainState, changes: list[Change]) -> CheckpointError:
    """Return the error that tells the refused changes and why, the allowed ones, and ways that work instead."""
    refused = "\n".join(f"  {change}" for change in changes if change.why_not)
    others = "\n".join(f"  {change}" for change in changes if not change.why_not)
    ways = ["start over with another output_dir, or with --resume never, which removes the checkpoints"]
    run = folder.parent.parent
    over = 0 < state.stage_steps <= state.stage_step
    if over:
        ways.append(f"train on: add a stage behind {state.stage!r} to this configuration; it begins from its weights")
    names = [str(stage.get("name", "")) for stage in _stages(state.config)]
    done = names[: state.stage_index + over]
    if done and (run / done[-1] / "config.json").is_file():
        rest = names[len(done) :]
        what = f"the stages from {rest[0]!r} on" if rest else "the stages to come"
        ways.append(
            f"go on from the model of stage {done[-1]!r}: a configuration with {what} alone, "
            f"model.path: {run / done[-1]} and another output_dir"
        )
    return CheckpointError(
        f"{folder}: was trained with another configuration. What cannot change any more:\n{refused}\n"
        + (f"What may change:\n{others}\n" if others else "")
        + "Undo the former, or\n"
        + "\n".join(f"  - {way}" for way in ways)
    )


def _stages(tree: Mapping[str, object]) -> list[dict[str, object]]:
    stages = tree.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _pairs(old: Mapping[str, object], new: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Return (dotted key, old value, new value) wherever they differ."""
    before, now = _flatten(dict(old)), _flatten(dict(new))
    return [(k, before.get(k), now.get(k)) for k in {**before, **now} if before.get(k) != now.get(k)]


def _reason(key: str) -> str:
    """Return why a key of what has begun may not change, by the longest entry of _WHY that it lies in."""
    parts = key.split(".")
    known = (_WHY.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((why for why in known if why), "it decides what the run computes")


def _among(key: str, keys: frozenset[str]) -> bool:
    parts = re.sub(r"\[\d+\]", "[]", key).split(".")
    return any(".".join(parts[: i + 1]) in keys for i in range(len(parts)))
