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

import torch

from tinyllava_fast import group
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log
from tinyllava_fast.models import io
from tinyllava_fast.plugins import load_plugins
from tinyllava_fast.recipes.base import check_engine
from tinyllava_fast.train import cpu_pool, timings
from tinyllava_fast.train.answers import check_answering
from tinyllava_fast.train.best import LAST, copy_model
from tinyllava_fast.train.by_source import BySource
from tinyllava_fast.train.engine.base import total as loss_of
from tinyllava_fast.train.engine.launch import Process, start_process
from tinyllava_fast.train.failures import diverged, explained
from tinyllava_fast.train.features import check_feature_cache
from tinyllava_fast.train.loggers.base import LOGGERS
from tinyllava_fast.train.lr_schedule import lr_factor
from tinyllava_fast.train.metrics import COUNTS, Entry, Window, memory_bytes, shown_rates
from tinyllava_fast.train.noise import open_noise
from tinyllava_fast.train.nonfinite import Outcomes, Stop
from tinyllava_fast.train.optimizers.base import check_optimizer, find_optimizer
from tinyllava_fast.train.output import output_weights
from tinyllava_fast.train.prepare import look_at_files
from tinyllava_fast.train.progress import Progress
from tinyllava_fast.train.quarantine import Quarantine
from tinyllava_fast.train.run import Run, told
from tinyllava_fast.train.stage import ReadyStage, prepare_stage
from tinyllava_fast.train.standing import Validation, ends_with_best
from tinyllava_fast.train.stops import StopRequest, first_signal, signal_flags, stop_on_signals
from tinyllava_fast.train.stragglers import Stragglers


def train(config: RunConfig, *, resume: str = "auto", profile: bool = False, file: str = "") -> dict[str, object]:
    """Run every stage and return the summary (also written to summary.json).

    profile: record a few steps of each stage (train/profile.py). file: that the configuration came from, for messages.
    Raises UserError for anything the user can mend, StopRequest after a signal, LostError if another process of the run
    has died, SaidError in all processes but one for an error that they have in common.
    """
    process = start(config, file)
    if process.device.type == "cpu":
        cpu_pool.install()
    run = Run(config, process)
    run.profile = profile
    try:
        with group.in_concert(), told(run), group.watched(run.lost), stop_on_signals(run):
            run.start(resume)
            look_at_files(config, config.stages[run.state.stage_index :], process.world_size)
            for index in range(run.state.stage_index, len(config.stages)):
                with explained(run.way, run.state, config.engine, config.stages[index].name), run.settled():
                    run.begin("preparing the stage")
                    Stage(run, prepare_stage(run, index)).train()
            with explained(run.way, run.state, config.engine, run.state.stage):
                return run.finish()
    finally:
        run.close()


def start(config: RunConfig, file: str = "") -> Process:
    """Check what the configuration alone tells, and return this process, ready to train. Raise UserError.

    file: that the configuration came from, for messages.
    """
    for stage in config.stages:
        check_engine(stage.recipe, config.engine, f"stages.{stage.name}")
        check_feature_cache(stage.data, stage.recipe, config.engine, f"stages.{stage.name}")
        check_answering(stage.validation, config.engine, f"stages.{stage.name}")
    load_plugins(config.plugins)
    for name in config.loggers:
        LOGGERS.get(name, f"{file}: loggers" if file else "loggers").check()
    for stage in config.stages:
        find_optimizer(stage.optim, f"stages.{stage.name}", file)
    process = start_process(config.engine)
    for stage in config.stages:
        check_optimizer(stage.optim, config.engine, process.device, f"stages.{stage.name}")
    return process


