"""The training run: one readable loop over stages and steps.

A step takes ``batch.packs_per_step`` packs over all processes. Each process sums the losses of its share; the sum is
divided by the number of supervised tokens of the whole step, over all micro-batches and processes. So packing,
accumulation and the number of processes change the speed, not the mathematics.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.data.loader import STOP_SIGNALS, Loader
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.hardware import cache_folder
from tinyllava_fast.log import log
from tinyllava_fast.models import adapter, io
from tinyllava_fast.models.build import check_vocabulary
from tinyllava_fast.models.lmm import LMM
from tinyllava_fast.plugins import load_plugins
from tinyllava_fast.recipes import quantize
from tinyllava_fast.recipes.base import apply_recipe, check_engine
from tinyllava_fast.train import cpu_pool, timings
from tinyllava_fast.train.checkpoint import load_rng, open_tensors
from tinyllava_fast.train.compile import compile_forward, repays
from tinyllava_fast.train.engine.launch import build_engine, start_process
from tinyllava_fast.train.failures import diverged, explained
from tinyllava_fast.train.features import FeatureCache, check_feature_cache
from tinyllava_fast.train.lr_schedule import lr_factor
from tinyllava_fast.train.metrics import COUNTS, Window, memory_bytes
from tinyllava_fast.train.parts import first_model
from tinyllava_fast.train.prepare import Outlook, average_flops, build_loader, look_ahead, look_at_files
from tinyllava_fast.train.profile import StepProfiler
from tinyllava_fast.train.progress import Progress
from tinyllava_fast.train.reading import settle_reading
from tinyllava_fast.train.rules import check_rule, moment_bytes
from tinyllava_fast.train.run import Run, StopRequest, stop_on_signals


def train(config: RunConfig, *, resume: str = "auto", profile: bool = False) -> dict[str, Any]:
    """Run every stage and return the summary (also written to summary.json).

    profile: record a few steps of each stage (train/profile.py). Raises UserError for anything the user can mend,
    StopRequest after a signal.
    """
    for stage in config.stages:
        check_engine(stage.recipe, config.engine, f"stages.{stage.name}")
        check_feature_cache(stage.data, stage.recipe, config.engine, f"stages.{stage.name}")
    load_plugins(config.plugins)
    process = start_process(config.engine)
    for stage in config.stages:
        check_rule(stage.optim, config.engine, process.device, f"stages.{stage.name}")
    if process.device.type == "cpu":
        cpu_pool.install()
    run = Run(config, process)
    run.profile = profile
    try:
        with stop_on_signals(run):
            run.start(resume)
            look_at_files(config, config.stages[run.state.stage_index :])
            for index in range(run.state.stage_index, len(config.stages)):
                with explained(run.way, run.state, config.engine, config.stages[index].name):
                    Stage(run, index).run()
            with explained(run.way, run.state, config.engine, run.state.stage):
                return run.finish()
    finally:
        run.close()


class Stage:
    """One stage: its model, data, engine and steps."""

    def __init__(self, run: Run, index: int) -> None:
        self.run_, self.config = run, run.config.stages[index]
        self.state = run.state
        resumed = run.checkpoint if self.state.stage_index == index else None
        if self.state.stage_index != index or not self.state.stage:
            self.state.stage_step, self.state.loader, self.state.barren = 0, {}, 0
        self.state.stage, self.state.stage_index = self.config.name, index
        self.model = self._model(index, resumed)
        if run.outlooks is None:
            self._look_ahead(index)
        groups = apply_recipe(self.model, self.config.recipe, self.config.optim, seed=run.config.seed)
        if resumed is not None:
            self._load_weights(resumed)
        self.model.set_loss(label_smoothing=self.config.optim.label_smoothing, z_loss=self.config.optim.z_loss)
        self.peak_lrs = {g["name"]: g["lr"] for g in groups}
        self.model.set_gradient_checkpointing(run.config.engine.gradient_checkpointing)
        self.loader = self._loader()
        self.flops = average_flops(self.model, self.config, self.loader)
        self.kind = self._kind()
        self.compiled = compile_forward(self.model, run.config.engine) if self._compiles() else None
        self.micro_batches = self.config.batch.packs_per_step // run.process.world_size
        self.engine = build_engine(
            run.process,
            run.config.engine,
            self.config.optim,
            self.model,
            [dict(g) for g in groups],
            micro_batches=self.micro_batches,
        )
        cpu_pool.trim()
        self.features: FeatureCache | None = None
        if gigabytes := self.config.data.feature_cache:
            folder = cache_folder() / "features"
            self.features = FeatureCache(folder, self.model.vision, limit=int(gigabytes * 2**30))
        self.pending: list[tuple[torch.Tensor, float]] = []  # loss sum and scale of the steps not yet in state.losses
        self.seconds: list[float] = []  # of each step since the start or a resumption
        self.profiler: StepProfiler | None = None
        if run.profile and run.main:
            dtype = getattr(torch, run.config.engine.dtype)
            moments = moment_bytes(self.config.optim.type)
            self.profiler = StepProfiler(run.folder, self.config.name, self.model, self.config.recipe, dtype, moments)
        if resumed is not None and self.state.stage_step > 0:
            with open_tensors(resumed / "optimizer.safetensors") as tensors:
                self.engine.load_optimizer_state(tensors)
            load_rng(resumed, run.process.rank)

    def _model(self, index: int, resumed: Path | None) -> LMM:
        config = self.run_.config
        dtype = torch.float32  # the engine lowers it, and keeps the exact values as masters
        if index == 0 or resumed is not None:
            run = self.run_
            model = first_model(config.model, self.state, run.tokenizer, run.processor, seed=config.seed, dtype=dtype)
        else:
            before = self.run_.folder / config.stages[index - 1].name
            model = io.load_model(before, dtype=dtype, merge_adapter=False)[0].train()
        check_vocabulary(model, self.run_.tokenizer)
        new = index == 0 and config.model.path is None
        inherited = None if new else model.config.reading
        self.reading = settle_reading(self.state, self.config.data, inherited, resumed is not None)
        return model.to(self.run_.process.device)

    def _look_ahead(self, index: int) -> None:
        run = self.run_
        run.outlooks = [Outlook(0, 0.0)] * (index + 1) + look_ahead(
            run.config,
            run.config.stages[index + 1 :],
            process=run.process,
            tokenizer=run.tokenizer,
            processor=run.processor,
            model=self.model,
            reading=self.reading,
        )

    def _compiles(self) -> bool:
        """engine.compile, with auto resolved."""
        chosen = self.run_.config.engine.compile
        if chosen != "auto":
            return bool(chosen)
        known, name = self.state.compiled, self.config.name
        if name not in known:
            known[name] = repays(
                self.loader.steps - self.state.stage_step,
                flops=self.flops,
                layers=self.model.num_layers + self.model.vision.num_layers,
                dtype=getattr(torch, self.run_.config.engine.dtype),
                measured=timings.read(self.kind),
            )
        return known[name]

    def _kind(self) -> str:
        """What the time of a step depends on, as a key of the record of times. Before ZeRO takes the weights apart."""
        engine, recipe, model = self.run_.config.engine, self.config.recipe, self.model
        words: list[str] = [tune.tune for tune in (recipe.llm, recipe.vision, recipe.connector)]
        if self.config.data.feature_cache:
            words.append("cached")
        if engine.gradient_checkpointing:
            words.append(f"checkpointing={engine.gradient_checkpointing}")
        return timings.kind_of_step(
            self.run_.process.device,
            engine.dtype,
            " ".join(words),
            layers=model.num_layers + model.vision.num_layers,
            tokens=self.config.batch.tokens,
            flops=self.flops,
        )

    def _load_weights(self, checkpoint: Path) -> None:
        """Weights by the names that the recipe gives them: wrapped by LoRA, quantized."""
        io.load_weights(self.model, checkpoint, skip=quantize.state_names(self.model))
        with open_tensors(checkpoint / io.WEIGHTS) as tensors:
            quantize.load_state(self.model, tensors)

    def _loader(self) -> Loader:
        run, state = self.run_, self.state
        loader = build_loader(
            run.config,
            self.config,
            self.reading,
            process=run.process,
            tokenizer=run.tokenizer,
            processor=run.processor,
            model=self.model,
        )
        data = self.config.data
        self.model.describe_training(
            template=data.template,
            turns=data.turns,
            image_mode=data.image_mode,
            image_grid=loader.dataset.files.grid,
            reading=self.reading,
        )
        self.report = loader.dataset.report.as_dict()
        if state.loader:
            loader.load_state_dict(state.loader)
        if state.stage_step > loader.steps:
            raise UserError(
                f"stages.{self.config.name}: max_steps or epochs give {loader.steps} steps, but {state.stage_step} are "
                "done; give at least as many"
            )
        state.stage_steps = loader.steps
        return loader

    def run(self) -> None:
        """Train to the end of the stage and save its model folder."""
        total, run = self.loader.steps, self.run_
        run.open()
        ahead = sum(o.steps * o.flops for o in (run.outlooks or [])[self.state.stage_index + 1 :])
        done, later = self.state.stage_step, ahead / max(self.flops, 1.0)
        progress = Progress(self.config.name, total, done=done, later=later, show=run.main)
        try:
            if done < total:
                run.unfinish()
                run.stepping = True
                self._steps(total, progress)
        finally:
            run.stepping = False
            progress.close()
            self.loader.close()
            if self.profiler:
                self.profiler.close()
        if self.features:
            log.info("feature cache: %d found, %d computed", self.features.hits, self.features.misses)
        self._save_model()
        self.engine.close()
        if self.run_.main and not self.profiler and self.run_.config.engine.compile != "regional":
            timings.write(self.kind, self.seconds, self.compiled.seconds if self.compiled else None)
        if self.compiled:
            self.run_.compile_seconds += self.compiled.seconds
            self.run_.graphs += self.compiled.graphs
            self.run_.recompiles += self.compiled.recompiles
            self.compiled.close()
        gc.collect()  # the model and its hooks refer to each other; the next stage brings its own

    def _steps(self, total: int, progress: Progress) -> None:
        state, engine, run = self.state, self.engine, self.run_
        batches = iter(self.loader)
        window = Window()
        while state.stage_step < total:
            if self.profiler:
                self.profiler.begin()
            started = time.perf_counter()
            micro, wait_s = self._next_micro_batches(batches)
            counts, stop = self._count(micro)
            if self.features:
                micro = [self.features.attach(batch) for batch in micro]
            scale = 1.0 / max(counts["supervised_tokens"], 1.0)
            loss_sum = torch.zeros((), device=engine.device)
            for batch in micro:
                loss_sum += engine.forward_backward(batch, scale)
            self.pending.append((loss_sum, scale))
            lrs = self._learning_rates(total)
            with torch.profiler.record_function("tlf.optimizer"):
                grad_norm = engine.step(lrs)
            self.seconds.append(time.perf_counter() - started)
            self._advance(counts, self.seconds[-1])
            if self.profiler:
                self.profiler.end(micro)
            window.add(counts, wait_s)
            progress.advance(state.stage_step)
            stop = stop or run.stop_signal_now()
            last = state.stage_step == total
            due = state.step % run.config.log_every == 0 or last
            every = run.config.checkpoint.every_steps
            saving = last or stop or bool(every and state.stage_step % every == 0)
            if due or saving:
                entry = self._entry(grad_norm, lrs, window)
                progress.update(state.stage_step, entry, line=due)
                if due:
                    self._write(entry)
                    window = Window()
            self._check_supervision(counts)
            if saving:
                self._checkpoint()
            if stop:
                raise StopRequest(128 + stop)

    def _next_micro_batches(self, batches: Iterator[PackedBatch]) -> tuple[list[PackedBatch], float]:
        started = time.perf_counter()
        with torch.profiler.record_function("tlf.data"):
            micro = [next(batches) for _ in range(self.micro_batches)]
        return micro, time.perf_counter() - started

    def _count(self, micro: list[PackedBatch]) -> tuple[dict[str, float], int]:
        """Counts of the step over all ranks, and the largest signal number that any rank received (0: none)."""
        local = [
            sum(b.num_samples for b in micro),
            sum(b.num_tokens for b in micro),
            sum(b.num_supervised for b in micro),
            sum(b.input_ids.numel() for b in micro),
        ]
        stop = self.run_.stop_signal
        if self.run_.process.world_size == 1:
            return dict(zip(COUNTS, map(float, local), strict=True)), stop
        # float64 holds these integers exactly; the flag rides along so that all ranks stop at the same step.
        flags = [float(stop == number) for number in STOP_SIGNALS]
        summed = torch.tensor([*local, *flags], dtype=torch.float64, device=self.engine.device)
        values = self.engine.all_reduce_sum(summed).tolist()
        arrived = [int(n) for n, count in zip(STOP_SIGNALS, values[len(COUNTS) :], strict=True) if count]
        return dict(zip(COUNTS, values, strict=False)), arrived[0] if arrived else 0

    def _learning_rates(self, total: int) -> dict[str, float]:
        optim = self.config.optim
        factor = lr_factor(
            self.state.stage_step,
            total_steps=total,
            schedule=optim.schedule,
            warmup_ratio=optim.warmup_ratio,
            min_lr_ratio=optim.min_lr_ratio,
        )
        return {name: lr * factor for name, lr in self.peak_lrs.items()}

    def _advance(self, counts: dict[str, float], seconds: float) -> None:
        self.state.step += 1
        self.state.stage_step += 1
        self.state.totals["step_seconds"] += seconds
        for name in COUNTS:
            self.state.totals[name] += counts[name]

    def _check_supervision(self, counts: dict[str, float]) -> None:
        """Raise UserError for a whole pass over the data, or a whole stage, in which there was nothing to learn."""
        state, loader = self.state, self.loader
        state.barren = 0 if counts["supervised_tokens"] else state.barren + 1
        if not state.barren:
            return
        if state.barren == 1:
            log.warning("step %d: no supervised token in it, so nothing is learnt from it", state.step)
        if state.barren >= min(max(math.ceil(loader.steps_per_epoch), 1), state.stage_steps):
            skipped = list(loader.skipped)
            reason = f"; {len(skipped)} records were skipped, the first: {skipped[0]}" if skipped else ""
            raise UserError(
                f"stages.{self.config.name}.data: {state.barren} steps in a row, a whole pass over the data or the "
                f"whole stage, had no supervised token{reason}. Mend the images or image_folder"
            )

    def _entry(self, grad_norm: torch.Tensor, lrs: dict[str, float], window: Window) -> dict[str, Any]:
        """The metrics of the steps since the last line. Raises UserError if one of them is no number any more."""
        sums = self.engine.all_reduce_sum(torch.stack([loss for loss, _ in self.pending])).tolist()
        self.state.losses += [total * scale for total, (_, scale) in zip(sums, self.pending, strict=True)]
        self.pending.clear()
        loss = sum(self.state.losses) / len(self.state.losses)
        norm = float(grad_norm)
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise diverged(self.state, self.config.recipe, self.peak_lrs, loss, norm)
        return {
            "step": self.state.step,
            "stage": self.state.stage,
            "loss": loss,
            "lr": {name.partition(".")[0]: lr for name, lr in lrs.items()},
            "grad_norm": norm,
            "epoch": self.loader.epoch,
            **window.rates(),
            "memory_bytes": memory_bytes(self.engine.device),
        }

    def _write(self, entry: dict[str, Any]) -> None:
        self.state.losses = []
        if self.state.stage_step == self.state.stage_steps:
            self.state.final_losses[self.config.name] = entry["loss"]
        if self.run_.metrics:
            self.run_.metrics.write(entry)

    def _checkpoint(self) -> None:
        skipped = self.run_.gather(list(self.loader.skipped))
        self.state.loader = {**self.loader.state_dict(), "skipped": skipped}
        self.state.reports[self.config.name] = {**self.report, "skipped": skipped}
        self.run_.save(self.engine)

    def _save_model(self) -> None:
        run = self.run_
        weights = {item.name: item.fetch() for item in self.engine.model_state()}
        weights = quantize.plain_weights(self.model, weights, getattr(torch, run.config.engine.dtype))
        # The next stage goes on from what the optimizer knows, not from weights rounded to the training dtype; so does
        # whoever merges an adapter.
        following = self.state.stage_index + 1 < len(run.config.stages)
        exact = set(weights if following else adapter.parameter_names(self.model))
        for item in self.engine.optimizer_state():
            name = item.name.removeprefix("master/")
            if name != item.name and name in exact:
                weights[name] = item.fetch()
        if following:
            weights = {name: tensor.float() for name, tensor in weights.items()}
        if run.main:
            io.save_model(self.model, run.tokenizer, run.processor, run.folder / self.config.name, state_dict=weights)
        self.engine.barrier()
