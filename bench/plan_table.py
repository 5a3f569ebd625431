"""The plan of `tlf-bench plan` as a person reads it: a table, a recommendation, and what the numbers stand on."""

from __future__ import annotations

from collections.abc import Iterator

from tinyllava_fast.bench import report
from tinyllava_fast.bench.plan import ENGINES
from tinyllava_fast.bench.report import Report


def show(result: Report) -> None:
    """Print the plan as a table, and what follows from it."""
    rows, work, device = result["rows"], result["work"], result["device"]
    title = (
        "PREDICTED, nothing ran: {settings[gpus]} x {device[title]}, {settings[llm]} + {settings[vision]}, "
        "{settings[recipe]}: {learnt:.2f} of {parameters:.2f} B weights learn; {settings[packs]} pack(s) of "
        "{work[tokens]:,} tokens a GPU and step"
    )
    billions = {name: work[name] / 1e9 for name in ("learnt", "parameters")}
    columns = {
        "engine": "{engine}",
        "recompute": "{again}",
        "memory a GPU": "{need:GiB}",
        "fits": "{answer}",
        "sent a step": "{wire_bytes:B}",
        "step": "{step_s:time}",
        "of it links": "{waits:time}",
        "update": "{seconds[update]:time}",
        "efficiency": "{efficiency:.0 %}",
        "MFU": "{mfu:.0 %}",
        "tokens/s, all": "{tokens_per_s:,.0f}",
        "bound by": "{bound}",
    }
    told = [
        {
            **row,
            "engine": ("> " if index == result["best"] else "  ") + row["engine"],
            "again": "yes" if row["checkpointing"] else "no",
            "answer": "yes" if row["fits"] else "NO",
            "waits": row["seconds"]["links"] + row["seconds"]["latency"],
        }
        for index, row in enumerate(rows)
    ]
    report.table(report.fill(title, {**result, **billions}), columns, told)
    facts = [[text] for text in _sentences(result)]
    report.show("", [f"{device['memory'] / 2**30:.0f} GiB, MFU {device['mfu']:.0%} without links"], facts)


def _sentences(result: Report) -> Iterator[str]:
    """Yield the recommendation, what is refused, and what the numbers stand on."""
    rows, index, device, settings = (result[key] for key in ("rows", "best", "device", "settings"))
    if index is None:
        least = min((row["need"] for row in rows), default=0.0)
        yield report.fill(
            "Nothing fits: at least {need:GiB} are needed of {memory:GiB}. Lower --tokens and --samples, take more "
            "GPUs, or --recipe lora",
            {"need": least, "memory": device["memory"]},
        )
    else:
        row = rows[index]
        engine = ENGINES[row["engine"]]
        keys = f"engine.type={engine.type}"
        keys += f" engine.zero_stage={engine.zero_stage}" if engine.type == "deepspeed" else ""
        keys += " engine.offload=true" if engine.offload else ""
        keys += " engine.gradient_checkpointing=true" if row["checkpointing"] else ""
        yield report.fill(
            "Take {keys}: {step_s:time} a step, {efficiency:.0 %} efficient, bound by {bound}",
            {**row, "keys": keys},
        )
    for name, reason in result["refused"].items():
        yield f"{name} is refused: {reason}"
    if device["name"] != "cpu":
        yield (
            "Rates are published or assumed (bench/plan.yaml names each source), not measured: no GPU has run this. "
            f"{device['overlap']:.0%} of a pass hides collectives"
        )
    packs = settings["gpus"] * settings["packs"]
    yield (
        f"A step of all GPUs is {packs:,} pack(s) of {settings['samples']} samples, {packs * settings['samples']:,}; "
        "the paper's finetuning has 128 a step (configs/paper), so set optim.lr for what you take"
    )
    yield "Not in it: waiting for the slowest process, for data, for checkpoints"