class Stage:
    """One stage: its steps, metrics and checkpoints. ready: what it steps with."""

    def __init__(self, run: Run, ready: ReadyStage) -> None:
        self.run, self.state = run, run.state
        self.ready, self.config = ready, ready.config
        self.engine, self.loader, self.model = ready.engine, ready.loader, ready.model
        self.outcomes = Outcomes(
            *(run.folder, self.config.name, self.loader.dataset.names, self.config.optim),
            self.state.skipped_steps.setdefault(self.config.name, {}),
            scaled=run.config.engine.dtype == "float16",
            main=run.main,
        )
        self.noise = open_noise(self.config, run.config.engine, self.state.noise)
        self.seconds: list[float] = []  # of each step since the start or a resumption
        self.busy = 0.0  # processes that still wrote a checkpoint in the background at the beginning of the step
        totals = self.state.sources.setdefault(self.config.name, {})
        self.by_source = BySource(self.loader.dataset.names, self.state.source_window, totals)
        lists = run.main and self.config.data.on_error == "quarantine"
        several = run.process.world_size > 1 and self.engine.waited_s is not None
        told = run.process.rank, self.engine.all_reduce_sum, self.engine.device
        self.stragglers = Stragglers(*told) if several else None
        self.quarantine = Quarantine(run.folder, self.config.name, self.loader.dataset) if lists else None

    def train(self) -> None:
        """Train to the end of the stage and save its model folder."""
        total, run, ready = self.state.stage_steps, self.run, self.ready
        run.open()
        if self.quarantine:
            self.quarantine.write(self.loader.skipped)
        if ready.validator and "answers" in (standing := self.state.validation[self.state.stage]):
            run.show(ready.validator.table(standing), again=True)  # of before a resumption
        ahead = sum(o.steps * o.flops for o in (run.outlooks or [])[self.state.stage_index + 1 :])
        done, later = self.state.stage_step, ahead / max(ready.flops, 1.0)
        progress = Progress(self.config.name, total, done=done, later=later, show=run.main)
        try:
            if not self._over:
                run.unfinish()
                run.begin("at its first step")
                run.stepping = True
                self._steps(total, progress)
        finally:
            run.stepping = False
            progress.close()
            self.loader.close()
            if ready.validator:
                ready.validator.close()
            if ready.profiler:
                ready.profiler.close()
        if ready.features:
            log.info("feature cache: %d found, %d computed", ready.features.hits, ready.features.misses)
        self._save_output()
        self.engine.close()
        if run.main and not ready.profiler and run.config.engine.compile != "regional":
            timings.write(ready.kind, self.seconds, ready.compiled.seconds if ready.compiled else None)
        if ready.compiled:
            run.compile_seconds += ready.compiled.seconds
            run.graphs += ready.compiled.graphs
            run.recompiles += ready.compiled.recompiles
            ready.compiled.close()
        gc.collect()  # the model and its hooks refer to each other; the next stage brings its own

    def _steps(self, total: int, progress: Progress) -> None:
        state, engine, run = self.state, self.engine, self.run
        features, profiler = self.ready.features, self.ready.profiler
        batches = iter(self.loader)
        window = Window()
        while not self._over:
            if profiler:
                profiler.begin()
            started, waited = time.perf_counter(), engine.waited_s or 0.0
            micro, wait_s = self._next_micro_batches(batches)
            counts, stop = self._count(micro)
            if features:
                micro = [features.attach(batch) for batch in micro]
            scale = 1.0 / max(counts["supervised_tokens"], 1.0)
            loss_sum = torch.zeros((), device=engine.device)
            for batch in micro:
                losses = engine.forward_backward(batch, scale)
                loss_sum += loss_of(losses)
                self.by_source.note(losses, batch)
                if self.noise and batch is micro[0]:
                    self.noise.begin(engine.gradient_square(), batch.num_supervised)
            lrs = self._learning_rates(total)
            with torch.profiler.record_function("tlf.optimizer"):
                grad_norm = engine.step(lrs, loss_sum if self.outcomes.guards else None)
            if self.noise:
                self.noise.end(grad_norm, counts["supervised_tokens"])
            self.outcomes.note(state.step + 1, loss_sum, scale, grad_norm, micro)
            self.seconds.append(time.perf_counter() - started)
            own_s = self.seconds[-1] - ((engine.waited_s or 0.0) - waited)
            self._advance(counts, self.seconds[-1])
            if profiler:
                profiler.end(micro)
            window.add(counts, wait_s, own_s)
            progress.advance(state.stage_step)
            run.beat(progress.step_s(), progress.run_eta_s())
            stop = stop or run.stop_signal_now()
            if not self.busy:
                run.publish()
            validating = self.ready.validator is not None and self.ready.validator.due(state.stage_step, self._over)
            due = state.step % run.config.log_every == 0 or self._over or validating
            every = run.config.checkpoint.every_steps
            saving = self._over or stop or bool(every and state.stage_step % every == 0)
            if due or saving:
                entry = self._entry(lrs, window)
                if validating:
                    entry["validation"] = self._validate(entry)
                progress.update(state.stage_step, entry, line=due)
                if due:
                    self._write(entry, window)
                    window = Window()
            self._check_supervision(counts)
            if saving or self._over:
                self._checkpoint(last=self._over or bool(stop))
            group.stepping(True)
            if stop:
                raise StopRequest(stop)
        if run.process.world_size > 1:  # a signal during the last step is not to wait for the next stage's first one
            summed = torch.tensor(signal_flags(run.stop_signal), dtype=torch.float64, device=engine.device)
            if stop := first_signal(engine.all_reduce_sum(summed).tolist()):
                raise StopRequest(stop)

    @property
    def _over(self) -> bool:
        """Whether the stage has no step left; a validation may have ended it early."""
        return self.state.stage_step >= self.state.stage_steps

    def _validate(self, entry: Entry) -> Validation:
        """Validate the model as it is after the step of an entry, keep it if it is the best, and perhaps end."""
        state, run = self.state, self.run
        standing = state.validation[state.stage]
        assert self.ready.validator is not None  # noqa: S101 only then a step is followed by one
        run.begin("validating")
        found = self.ready.validator.validate(standing, state.step)
        if not math.isfinite(found.get("loss", 0.0)):
            raise diverged(state, self.config.recipe, self.ready.peak_lrs, found["loss"], entry["grad_norm"])
        if found["best"] and self.config.validation.keep == "best":
            run.publish()  # the checkpoint being written may call another model the best, which stays until then
            self._save_model(run.best.path(state.stage, state.step))
            if run.main:
                run.best.prune(state)
        run.show(self.ready.validator.table(standing))
        if standing["ended_early"]:
            state.stage_steps = state.stage_step
        return found

    def _next_micro_batches(self, batches: Iterator[PackedBatch]) -> tuple[list[PackedBatch], float]:
        started = time.perf_counter()
        with torch.profiler.record_function("tlf.data"):
            micro = [next(batches) for _ in range(self.ready.micro_batches)]
        return micro, time.perf_counter() - started

    def _count(self, micro: list[PackedBatch]) -> tuple[dict[str, float], int]:
        """Counts of the step over all ranks, and the signal that any rank received (0: none)."""
        local = [
            sum(b.num_samples for b in micro),
            sum(b.num_tokens for b in micro),
            sum(b.num_supervised for b in micro),
            sum(b.input_ids.numel() for b in micro),
            *self.by_source.local(micro),
        ]
        if self.run.process.world_size == 1:
            self.busy = float(self.run.store.busy)
            self.by_source.begin(local[len(COUNTS) :])
            return dict(zip(COUNTS, map(float, local), strict=False)), self.run.stop_signal
        # float64 holds these integers exactly; the flags ride along so that all ranks stop, and publish what they have
        # saved, at the same step.
        flags = [*signal_flags(self.run.stop_signal), float(self.run.store.busy)]
        summed = torch.tensor([*local, *flags], dtype=torch.float64, device=self.engine.device)
        values = self.engine.all_reduce_sum(summed).tolist()
        self.by_source.begin(values[len(COUNTS) : len(local)])
        *stops, self.busy = values[len(local) :]
        return dict(zip(COUNTS, values, strict=False)), first_signal(stops)

    def _learning_rates(self, total: int) -> dict[str, float]:
        optim = self.config.optim
        factor = lr_factor(
            self.state.stage_step,
            total_steps=total,
            schedule=optim.schedule,
            warmup_ratio=optim.warmup_ratio,
            min_lr_ratio=optim.min_lr_ratio,
            decay_ratio=optim.decay_ratio,
        )
        return {name: lr * factor for name, lr in self.ready.peak_lrs.items()}

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

    def _entry(self, lrs: dict[str, float], window: Window) -> Entry:
        """The metrics of the steps since the last line. UserError for one that is no number, unless it was skipped."""
        outcomes, counts = self.outcomes.settle(self.engine.all_reduce_sum), self.outcomes.counts
        stop = self.outcomes.judge(outcomes)
        scale = self.engine.loss_scale()
        if stop is None and scale is not None and scale < 1.0:
            stop = Stop(outcomes[-1], f", for gradients overflow though the loss is scaled by {scale:g} only")
        if stop is not None:
            listed = self.outcomes.path if not stop.outcome.finite else None
            state, at = self.state, stop.outcome
            raise diverged(
                *(state, self.config.recipe, self.ready.peak_lrs, at.loss, at.norm),
                step=at.step,
                why=stop.why,
                records=listed,
            )
        self.state.losses += [one.loss for one in outcomes if math.isfinite(one.loss)]
        self.by_source.settle(self.engine.all_reduce_sum, self.engine.device)
        last = outcomes[-1]
        entry: Entry = {
            "step": self.state.step,
            "stage": self.state.stage,
            "loss": sum(self.state.losses) / len(self.state.losses) if self.state.losses else None,
            "lr": shown_rates(lrs),
            "grad_norm": last.norm if last.finite else None,
            "epoch": self.loader.epoch,
            **window.rates(),
            "memory_bytes": memory_bytes(self.engine.device),
        }
        norms = self.engine.gradient_norms()
        if last.finite and len(norms) > 1:
            entry["grad_norms"] = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
        if self.outcomes.guards:
            entry["skipped_steps"] = counts["since_line"]
        if scale is not None:
            entry["loss_scale"] = scale
        if self.noise:
            self.noise.settle(self.engine.all_reduce_sum, self.engine.device)
            entry["noise"] = self.noise.entry()
        if sources := self.by_source.entries():
            entry["sources"] = sources
        return entry

    def _write(self, entry: Entry, window: Window) -> None:
        if self.stragglers:
            entry["ranks"] = self.stragglers.judge(self.stragglers.settle(window.own))
        self.state.losses, self.outcomes.counts["since_line"] = [], 0
        self.by_source.clear()
        if self.state.stage_step == self.state.stage_steps:
            self.state.final_losses[self.config.name] = entry["loss"]
        self.run.write(entry)

    def _checkpoint(self, *, last: bool) -> None:
        skipped = list(dict.fromkeys(reason for part in group.gather(list(self.loader.skipped)) for reason in part))
        if self.quarantine:
            self.quarantine.write(skipped)
        self.state.loader = {**self.loader.state_dict(), "skipped": skipped}
        self.state.reports[self.config.name] = {**self.ready.report, "skipped": skipped}
        self.run.save(self.engine, last=last)

    def _save_output(self) -> None:
        """Save the stage's model, which the next stage begins with: the last one, or the best."""
        run, standing = self.run, self.state.validation.get(self.config.name, {})
        run.begin("writing the model")
        output = run.folder / self.config.name
        if not ends_with_best(self.config.validation, standing):
            self._save_model(output)
            return
        self._save_model(run.folder / LAST / self.config.name)
        if run.main:
            copy_model(run.best.path(self.config.name, standing["best"]["step"]), output)
            log.info("%s: its output is the best model, of step %d", self.config.name, standing["best"]["step"])
        self.engine.barrier()

    def _save_model(self, folder: Path) -> None:
        """Write the model, with the running means of its weights if there are any. Every rank calls it."""
        with self.engine.averaged():
            self._write_model(folder)
        self.engine.barrier()

    def _write_model(self, folder: Path) -> None:
        run, engine = self.run, self.engine
        following = self.state.stage_index + 1 < len(run.config.stages)
        weights = output_weights(
            self.model,
            engine.model_state(),
            engine.optimizer_state(),
            means=bool(self.config.optim.ema),
            following=following,
            dtype=getattr(torch, run.config.engine.dtype),
            main=run.main,
        )
        if run.main:
            io.save_model(self.model, run.tokenizer, run.processor, folder, state_dict=weights)
