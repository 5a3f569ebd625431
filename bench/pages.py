"""`tlf-bench docs`: the tables of the documentation, written from bench/results, so that they cannot go stale.

A page says where a table goes by two lines, ``<!-- tlf-bench docs: NAME -->`` and ``<!-- end -->``; what stands between
them is replaced. Everything else on the page stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_fast.bench import fit
from tinyllava_fast.bench.report import Report, fill, seconds
from tinyllava_fast.errors import UserError

RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/kernels.md", "docs/memory.md")
MACHINES = {"zen5": "C", "amx": "B", "avx512bf16": "A"}
"""The end of a result's file name, and the letter of the machine in the documentation."""
_PLACE = re.compile(r"^<!-- tlf-bench docs: (?P<name>[\w-]+) -->\n.*?^<!-- end -->$", re.DOTALL | re.MULTILINE)
_ABSENT = "–"  # noqa: RUF001 a dash for what was not measured


@dataclass(frozen=True)
class Mode:
    """A row of the table of training steps: the middle of its file's name, and what it is called."""

    file: str
    title: str


MODES = (
    Mode("", "finetune: all but the tower"),
    Mode("pretrain_", "pretrain: the connector"),
    Mode("lora128_", "LoRA, r = 128"),
    Mode("lora16_", "LoRA, r = 16"),
    Mode("qlora16_", "QLoRA (nf4), r = 16, against their LoRA"),
    Mode("finetune_cached_", "finetune, features cached"),
    Mode("pretrain_cached_", "pretrain, features cached"),
)


def update(root: Path, *, check: bool = False) -> list[str]:
    """Write the tables of all pages below a checkout, or only look.

    Returns the pages that changed, or would: what is not there yet is a change, too. Raises UserError for a page that
    is not there, a place that names no table, and a file of results that cannot be read.
    """
    changed = []
    for name in PAGES:
        path = root / name
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); run tlf-bench docs in a checkout") from error
        new = render(text, name)
        if new == text:
            continue
        changed.append(name)
        if not check:
            path.write_text(new, encoding="utf-8")
    return changed


def render(text: str, page: str) -> str:
    """Return a page's text with its tables as the results are. UserError if it has no place, or names no table."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UserError(f"{page}: no table is called {name!r}; have {', '.join(TABLES)}")
        return f"<!-- tlf-bench docs: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    new, count = _PLACE.subn(table, text)
    if not count:
        raise UserError(f"{page}: no place for a table; mark it by <!-- tlf-bench docs: NAME --> and <!-- end -->")
    return new


def read(name: str) -> Report | None:
    """Return the report ``name``.json of bench/results; None if there is none. UserError if it cannot be read."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a report of tlf-bench ({error}); measure again with --json {path}") from error
    return report


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, of which the first column is text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(ratio: float) -> str:
    """Return a speed-up as text; bold where the other side is as fast or faster.

    >>> times(3.39), times(0.95), times(17.4)
    ('3.4x', '**0.95x**', '17x')
    """
    text = f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 1.095 else f"{ratio:.2f}x"
    return f"**{text}**" if ratio < 1 else text


def _range(spread: Mapping[str, float]) -> str:
    low, high = spread["min"], spread["max"]
    digits = 0 if low >= 9.95 else 1
    return f"{low:.{digits}f}-{high:.{digits}f}"


def _machines(name: str) -> dict[str, Report]:
    """Return the reports of a measurement by the letter of its machine, of the machines that have one."""
    found = {letter: read(f"{name}_2core_{end}") for end, letter in MACHINES.items()}
    return {letter: report for letter, report in found.items() if report is not None}


def _machine_table() -> str:
    rows = []
    for letter, run in sorted(_machines("train_smollm2").items()):
        machine = run["machine"]
        text = "{cpu} | {cores} | {isa_tlf} | {memory_bytes:GiB} | {torch}"
        peak = f"{run['gemm_peak_flops_per_s'] / 1e12:.2g} TFLOP/s"
        rows.append([letter, *fill(text, machine).split(" | "), peak])
    return grid(["machine", "processor", "cores", "our kernels", "memory", "torch", "best bf16 product of torch"], rows)


def _train_table() -> str:
    rows = []
    for mode in MODES:
        for letter, run in _machines(f"train_smollm2_{mode.file}".rstrip("_")).items():
            ours, peer, text = run["ours"], run["peer"], "{median_s:.2f} s ({min_s:.2f}-{max_s:.2f})"
            rows.append(
                [
                    mode.title,
                    letter,
                    f"{ours['samples_per_s']:.2f}, {peer['samples_per_s']:.2f}",
                    f"{times(run['ratio'])} ({_range(run['spread'])})",
                    fill(text, ours["step"]),
                    f"{ours['peak_rss_bytes'] / 2**30:.1f}, {peer['peak_rss_bytes'] / 2**30:.1f} GiB",
                    f"{run['mfu']:.0%}",
                ]
            )
    columns = ["step", "machine", "samples/s: ours, peer", "speed-up (range by round)", "our step (range)"]
    return grid([*columns, "peak memory: ours, peer", "of torch's best product"], rows)


