"""The parts of a run that its stages share: the folder, the state and its checkpoints, the metrics, the signals."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tinyllava_fast import group
from tinyllava_fast.config.load import dump, to_dict
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import UserError, writing
from tinyllava_fast.files import TMP, remove, write_file
from tinyllava_fast.hardware import peak_rss_bytes
from tinyllava_fast.log import log
from tinyllava_fast.models.build import build_image_processor, build_tokenizer
from tinyllava_fast.train import nonfinite, quarantine, seed
from tinyllava_fast.train.answers import SampleRow
from tinyllava_fast.train.best import LAST, BestModels, copy_model
from tinyllava_fast.train.checkpoint import CheckpointStore, TrainState
from tinyllava_fast.train.engine.base import TrainingEngine
from tinyllava_fast.train.engine.launch import Process
from tinyllava_fast.train.failures import DIVERGED, Way, without_another
from tinyllava_fast.train.metrics import COUNTS, Entry, MetricsWriter, peak_device_bytes, truncate_after
from tinyllava_fast.train.page import Page
from tinyllava_fast.train.prepare import Outlook
from tinyllava_fast.train.pulse import LOCK, Heart, State, this_place
from tinyllava_fast.train.resume import find_checkpoint
from tinyllava_fast.train.standing import outcome
from tinyllava_fast.train.stops import StopRequest


class Run:
    """The parts that all stages share: folder, checkpoints, state, tokenizer and image processor."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.config, self.process = config, process
        self.folder = Path(config.output_dir)
        self.store = CheckpointStore(self.folder / "checkpoints", config.checkpoint.keep)
        totals = dict.fromkeys(("wall_seconds", "step_seconds", *COUNTS), 0.0)
        self.state = TrainState(config=to_dict(config), totals=totals)
        self.started = time.perf_counter()
        self.way = Way(self.store)
        self.best = BestModels(self.folder, self.store)
        self.stop_signal = 0
        self.profile = False
        self.compile_seconds, self.graphs, self.recompiles = 0.0, 0, 0
        self.metrics: MetricsWriter | None = None
        self.heart: Heart | None = None
        self.page: Page | None = None
        self.outlooks: list[Outlook] | None = None
        self.stepping = False
        self._copy_seconds, self._said_slow = 0.0, False
        self._lock_file: TextIO | None = None
        self._made: list[Path] = []

    @property
    def main(self) -> bool:
        """True for the process that writes the shared files."""
        return self.process.rank == 0

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that this process goes on from; None: it starts."""
        return self.way.began

    def start(self, resume: str) -> None:
        """Find the checkpoint to continue from, prepare the folder, and seed."""
        if self.main:
            self._lock()
        self.way.resume = resume
        found = find_checkpoint(self.store, self.config, resume)
        group.gather(None)  # every rank has looked before rank 0 cleans
        if found is not None:
            self.way.began, saved = found
            saved.config = self.state.config
            saved.totals = self.state.totals | saved.totals
            self.state = saved
            log.info("resuming from %s", self.checkpoint)
        if self.main:
            self.store.clean()
            for folder in (self.folder, self.best.folder, self.folder / LAST):
                for stale in folder.glob(f"{TMP}*"):  # what a killed run was writing
                    remove(stale)
        seed.seed_everything(self.config.seed, self.process.rank)
        self.tokenizer = build_tokenizer(self.config.model)
        self.processor = build_image_processor(self.config.model)

    def open(self) -> None:
        """Write to the folder from now on. Not before the first stage is ready: what was there outlives a mistake."""
        if not self.main or self.metrics:
            return
        if self.checkpoint is None:
            self._start_over()
        with writing(self.store.folder):
            self.store.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder / "config.yaml"):
            write_file(self.folder / "config.yaml", dump(self.config).encode())
        loggers, step = self.config.loggers, self.state.step
        with writing(self.folder / nonfinite.FILE):
            truncate_after(self.folder / nonfinite.FILE, step)
        self.metrics = MetricsWriter(self.folder, after_step=step, loggers=loggers, config=self.state.config)
        self.heart, self.page = Heart(self.folder), Page(self.folder, dump(self.config))

    def write(self, entry: Entry) -> None:
        """Write an entry to all that tells of the run's numbers."""
        if self.metrics and self.page and self.heart:
            self.metrics.write(entry)
            self.page.add(entry, self.heart.pulse)

    def show(self, rows: Sequence[SampleRow], *, again: bool = False) -> None:
        """Show what the model answers to the samples of its stage. again: the loggers have seen it."""
        if self.metrics and self.page and rows:
            if not again:
                self.metrics.samples(self.state.stage, self.state.step, rows)
            self.page.show(self.state.stage, rows)

    def beat(self, step_s: float, eta_s: float) -> None:
        """Note where the run stands after a step. step_s: seconds of a step. eta_s: to the end of the run."""
        state = self.state
        if self.heart:
            at = {"stage_step": state.stage_step, "stage_steps": state.stage_steps, "step": state.step}
            self.heart.beat(stage=state.stage, step_s=step_s, eta_s=eta_s, **at)
        group.stepping(True)

    def begin(self, doing: str) -> None:
        """Note that something begins, between two steps, that may take long."""
        group.stepping(False)
        if self.heart:
            self.heart.begin(doing)

    def end(self, state: State, why: str = "") -> None:
        """Note how the run has ended, if it has begun at all."""
        if self.heart and self.page:
            self.heart.end(state, why)
            self.page.write(self.heart.pulse)

    def lost(self, silent: str) -> str:
        """Note that the run ends because a process is silent, and return what to say. silent: which, and since when."""
        text = without_another(self.way, self.state, silent)
        self.end("failed", text)
        return text

    def _lock(self) -> None:
        """Refuse a folder that another training writes to, for instance one that outlived its killed parent."""
        with writing(self.folder):
            self._made = _make_folder(self.folder)
            self._lock_file = (self.folder / LOCK).open("a")  # what it says is its holder's
        try:
            # lockf: a record lock ends with this very process; data workers do not inherit it.
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"output_dir: another process trains in {self.folder}; wait for it, stop it, or set another output_dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"output_dir: {self.folder / LOCK} cannot be locked: {error.strerror}; name a folder on a file "
                "system that has locks"
            ) from None
        with writing(self.folder / LOCK):
            self._lock_file.truncate(0)
            self._lock_file.write(json.dumps({"pid": os.getpid(), **this_place()}))
            self._lock_file.flush()

    def _start_over(self) -> None:
        self.store.clear()
        self.best.clear()
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        for name in (quarantine.FILE, nonfinite.FILE):
            with writing(self.folder / name):
                (self.folder / name).unlink(missing_ok=True)
        self.unfinish()

    def unfinish(self) -> None:
        """Remove the summary: steps follow, so the run is not finished."""
        if self.main:
            with writing(self.folder / "summary.json"):
                (self.folder / "summary.json").unlink(missing_ok=True)

    def save(self, engine: TrainingEngine, *, last: bool) -> None:
        """Save a checkpoint of the current state; metrics up to it are on disk first.

        last: no step follows, so it is written now; else perhaps in the background (checkpoint.asynchronous).
        """
        self.publish()
        self._count_time()
        if self.metrics:
            self.metrics.sync()
        started = time.perf_counter()
        self.begin("saving a checkpoint")
        if not last and self._in_background(engine):
            self.store.begin(self.state, engine)
            self._copy_seconds = time.perf_counter() - started
            return
        self.way.saved = self.store.save(self.state, engine)
        self._saved(f"in {time.perf_counter() - started:.1f} s")

    def publish(self) -> None:
        """Put the checkpoint that is written in the background in its place, once it is whole; every rank calls it."""
        if (pending := self.store.pending) is None:
            return
        started = time.perf_counter()
        self.way.saved = self.store.publish()
        stall = self._copy_seconds + time.perf_counter() - started
        self._saved(f"in {pending.writer.seconds:.1f} s beside the steps, which waited {stall:.2f} s")

    def _saved(self, how: str) -> None:
        if self.main:
            self.best.prune(self.state)
        log.info("saved %s %s", self.way.saved, how)

    def _in_background(self, engine: TrainingEngine) -> bool:
        """Return whether to write the next checkpoint in the background."""
        chosen = self.config.checkpoint.asynchronous
        if chosen != "auto":
            return chosen
        if self.process.device.type == "cpu":
            return False  # its memory is the training's, and a save takes little of a CPU's long steps
        fits = self.store.fits(engine)
        if not fits and not self._said_slow:
            log.warning(
                "checkpoint.asynchronous: auto: the host's memory does not take a copy of the training state twice, so "
                "steps wait for each save; set checkpoint.asynchronous=true to copy it all the same"
            )
        self._said_slow = not fits
        return fits

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Around a stage: an error that ends it leaves no checkpoint half-written that could be whole."""
        try:
            yield
        except (Exception, StopRequest):
            # Several processes end one by one, and publish nothing together any more.
            if self.process.world_size == 1:
                with suppress(Exception):  # the error to tell is the one at hand
                    self.publish()
            raise
        self.store.forget()

    def finish(self) -> dict[str, object]:
        """Publish the last stage's model as final/, write the summary and return it."""
        self._count_time()
        totals, seconds = self.state.totals, max(self.state.totals["step_seconds"], 1e-9)
        reports = self.state.reports
        skipped = [reason for report in reports.values() for reason in report["skipped"]]
        unsupervised = sum(report["unsupervised"] for report in reports.values())
        summary: dict[str, object] = {
            "train_seconds": totals["wall_seconds"],
            "step_seconds": totals["step_seconds"],
            "compile_seconds": self.compile_seconds,
            "compiled_graphs": self.graphs,
            "recompiles": self.recompiles,
            "steps": self.state.step,
            "samples": int(totals["samples"]),
            "samples_per_s": totals["samples"] / seconds,
            "tokens_per_s": totals["tokens"] / seconds,
            "supervised_tokens_per_s": totals["supervised_tokens"] / seconds,
            "padding_share": 1.0 - totals["tokens"] / max(totals["capacity"], 1.0),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_device_bytes(self.process.device),
            "skipped": len(skipped),
            "skipped_records": skipped,
            "unsupervised_samples": unsupervised,
            "skipped_steps": {
                stage: counts["nonfinite"] + counts["overflow"]
                for stage, counts in self.state.skipped_steps.items()
                if counts["nonfinite"] + counts["overflow"]
            },
            "loss": self.state.final_losses,
            "validation": {
                stage.name: outcome(stage.validation, standing)
                for stage in self.config.stages
                if (standing := self.state.validation.get(stage.name)) is not None
            },
            "changes": self.state.changes,
            "data": reports,
            "sources": {stage: sources for stage, sources in self.state.sources.items() if sources},
        }
        for reason in skipped[:10]:
            log.warning("skipped %s", reason)
        if skipped or unsupervised:
            log.warning("%d records skipped, %d samples without a supervised token", len(skipped), unsupervised)
        if self.main:
            copy_model(self.folder / self.state.stage, self.folder / "final")
            with writing(self.folder / "summary.json"):
                write_file(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            log.info(
                "finished %d steps in %.1f s; model in %s",
                self.state.step,
                totals["wall_seconds"],
                self.folder / "final",
            )
        group.gather(None)  # no process ends, and takes the store with it, before all is written
        return summary

    def stop_signal_now(self) -> int:
        """The signal received so far; 0 with several processes, which must agree at the start of a step."""
        return self.stop_signal if self.process.world_size == 1 else 0

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.state.totals["wall_seconds"] += now - self.started
        self.started = now

    def close(self) -> None:
        """Close the metrics and let go of the folder, whatever happened; a start that failed leaves none behind."""
        self.store.abandon()
        if self.metrics:
            self.metrics.close()
        elif self._made:
            remove(self.folder / LOCK)
            for folder in self._made:
                with suppress(OSError):  # something else lies in it
                    folder.rmdir()
        if self._lock_file:
            self._lock_file.close()


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those around it; return the ones that were not there, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def told(run: Run) -> Iterator[None]:
    """Note how the run ends, for whoever asks for its status; errors pass."""
    try:
        yield
    except StopRequest as request:
        run.end("stopped", request.said)
        raise
    except KeyboardInterrupt:
        run.end("stopped", "interrupted")
        raise
    except UserError as error:
        run.end("diverged" if DIVERGED in str(error) else "failed", str(error))
        raise
    except BaseException as error:
        run.end("failed", f"{type(error).__name__}: {error}")
        raise
    run.end("finished")
