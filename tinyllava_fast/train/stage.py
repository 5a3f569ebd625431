"""The preparation of a stage for its first step: named steps, in the only order that is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllava_fast import group
from tinyllava_fast.config.schema import StageConfig
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.data.pictures import PictureReading
from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import cache_folder
from tinyllava_fast.log import log
from tinyllava_fast.models import io
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.recipes import quantize
from tinyllava_fast.recipes.base import apply_recipe
from tinyllava_fast.train import cpu_pool, timings
from tinyllava_fast.train.answers import open_answering
from tinyllava_fast.train.checkpoint import load_rng
from tinyllava_fast.train.compile import CompiledForward, compile_forward, repays
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.engine.launch import build_engine, never_compiles
from tinyllava_fast.train.features import FeatureCache
from tinyllava_fast.train.optimizers.base import OPTIMIZERS
from tinyllava_fast.train.parts import first_model
from tinyllava_fast.train.prepare import Outlook, average_flops, build_loader, look_ahead, validation_loader
from tinyllava_fast.train.profile import StepProfiler
from tinyllava_fast.train.reading import settle_reading
from tinyllava_fast.train.run import Run
from tinyllava_fast.train.standing import interval
from tinyllava_fast.train.tensor_reader import open_tensors
from tinyllava_fast.train.validation import Validator, cost_of


@dataclass(frozen=True, kw_only=True)
class ReadyStage:
    """A stage, ready to step. kind: of a step, for the record of times. report: of the data set. flops: of a step."""

    config: StageConfig
    model: LMM
    loader: Loader
    engine: TrainingEngine
    peak_lrs: dict[str, float]
    micro_batches: int
    flops: float
    kind: str
    report: dict[str, int]
    compiled: CompiledForward | None
    features: FeatureCache | None
    profiler: StepProfiler | None
    validator: Validator | None


def prepare_stage(run: Run, index: int) -> ReadyStage:
    """Return stage ``index``, ready at its first step, or at the step of the checkpoint that the run goes on from."""
    config, engine_config = run.config.stages[index], run.config.engine
    resumed = _enter(run, index)
    model, reading = _open_model(run, config, resumed)
    if run.outlooks is None:
        _look_ahead(run, model, reading)  # before a recipe changes the model, and before this stage trains for hours
    groups = apply_recipe(model, config.recipe, config.optim, seed=run.config.seed)
    if resumed is not None:
        load_checkpoint(model, resumed)  # whose weights have the names that the recipe gives them
    mixed = len(config.data.sources) > 1
    model.set_loss(label_smoothing=config.optim.label_smoothing, z_loss=config.optim.z_loss, by_segment=mixed)
    model.set_gradient_checkpointing(engine_config.gradient_checkpointing)
    loader = _open_loader(run, config, model, reading)
    report = loader.dataset.report.as_dict()
    _go_to_position(run, config, loader)
    held_out = validation_loader(run, config, model, reading) if config.validation.has_data else None
    records = None if held_out is None else held_out.dataset.data
    answering = open_answering(run.config, config, records, run.tokenizer, run.processor)
    flops = average_flops(model, config, loader)
    cost = cost_of(model, config, held_out, answering, flops)
    kind = _kind_of_step(run, config, model, flops)  # before ZeRO takes the weights apart
    compiled = compile_forward(model, engine_config) if _compiles(run, config, model, loader, flops, kind) else None
    micro_batches = config.batch.packs_per_step // run.process.world_size
    copies = [group.copy() for group in groups]
    engine = build_engine(run.process, engine_config, config.optim, model, copies, micro_batches=micro_batches)
    cpu_pool.trim()
    features = _open_features(config, model)
    profiler = _profiler(run, config, model) if run.profile and run.main else None
    validator = None
    if config.validation.on:
        every = interval(config.validation, loader.steps, cost)
        validator = Validator(config, model, engine, held_out, answering, every=every, features=features)
        _go_on_validating(run, config, engine)
    if resumed is not None and run.state.stage_step > 0:
        _restore_optimizer(engine, resumed, run.process.rank)
    return ReadyStage(
        config=config,
        model=model,
        loader=loader,
        engine=engine,
        peak_lrs={group["name"]: group["lr"] for group in groups},
        micro_batches=micro_batches,
        flops=flops,
        kind=kind,
        report=report,
        compiled=compiled,
        features=features,
        profiler=profiler,
        validator=validator,
    )


def _enter(run: Run, index: int) -> Path | None:
    """Let the state of the run stand in this stage; return the checkpoint that is in the middle of it, if any."""
    state = run.state
    resumed = run.checkpoint if state.stage_index == index else None
    if state.stage_index != index or not state.stage:
        state.stage_step, state.loader, state.barren, state.source_window = 0, {}, 0, {}
    state.stage, state.stage_index = run.config.stages[index].name, index
    return resumed


def _open_model(run: Run, stage: StageConfig, resumed: Path | None) -> tuple[LMM, PictureReading]:
    """Return the model that the stage begins with, and how the stage reads pictures.

    The model is in float32: the engine lowers it, and keeps the exact values.
    """
    config, index = run.config, run.state.stage_index
    dtype = torch.float32
    if index == 0 or resumed is not None:
        model = first_model(config.model, run.state, run.tokenizer, run.processor, seed=config.seed, dtype=dtype)
    else:
        before = run.folder / config.stages[index - 1].name
        model = io.load_model(before, dtype=dtype, merge_adapter=False)[0].train()
    check_vocabulary(model, run.tokenizer)
    new = index == 0 and config.model.path is None
    inherited = None if new else model.config.reading
    reading = settle_reading(run.state, stage.data, inherited, resumed is not None)
    return model.to(run.process.device), reading


def _look_ahead(run: Run, model: LMM, reading: PictureReading) -> None:
    """Check every later stage and note its steps in ``run.outlooks``."""
    following = run.state.stage_index + 1
    ahead = look_ahead(run, run.config.stages[following:], model, reading)
    run.outlooks = [Outlook(0, 0.0)] * following + ahead


def load_checkpoint(model: LMM, checkpoint: Path) -> None:
    """Load weights by the names that the recipe gives them: wrapped by LoRA, quantized."""
    with open_tensors(checkpoint / io.WEIGHTS) as tensors:
        io.load_weights(model, tensors, skip=quantize.state_names(model))
        quantize.load_state(model, tensors)


def _open_loader(run: Run, stage: StageConfig, model: LMM, reading: PictureReading) -> Loader:
    """Return the stage's data in a loader at its first pack; the model's configuration states how it is trained."""
    loader = build_loader(run, stage, model, reading)
    data = stage.data
    model.describe_training(
        template=data.template,
        turns=data.turns,
        image_mode=data.image_mode,
        image_grid=loader.dataset.grid,
        reading=reading,
    )
    return loader


def _go_to_position(run: Run, stage: StageConfig, loader: Loader) -> None:
    """Move the loader to where the state is. Raise UserError if the stage has become shorter than that."""
    state = run.state
    if state.loader:
        loader.load_state_dict(state.loader)
    if state.stage_step > loader.steps:
        raise UserError(
            f"stages.{stage.name}: max_steps or epochs give {loader.steps} steps, but {state.stage_step} are done; "
            "give at least as many"
        )
    over = state.validation.get(stage.name, {}).get("ended_early", False)
    state.stage_steps = state.stage_step if over else loader.steps


def _kind_of_step(run: Run, stage: StageConfig, model: LMM, flops: float) -> str:
    """Return a key of the record of times: all that the time of a step depends on."""
    engine, recipe = run.config.engine, stage.recipe
    words: list[str] = [tune.tune for tune in (recipe.llm, recipe.vision, recipe.connector)]
    if stage.data.feature_cache:
        words.append("cached")
    if engine.gradient_checkpointing:
        words.append(f"checkpointing={engine.gradient_checkpointing}")
    return timings.kind_of_step(
        run.process.device,
        engine.dtype,
        " ".join(words),
        layers=model.num_layers + model.vision.num_layers,
        tokens=stage.batch.tokens,
        flops=flops,
    )


def _compiles(run: Run, stage: StageConfig, model: LMM, loader: Loader, flops: float, kind: str) -> bool:
    """Return engine.compile with auto resolved, which the state keeps for a resumption."""
    chosen = run.config.engine.compile
    if chosen != "auto":
        return bool(chosen)
    if reason := never_compiles(run.config.engine):
        log.info("engine.compile: auto: not compiling: %s", reason)
        return False
    known = run.state.compiled
    if stage.name not in known:
        known[stage.name] = repays(
            loader.steps - run.state.stage_step,
            flops=flops,
            layers=model.num_layers + model.vision.num_layers,
            dtype=getattr(torch, run.config.engine.dtype),
            measured=timings.read(kind),
        )
    return known[stage.name]


def _open_features(stage: StageConfig, model: LMM) -> FeatureCache | None:
    """Return the cache of the frozen tower's features, if the stage has one."""
    if not stage.data.feature_cache:
        return None
    return FeatureCache(cache_folder() / "features", model.vision, limit=int(stage.data.feature_cache * 2**30))


def _go_on_validating(run: Run, stage: StageConfig, engine: TrainingEngine) -> None:
    """Let the state have a standing for the stage, and the best model that it tells of lie where it is looked for."""
    standing = run.state.validation.setdefault(stage.name, {})
    if run.main and stage.validation.keep == "best":
        run.best.recover(run.state, run.checkpoint)
    run.state.validation[stage.name] = group.from_first(standing)


def _profiler(run: Run, stage: StageConfig, model: LMM) -> StepProfiler:
    dtype = getattr(torch, run.config.engine.dtype)
    moments = OPTIMIZERS.get(stage.optim.type).moment_bytes
    return StepProfiler(run.folder, stage.name, model, stage.recipe, dtype, moments)


def _restore_optimizer(engine: TrainingEngine, checkpoint: Path, rank: int) -> None:
    """Restore the optimizer and the generators of random numbers, which come last: all before may have drawn some."""
    with open_tensors(checkpoint / "optimizer.safetensors") as tensors:
        engine.load_optimizer_state(tensors)
    load_rng(checkpoint, rank)