def _infer_table() -> str:
    rows = []
    for letter, run in _machines("infer").items():
        rates, spread = run["questions_per_s"], run["spread"]
        for key, title in (("many_per_image", "{per_image} questions an image"), ("one_per_image", "1 an image")):
            rate, short = rates[key], key.partition("_")[0]
            row = [letter, fill(title, run["settings"]), f"{rate['ours']:.1f}"]
            for peer in ("batched", "batch1"):
                one = spread[f"{short}_{peer}"]
                row.append(f"{rate[peer]:.2f}: {times(one['ratio'])} ({_range(one)})")
            rows.append(row)
    columns = [
        "machine",
        "600 questions",
        "ours, questions/s",
        "transformers, batches of 8",
        "transformers, one by one",
    ]
    return grid(columns, rows)


def _latency_table() -> str:
    rows = []
    for name, title in (("infer", "bf16"), ("infer_int8", 'ours with `weights="int8"`')):
        for letter, run in _machines(name).items():
            ours, peer = run["latency"]["ours"], run["latency"]["peer"]
            row = [letter, title]
            for part in ("first", "next"):
                mine, theirs = ours[part]["p50_s"], peer[part]["p50_s"]
                row.append(f"{seconds(mine)}, {seconds(theirs)}: {mine / theirs:.2f}x")
            rows.append([*row, _agreement(run)])
    columns = ["machine", "", "time to the first token: ours, transformers", "each further token: ours, transformers"]
    return grid([*columns, "greedy answers equal to its batch of one: ours, its batch of 8"], rows)


def _agreement(run: Report) -> str:
    equal = run["agreement_bf16"]
    count = equal["questions"]
    return ", ".join(f"{round(equal[side] * count)} of {count}" for side in ("ours", "batched_peer"))


def _op_rows() -> dict[tuple[str, str], dict[str, dict[str, Report]]]:
    """Return {(op, shape): {letter of the machine: {pass: row}}}."""
    found: dict[tuple[str, str], dict[str, dict[str, Report]]] = {}
    for letter, run in _machines("ops").items():
        for row in run["rows"]:
            machines = found.setdefault((row["op"], row["shape"]), {})
            machines.setdefault(letter, {})[row["pass"]] = row
    return dict(sorted(found.items()))


def _ops_table() -> str:
    """Every op and shape against whatever was fastest beside it."""
    rows = []
    for (op, shape), machines in _op_rows().items():
        for kind in ("forward", "forward+backward"):
            measured = [machines.get(letter, {}).get(kind) for letter in MACHINES.values()]
            if any(measured):
                rows.append([f"`{op}`", shape, kind, *(_strongest(row) for row in measured)])
    return grid(["op", "shape", "pass", *(f"on {letter}" for letter in MACHINES.values())], rows)


def _strongest(row: Report | None) -> str:
    """Return how much faster ours is than the fastest other, and which one that is."""
    if row is None or not row["ratio"]:
        return _ABSENT
    name, one = min(row["ratio"].items(), key=lambda item: item[1]["ratio"])
    return f"{times(one['ratio'])} {name}"


CHOSEN = (
    ("packed_attention", "T=4096 S=11x374 H=9/3 Dh=64", "torch sdpa, per segment"),
    ("packed_attention", "T=4096 S=11x374 H=9/3 Dh=64", "torch sdpa, padded batch"),
    ("packed_attention", "T=4096 S=11x374 H=9/3 Dh=64", "torch sdpa, block mask"),
    ("linear_cross_entropy", "T=4096 D=576 V=49152 supervised=205", "torch, full logits"),
    ("linear_cross_entropy", "T=4096 D=576 V=49152 supervised=205", "torch, supervised rows"),
    ("linear_cross_entropy", "T=4096 D=576 V=256000 supervised=205", "torch, full logits"),
    ("linear_cross_entropy", "T=4096 D=576 V=256000 supervised=205", "torch, supervised rows"),
    ("linear_cross_entropy", "T=4096 D=576 V=49152 supervised=4096", "torch, full logits"),
    ("splice", "T=4096 D=576 V=49152 R=2156", "torch"),
    ("lora_linear", "N=4096 K=576 O=1536 R=128 p=0.0", "peft"),
    ("lora_linear", "N=4096 K=576 O=1536 R=128 p=0.05", "peft"),
    ("lora_linear", "N=4096 K=576 O=1536 R=16 p=0.05", "peft"),
    ("linear_nf4", "N=1 K=2048 O=5632", "bitsandbytes, repacked"),
    ("linear_nf4", "N=16 K=2048 O=5632", "bitsandbytes, repacked"),
    ("linear_nf4", "N=512 K=2048 O=5632", "bitsandbytes"),
    ("connector_mlp", "N=1568 K=768 D=576", "torch"),
    ("adamw", "49152x576", "torch, four passes"),
    ("decode_attention", "S=1 keys=240 H=9 Hkv=3", "torch"),
    ("decode_attention", "S=32 keys=240 H=9 Hkv=3", "torch"),
    ("decode_linear", "N=1 K=576 O=1536, 64 layers", "torch"),
    ("decode_linear", "N=16 K=576 O=1536, 64 layers", "torch"),
)
"""(op, shape, against what): rows of the short table."""


