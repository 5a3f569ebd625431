"""`tlf-bench train`: training steps against transformers' Llava under HF Trainer, interleaved in one run.

Each competitor lives in its own process (own allocator, own peak of memory) and steps only on order, so the two take
turns on the whole machine. The first steps are warm-up: compilation and first-touch of memory lie there.

The fastest peer trains bf16 weights without float32 masters, which swallow updates smaller than half a unit in the last
place, and autocast over float32 weights rounds them for each product, which swallows the first dozen (docs/LOG.md):
their losses are no yardstick. So after the race the same peer runs the same steps once more in float32 alone, untimed,
and its losses are the ones that ours must follow.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.gate import Answer, Facts, Worker
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.samples import write_easy_vqa
from tinyllava_fast.bench.settings import MODES, TrainSettings
from tinyllava_fast.bench.timing import Series, speedup, turns
from tinyllava_fast.config.load import dump, load_run, to_dict
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import UserError

BESIDE = {"qlora": "lora"}  # another mode of ours that races too, and which the peer is given


@dataclass
class Measured:
    """The answers of one worker."""

    facts: Facts
    seconds: list[float] = field(default_factory=list)  # timed steps, in order
    losses: list[float] = field(default_factory=list)  # every step, warm-up included
    warmup_seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0  # of tensors on a GPU

    @property
    def series(self) -> Series:
        """The timed steps."""
        return Series(tuple(self.seconds))

    def add(self, answer: Answer, *, warmup: bool = False) -> None:
        """Take the answer to an order in."""
        (self.warmup_seconds if warmup else self.seconds).extend(answer["seconds"])
        self.losses += answer["losses"]
        self.peak_rss_bytes = answer["peak_rss_bytes"]
        self.peak_device_bytes = max(self.peak_device_bytes, answer["peak_device_bytes"])

    def speed(self, samples: int) -> dict[str, object]:
        """Return what the reports say of the timed steps: samples_per_s, tokens_per_s, step and peak_rss_bytes."""
        median = self.series.median
        return {
            "samples_per_s": samples / median,
            "tokens_per_s": self.facts["tokens_per_step"] / median,
            "step": self.series.as_dict(),
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
        }


SPEED = {
    "samples/s": "{samples_per_s:.3f}",
    "tokens/s": "{tokens_per_s:,.0f}",
    "step (median)": "{step[median_s]:time}",
    "min .. max": "{step[min_s]:time} .. {step[max_s]:time}",
    "peak memory": "{peak_rss_bytes:GiB}",
}
"""The columns of a table about Measured.speed()."""


def compose(
    config: Path, overrides: Sequence[str], folder: Path, settings: TrainSettings, mode: str | None = None
) -> Path:
    """Write the run that a worker reads, the workload with the samples filled in; returns its YAML file in ``folder``.

    mode: another than the settings'. A workload that names its own records is taken as it is; it must hold
    (warmup + rounds * steps) * samples of them.
    """
    mode = mode or settings.mode
    added = list(MODES[mode])
    if mode in ("lora", "qlora"):
        r = settings.lora_rank
        added += [f"stages.0.recipe.llm.lora.r={r}", f"stages.0.recipe.llm.lora.alpha={2 * r}"]
    run = load_run(config, [*overrides, *added])
    if len(run.stages) != 1:
        raise UserError(f"{config}: stages: a benchmark run has exactly one stage, this has {len(run.stages)}")
    stage = run.stages[0]
    for name in ("llm", "vision", "connector"):
        known = ("frozen", "full", "lora", "qlora") if name == "llm" else ("frozen", "full")
        if (kind := getattr(stage.recipe, name).tune) not in known or (kind == "qlora" and mode != "qlora"):
            raise UserError(
                f"{config}: recipe.{name}.tune: {kind!r}; the peer knows frozen and full components, and an llm of lora"
            )
    if stage.optim.label_smoothing or stage.optim.z_loss:
        raise UserError(f"{config}: optim: the peer knows neither label_smoothing nor z_loss; leave both at 0")
    stage = replace(stage, data=stage.data.under(run.data_root))
    if not stage.data.records and not stage.data.sources:
        count = (settings.warmup + settings.rounds * settings.steps) * settings.samples
        records, images = write_easy_vqa(folder, count)
        stage = replace(stage, data=replace(stage.data, records=str(records), image_folder=str(images)))
    path = folder / f"{mode}.yaml"
    path.write_text(dump(replace(run, stages=[stage], data_root=".")), encoding="utf-8")
    return path


def benchmark(config: Path, overrides: Sequence[str], settings: TrainSettings) -> Report:
    """Run all competitors in turns and return the report (see ``compose_report``)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = compose(config, overrides, folder, settings)
        beside = BESIDE.get(settings.mode)
        other = compose(config, overrides, folder, settings, beside) if beside else path
        run = load_run(path)
        device = machine.pick_device(run.engine.device)
        before = machine.measure(device, quick=settings.quick)
        measured = _race(path, other, folder, settings)
        if settings.reference and "float32" not in settings.peers:
            measured["reference"] = _follow(other, folder, settings)
        after = machine.measure(device, quick=settings.quick)
    return compose_report(measured, [before, after], run, settings)


