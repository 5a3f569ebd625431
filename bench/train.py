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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyllava_fast.bench import machine, report
from tinyllava_fast.bench.gate import Worker
from tinyllava_fast.bench.progress import progress
from tinyllava_fast.bench.samples import write_easy_vqa
from tinyllava_fast.bench.timing import Series, at_least_one, speedup, turns
from tinyllava_fast.config.load import dump, load_run, to_dict
from tinyllava_fast.config.schema import RunConfig
from tinyllava_fast.errors import UserError, nearest

WORKLOAD = Path(__file__).parent / "workloads" / "smollm2.yaml"
PRECISIONS = ("bf16", "autocast", "master", "float32")  # how the peer keeps its weights, see peer.py
_CACHED = "stages.0.data.feature_cache=1"
_FROZEN = "stages.0.recipe.llm.tune=frozen"
_LORA = "stages.0.recipe.llm.tune=lora"
MODES: dict[str, tuple[str, ...]] = {  # what is added to the workload; the peer has no features to keep
    "finetune": (),
    "finetune-cached": (_CACHED,),
    "pretrain": (_FROZEN,),
    "pretrain-cached": (_FROZEN, _CACHED),
    "lora": (_LORA,),
    "qlora": ("stages.0.recipe.llm.tune=qlora",),
}
BESIDE = {"qlora": "lora"}  # another mode of ours that races too, and which the peer is given


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a comparison. Raises UserError for a value that measures nothing."""

    rounds: int = 5  # timed rounds
    steps: int = 1  # steps of each competitor in a round
    warmup: int = 2  # untimed first steps of each
    samples: int = 8  # samples a step
    peers: tuple[str, ...] = ("bf16",)  # one process each, by how it keeps its weights: of PRECISIONS
    mode: str = "finetune"  # of MODES
    peer_checkpointing: bool = False  # whether the peer recomputes its activations, as TinyLLaVA Factory's scripts set
    lora_rank: int = 128  # of modes lora and qlora; alpha is twice the rank
    reference: bool = True  # whether the losses of the peer in float32 are taken after the race
    quick: bool = False  # GEMM peaks of tiny shapes: for tests, MFU then means nothing

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"--mode {self.mode!r}; {nearest(self.mode, MODES)}")
        for precision in self.peers:
            if precision not in PRECISIONS:
                raise UserError(f"--peer {precision!r}; {nearest(precision, PRECISIONS)}")
        if not self.peers or len(set(self.peers)) < len(self.peers):
            raise UserError(f"--peer {' '.join(self.peers)}: name each peer once")
        at_least_one(self, "rounds", "steps", "warmup", "samples", "lora_rank")


@dataclass
class Measured:
    """What one worker told."""

    facts: dict[str, Any]
    seconds: list[float]  # timed steps, in order
    losses: list[float]  # every step, warm-up included
    warmup_seconds: list[float]
    peak_rss_bytes: int = 0

    @property
    def series(self) -> Series:
        """The timed steps."""
        return Series(tuple(self.seconds))


def compose(config: Path, overrides: Sequence[str], folder: Path, settings: Settings, mode: str | None = None) -> Path:
    """The run that a worker reads: the workload with the samples filled in. Returns its YAML file in ``folder``.

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
    if not stage.data.records:
        count = (settings.warmup + settings.rounds * settings.steps) * settings.samples
        records, images = write_easy_vqa(folder, count)
        stage = replace(stage, data=replace(stage.data, records=str(records), image_folder=str(images)))
    path = folder / f"{mode}.yaml"
    path.write_text(dump(replace(run, stages=[stage], data_root=".")), encoding="utf-8")
    return path


def benchmark(
    config: Path = WORKLOAD, overrides: Sequence[str] = (), settings: Settings | None = None
) -> dict[str, Any]:
    """Run all competitors in turns and return the report (see ``compose_report``)."""
    settings = settings or Settings()
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
    """A process of bench/worker.py for one side of a run, ``samples`` a step; its log is in the folder."""
    words = [side, str(path), "--per-step", str(samples), *options]
    return Worker(name, "tinyllava_fast.bench.worker", words, folder / f"{name}.log")


def _race(path: Path, other: Path, folder: Path, settings: Settings) -> dict[str, Measured]:
    """other: the run of the peers, and of ours beside, where the mode has such a one."""
    sides: dict[str, tuple[Any, ...]] = {"ours": ("ours", path)}  # name: side, run, options
    if beside := BESIDE.get(settings.mode):
        sides[f"ours-{beside}"] = ("ours", other)
    options = ["--checkpointing"] if settings.peer_checkpointing else []
    sides |= {f"peer-{p}": ("peer", other, "--precision", p, *options) for p in settings.peers}
    measured: dict[str, Measured] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, (side, run, *words) in sides.items():
            workers[name] = stack.enter_context(start(name, side, run, folder, settings.samples, *words))
        for side in progress(list(sides), "models to build"):
            measured[side] = Measured(workers[side].ready(), [], [], [])
        for side in progress(list(sides), "warm-ups (compilation included)"):
            answer = workers[side].steps(settings.warmup)
            measured[side].warmup_seconds = answer["seconds"]
            measured[side].losses += answer["losses"]
        each = [side for index in range(settings.rounds) for side in turns(list(sides), index)]
        for side in progress(each, f"turns of {settings.steps} steps"):
            answer = workers[side].steps(settings.steps)
            measured[side].seconds += answer["seconds"]
            measured[side].losses += answer["losses"]
            measured[side].peak_rss_bytes = answer["peak_rss_bytes"]
    return measured