def _chosen_ops_table() -> str:
    rows, measured = [], _op_rows()
    for op, shape, peer in CHOSEN:
        machines = measured.get((op, shape), {})
        cells = [_against(machines.get(letter, {}), peer) for letter in MACHINES.values()]
        rows.append([f"`{op}`", shape, peer, *cells])
    return grid(["op", "shape", "against", *(f"on {letter}" for letter in MACHINES.values())], rows)


def _against(passes: Mapping[str, Report], peer: str) -> str:
    """Return the speed-ups over a peer: forward, and forward with backward where both were timed."""
    found = [passes[kind]["ratio"].get(peer) for kind in ("forward", "forward+backward") if kind in passes]
    return ", ".join(times(one["ratio"]) for one in found if one) or _ABSENT


def _packing_table() -> str:
    run = read("packing") or {"rows": []}
    columns = {
        "tokens an image": "{image_tokens}",
        "tokens of a pack": "{budget:,}",
        "full": "{efficiency:.1 %}",
        "padded batches of 8 are full": "{padded_efficiency:.1 %}",
        "planning 665,000 records": "{seconds:.2f} s",
    }
    return grid(list(columns), [[fill(text, row) for text in columns.values()] for row in run["rows"]])


def _parity_table() -> str:
    rows = []
    for name, title in (("easy_vqa", "`configs/easy_vqa.yaml`"), ("smollm2", "SmolLM2-135M + SigLIP-B/16")):
        for letter, run in _machines(f"parity_{name}").items():
            text = "{settings[steps]} steps, {settings[dtype]}, {settings[seeds]} seeds | {gap:.4f} | {noise:.3f}"
            rows.append([title, letter, *fill(text, run).split(" | ")])
    return grid(["model", "machine", "run", "gap to a plain float32 loop", "difference between seeds"], rows)


def _summary_table() -> str:
    """Four rows of the README."""
    shown = ("B", "C")
    train, lora, infer = (_machines(n) for n in ("train_smollm2", "train_smollm2_lora128", "infer"))
    lines: list[tuple[str, str, Callable[[str], str]]] = [
        ("finetuning step, bf16", "transformers + HF Trainer", lambda m: _speed(train[m])),
        ("LoRA step, r = 128", "the same, with peft", lambda m: _speed(lora[m])),
        ("600 questions, 10 an image", "`generate`, batches of 8", lambda m: _rate(infer[m])),
        ("one request: first token; each further one", "`generate`", lambda m: _waits(infer[m])),
    ]
    rows = [[title, peer, *(cell(letter) for letter in shown)] for title, peer, cell in lines]
    return grid(["SmolLM2-135M + SigLIP-B/16", "against", "Intel Xeon, AMX", "AMD EPYC, Zen 5"], rows)


def _speed(run: Report) -> str:
    return f"**{times(run['ratio'])}** ({_range(run['spread'])}), {run['rss_ratio']:.2f}x its memory"


def _rate(run: Report) -> str:
    spread = run["spread"]["many_batched"]
    return f"**{spread['ratio']:.1f}x** ({spread['min']:.1f}-{spread['max']:.1f})"


def _waits(run: Report) -> str:
    return f"{run['ttft_ratio']:.2f}x; {run['per_token_ratio']:.2f}x its time"


def _fit_table() -> str:
    run = read("fit_tinyllama_2core_avx512bf16")
    return _ABSENT if run is None else fit.table(run).partition("\n\n")[2].strip()


TABLES: dict[str, Callable[[], str]] = {
    "machines": _machine_table,
    "summary": _summary_table,
    "train": _train_table,
    "infer": _infer_table,
    "latency": _latency_table,
    "ops": _chosen_ops_table,
    "ops-all": _ops_table,
    "packing": _packing_table,
    "parity": _parity_table,
    "fit": _fit_table,
}
"""Each table by its name; a new one is a function here and a place on a page."""