def start(name: str, side: str, path: Path, folder: Path, samples: int, *options: str) -> Worker:
    """Start a process of bench/worker.py for one side of a run, ``samples`` a step; its log is in the folder."""
    words = [side, str(path), "--per-step", str(samples), *options]
    return Worker(name, "tinyllava_fast.bench.worker", words, folder / f"{name}.log")


@contextlib.contextmanager
def alone(
    config: Path, overrides: Sequence[str], settings: TrainSettings, name: str = "ours"
) -> Iterator[tuple[Worker, Measured]]:
    """Run our side of a workload in a process of its own; yields it when it is ready."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        run = compose(config, overrides, folder, settings)
        with start(name, "ours", run, folder, settings.samples) as worker:
            yield worker, Measured(worker.ready())


def _race(path: Path, other: Path, folder: Path, settings: TrainSettings) -> dict[str, Measured]:
    """other: the run of the peers, and of ours beside, where the mode has such a one."""
    sides: dict[str, tuple[str, Path, list[str]]] = {"ours": ("ours", path, [])}  # name: side, run, options
    if beside := BESIDE.get(settings.mode):
        sides[f"ours-{beside}"] = ("ours", other, [])
    options = ["--checkpointing"] if settings.peer_checkpointing else []
    sides |= {f"peer-{p}": ("peer", other, ["--precision", p, *options]) for p in settings.peers}
    measured: dict[str, Measured] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, (side, run, words) in sides.items():
            workers[name] = stack.enter_context(start(name, side, run, folder, settings.samples, *words))
        for name in progress(list(sides), "models to build"):
            measured[name] = Measured(workers[name].ready())
        for name in progress(list(sides), "warm-ups (compilation included)"):
            measured[name].add(workers[name].steps(settings.warmup), warmup=True)
        each = [name for index in range(settings.rounds) for name in turns(list(sides), index)]
        for name in progress(each, f"turns of {settings.steps} steps"):
            measured[name].add(workers[name].steps(settings.steps))
    return measured


def _follow(path: Path, folder: Path, settings: TrainSettings) -> Measured:
    """Run the peer alone, in float32: after the race, so that its memory is not needed beside theirs."""
    with start("reference", "peer", path, folder, settings.samples, "--precision", "float32") as worker:
        measured = Measured(worker.ready())
        measured.add(worker.steps(settings.warmup + settings.rounds * settings.steps))
    return measured


def compose_report(
    measured: dict[str, Measured], machines: list[Report], run: RunConfig, settings: TrainSettings
) -> Report:
    """Return the JSON: ratio, mfu, rss_ratio, samples_per_s, peer, spread, losses, and what is needed to judge them.

    "peer" is the fastest of the peers, and ratio and rss_ratio compare with it. losses.gap says for each peer how far
    apart the losses are at most, relative to the peer's. mfu divides by the best GEMM rate of the run's dtype measured
    before or after, whichever is higher. "beside", if the mode has one: the other mode of ours, and how ours compares.
    """
    ours, reference = measured["ours"], measured.get("reference")
    peers = {p: measured[f"peer-{p}"] for p in settings.peers}
    gemm_peaks = [m["gemm"][run.engine.dtype]["flops_per_s"] for m in machines]
    peak = max(gemm_peaks)
    fastest = min(peers, key=lambda p: peers[p].series.median)
    ratio = speedup(peers[fastest].series, ours.series)

    def entry(one: Measured) -> Report:
        median = one.series.median
        return {
            **one.speed(settings.samples),
            "mfu": sum(one.facts["flops"].values()) / median / peak,
            "warmup_seconds": one.warmup_seconds,
            "first_step_extra_s": max(0.0, one.warmup_seconds[0] - median),
            "setup_seconds": one.facts["setup_seconds"],
            "losses": one.losses,
        }

    mine = entry(ours)
    beside = None
    if mode := BESIDE.get(settings.mode):
        one = measured[f"ours-{mode}"]
        beside = {
            "mode": mode,
            **entry(one),
            "ratio": speedup(one.series, ours.series),
            "rss_ratio": ours.peak_rss_bytes / one.peak_rss_bytes,
        }
    return {
        "ratio": ratio["ratio"],
        "mfu": mine["mfu"],
        "rss_ratio": ours.peak_rss_bytes / peers[fastest].peak_rss_bytes,
        "samples_per_s": mine["samples_per_s"],
        "spread": ratio,
        "losses": {
            "ours": ours.losses,
            "peer": peers[fastest].losses,
            "reference": reference.losses if reference else None,
            "gap": {
                p: largest_gap(ours.losses, one.losses) for p, one in {**peers, "reference": reference}.items() if one
            },
        },
        "ours": mine,
        "beside": beside,
        "peer": {"weights": fastest, **entry(peers[fastest])},
        "peers": {p: {**entry(one), "ratio": speedup(one.series, ours.series)} for p, one in peers.items()},
        "workload": {k: v for k, v in ours.facts.items() if k != "setup_seconds"},
        "gemm_peak_flops_per_s": peak,
        "settings": {**asdict(settings), "compile": run.engine.compile, "dtype": run.engine.dtype},
        "machine": machines[0],
        "gemm_peaks": gemm_peaks,
        "run": _portable(run),
    }


def _portable(run: RunConfig) -> Report:
    """Return the configuration without the temporary folders of this run: a result may be committed."""
    facts = to_dict(run)
    for stage in facts["stages"]:
        for key in ("records", "image_folder"):
            stage["data"][key] = Path(stage["data"][key]).name
    return facts


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest difference of two loss curves, relative to the second."""
    return max(abs(o - t) / abs(t) for o, t in zip(ours, theirs, strict=True))