def _follow(path: Path, folder: Path, settings: Settings) -> Measured:
    """The peer alone, in float32: after the race, so that its memory is not needed beside theirs."""
    with start("reference", "peer", path, folder, settings.samples, "--precision", "float32") as worker:
        facts = worker.ready()
        answer = worker.steps(settings.warmup + settings.rounds * settings.steps)
    return Measured(facts, answer["seconds"], answer["losses"], [], answer["peak_rss_bytes"])


def compose_report(
    measured: dict[str, Measured], machines: list[dict[str, Any]], run: RunConfig, settings: Settings
) -> dict[str, Any]:
    """The JSON: ratio, mfu, rss_ratio, samples_per_s, peer, spread, losses, and what is needed to judge them.

    "peer" is the fastest of the peers, and ratio and rss_ratio compare with it. losses.gap says for each peer how far
    apart the losses are at most, relative to the peer's. mfu divides by the best GEMM rate of the run's dtype measured
    before or after, whichever is higher. "beside", if the mode has one: the other mode of ours, and how ours compares.
    """
    ours, reference = measured["ours"], measured.get("reference")
    peers = {p: measured[f"peer-{p}"] for p in settings.peers}
    peak = max(m["gemm"][run.engine.dtype]["flops_per_s"] for m in machines)
    flops = sum(ours.facts["flops"].values())
    fastest = min(peers, key=lambda p: peers[p].series.median)
    ratio = speedup(peers[fastest].series, ours.series)

    def entry(one: Measured) -> dict[str, Any]:
        median = one.series.median
        flops = sum(one.facts["flops"].values())
        return {
            "samples_per_s": settings.samples / median,
            "tokens_per_s": one.facts["tokens_per_step"] / median,
            "peak_rss_bytes": one.peak_rss_bytes,
            "mfu": flops / median / peak,
            "warmup_seconds": one.warmup_seconds,
            "first_step_extra_s": max(0.0, one.warmup_seconds[0] - median),
            "setup_seconds": one.facts["setup_seconds"],
            "step": one.series.as_dict(),
            "losses": one.losses,
        }

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
        "mfu": flops / ours.series.median / peak,
        "rss_ratio": ours.peak_rss_bytes / peers[fastest].peak_rss_bytes,
        "samples_per_s": settings.samples / ours.series.median,
        "spread": ratio,
        "losses": {
            "ours": ours.losses,
            "peer": peers[fastest].losses,
            "reference": reference.losses if reference else None,
            "gap": {
                p: largest_gap(ours.losses, one.losses) for p, one in {**peers, "reference": reference}.items() if one
            },
        },
        "ours": entry(ours),
        "beside": beside,
        "peer": {"weights": fastest, **entry(peers[fastest])},
        "peers": {p: {**entry(one), "ratio": speedup(one.series, ours.series)} for p, one in peers.items()},
        "workload": {k: v for k, v in ours.facts.items() if k != "setup_seconds"},
        "gemm_peak_flops_per_s": peak,
        "settings": {**asdict(settings), "compile": run.engine.compile, "dtype": run.engine.dtype},
        "machine": machines[0],
        "gemm_peaks": [m["gemm"][run.engine.dtype]["flops_per_s"] for m in machines],
        "run": _portable(run),
    }


def _portable(run: RunConfig) -> dict[str, Any]:
    """The configuration without the temporary folders of this run: a result may be committed."""
    facts = to_dict(run)
    for stage in facts["stages"]:
        for key in ("records", "image_folder"):
            stage["data"][key] = Path(stage["data"][key]).name
    return facts


def largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two loss curves, relative to the second."""
    return max(abs(o - t) / abs(t) for o, t in zip(ours, theirs, strict=True))


def show(result: dict[str, Any]) -> None:
    """The report as two tables: speed and memory, and the losses side by side."""
    sides = {"tinyllava_fast": result["ours"]}
    beside = result["beside"]
    if beside:
        sides[f"tinyllava_fast, {beside['mode']}"] = beside
    sides |= {f"transformers + Trainer, {p}": one for p, one in result["peers"].items()}
    rows = [
        [
            name,
            f"{one['samples_per_s']:.3f}",
            f"{one['tokens_per_s']:.0f}",
            report.seconds(one["step"]["median_s"]),
            f"{report.seconds(one['step']['min_s'])} .. {report.seconds(one['step']['max_s'])}",
            f"{one['peak_rss_bytes'] / 2**30:.2f} GiB",
            f"{100 * one['mfu']:.0f} %",
            report.seconds(one["first_step_extra_s"]),
        ]
        for name, one in sides.items()
    ]
    columns = ["", "samples/s", "tokens/s", "step (median)", "min .. max", "peak memory", "MFU", "first step extra"]
    spread = result["spread"]
    title = (
        f"{result['ratio']:.2f}x the samples/s of the peer (per round {spread['min']:.2f} .. {spread['max']:.2f}), "
        f"{result['rss_ratio']:.2f}x its memory; GEMM peak "
        f"{report.quantity(result['gemm_peak_flops_per_s'], 'FLOP/s')} ({result['settings']['dtype']})"
    )
    if beside:
        title += f"; {beside['ratio']['ratio']:.2f}x and {beside['rss_ratio']:.2f}x of our own {beside['mode']}"
    report.show(title, columns, rows)
    mine = result["losses"]["ours"]
    others = {name: one["losses"] for name, one in sides.items() if one is not result["ours"]}
    if result["losses"]["reference"]:
        others["the peer in float32"] = result["losses"]["reference"]
    table = []
    for step, loss in enumerate(mine):
        theirs = [curve[step] for curve in others.values()]
        table.append([str(step), f"{loss:.4f}", *(f"{t:.4f} ({100 * (loss - t) / t:+.2f} %)" for t in theirs)])
    report.show(
        "Loss of each step, same samples (ours relative to that peer)", ["step", "tinyllava_fast", *others], table
    )