def show(result: Report) -> None:
    """Print two tables: speed and memory, and the losses side by side."""
    sides = {"tinyllava_fast": result["ours"]}
    beside = result["beside"]
    if beside:
        sides[f"tinyllava_fast, {beside['mode']}"] = beside
    sides |= {f"transformers + Trainer, {p}": one for p, one in result["peers"].items()}
    columns = {"": "{name}", **SPEED, "tokens/s": "{tokens_per_s:.0f}"}
    columns |= {"MFU": "{mfu:.0 %}", "first step extra": "{first_step_extra_s:time}"}
    title = (
        "{ratio:.2f}x the samples/s of the peer (per round {spread[min]:.2f} .. {spread[max]:.2f}), {rss_ratio:.2f}x "
        "its memory; GEMM peak {gemm_peak_flops_per_s:FLOP/s} ({settings[dtype]})"
    )
    if beside:
        title += "; {beside[ratio][ratio]:.2f}x and {beside[rss_ratio]:.2f}x of our own {beside[mode]}"
    report.table(report.fill(title, result), columns, [{"name": name, **one} for name, one in sides.items()])
    others = {name: one["losses"] for name, one in sides.items() if one is not result["ours"]}
    if result["losses"]["reference"]:
        others["the peer in float32"] = result["losses"]["reference"]
    rows = []
    for step, loss in enumerate(result["losses"]["ours"]):
        theirs = [curve[step] for curve in others.values()]
        rows.append([str(step), f"{loss:.4f}", *(f"{t:.4f} ({100 * (loss - t) / t:+.2f} %)" for t in theirs)])
    title = "Loss of each step, same samples (ours relative to that peer)"
    report.show(title, ["step", "tinyllava_fast", *others], rows)
