"""`tlf-bench predict`: what each kernel and step should take on each GPU, and what then follows. Nothing runs.

A pass of a kernel takes the longer of its least operations at the GPU's rate and its least bytes at the memory's speed
(the work of bench/suite), each at the share of the published number that is assumed to be reached, and a launch. A
training step is `tlf-bench plan`'s. A step of decoding reads the weights and the keys once; its kernels come one after
another, however small they are. All constants are in plan.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tinyllava_fast.bench import cluster, plan, report
from tinyllava_fast.bench.case import SUITE, Setting, Work
from tinyllava_fast.bench.gpu_page import table
from tinyllava_fast.bench.report import Report
from tinyllava_fast.bench.settings import PlanSettings
from tinyllava_fast.errors import UserError

GPUS = ("a100", "h100", "h200", "rtx4090", "rtx5090")
CPU_ONLY = ("pack_plan", "prefill_linear")
"""Ops that plan or run on the host."""
STEPS = {  # name: language model, tower, recipe, tokens, samples
    "SmolLM2-135M + SigLIP-B, full": ("smollm2_135m", "siglip_b16_224", "full", 5984, 16),
    "TinyLlama-1.1B + SigLIP-so400m, full": ("tinyllama_1_1b", "siglip_so400m_384", "full", 8448, 8),
    "Phi-2 + SigLIP-so400m, LoRA 128": ("phi_2", "siglip_so400m_384", "lora", 8448, 8),
}
DECODING = {"SmolLM2-135M": "smollm2_135m", "TinyLlama-1.1B": "tinyllama_1_1b", "Phi-2": "phi_2"}
STREAMS, CONTEXT = (1, 8, 64), 300
"""Sequences that decode together, and tokens that each of them looks back at."""
BEGIN, END = "<!-- written by `tlf-bench predict --page docs/gpu.md` -->", "<!-- end of what it writes -->"

DECISIONS = (
    (
        "packed_attention, forward+backward",
        "within 1.1x of flex_attention and flash-attn",
        "stays the default",
        "that head size goes to the faster one, by a rule in ops/_policy.py",
    ),
    (
        "linear_cross_entropy, forward+backward",
        "at least as fast as Liger's",
        "stays the default",
        "Liger's split of the vocabulary is taken over as a launch setting",
    ),
    (
        "lora_linear, connector_mlp",
        "at least as fast as torch under Inductor",
        "stay the default",
        "on a GPU these ops call torch",
    ),
    (
        "linear_nf4 at 1 and 16 rows",
        "at least as fast as bitsandbytes",
        "decodes nf4 weights",
        "nf4 weights are multiplied by bitsandbytes where it is installed",
    ),
    (
        "training step with CUDA graphs",
        "1.1x faster than compiled",
        "engine.cuda_graphs becomes the default for steps below 100 ms",
        "stays an option",
    ),
    (
        "training step, compiled",
        "repays its compilation within 1,000 steps",
        "compile: auto compiles on a GPU, with these times in place of a CPU's",
        "auto stays eager on a GPU",
    ),
    (
        "losses of 20 steps",
        "within 2 % of the float32 peer's",
        "the docs call GPU training proven",
        "the kernel that the kernels step names is switched off until it is mended",
    ),
    (
        "decoding at 1 and 8 sequences",
        "at least 2x transformers' tokens a second",
        "the docs recommend the engine on a GPU",
        "its step is profiled first: it should be bound by launches",
    ),
    (
        "fsdp and ZeRO-2 in one process",
        "within 1.15x of torch",
        "nothing changes",
        "their hooks are looked at before more GPUs are",
    ),
    (
        "tuned launch settings",
        "3 % faster than sm_80's",
        "kernels/launch.json gets an entry for that architecture",
        "sm_80's serve it",
    ),
)
"""What is measured; what must hold; what follows if it does, and if it does not."""


def benchmark() -> Report:
    """Return {kernels, steps, decoding, decisions}; each row has {gpu: {seconds, bound}} under "gpus"."""
    return {
        "kernels": list(_kernels()),
        "steps": list(_steps()),
        "decoding": list(_decoding()),
        "decisions": [list(one) for one in DECISIONS],
    }


class _Shapes(Setting):
    """Tensors without values: nothing is drawn."""

    def randn(self, *size: int, grad: bool = True) -> Tensor:
        """Return a tensor of that size on the meta device."""
        return torch.empty(*size, device=self.device, dtype=self.dtype, requires_grad=grad)


def _kernels() -> Iterator[Report]:
    for name in SUITE.names():
        if name in CPU_ONLY:
            continue
        for case in SUITE.get(name)(_Shapes(torch.bfloat16, "meta", compile=False)):
            direction = list(case.work)[-1]
            found = {gpu: kernel_seconds(case.work[direction], gpu) for gpu in GPUS}
            yield {"name": f"{name} {case.label}, {direction}", "gpus": found}


def kernel_seconds(work: Work, gpu: str) -> Report:
    """Return {seconds, bound} of a pass on a GPU of plan.yaml; bound: operations, memory, or launch."""
    known, facts = cluster.table(), cluster.table()["devices"][gpu]
    parts = {
        "operations": work.flops / (known["kernel_reached"] * facts["flops_per_s"]),
        "memory": work.bytes / (known["update_reached"] * facts["memory_bytes_per_s"]),
        "launch": float(known["launch_s"]),
    }
    bound = max(parts, key=lambda part: parts[part])
    return {"seconds": max(parts["operations"], parts["memory"]) + parts["launch"], "bound": bound}


def gpu_named(name: str) -> str | None:
    """Return the GPU of GPUS that a device's own name says, None for another: "h200" of "NVIDIA H200"."""
    plain = name.lower().replace(" ", "")
    return next((gpu for gpu in GPUS if gpu in plain), None)


def kernel_rows(gpu: str) -> dict[str, float]:
    """Return {row of `tlf-bench ops`: seconds} for a GPU."""
    return {row["name"]: row["gpus"][gpu]["seconds"] for row in _kernels()}


def _steps() -> Iterator[Report]:
    for name, (llm, vision, recipe, tokens, samples) in STEPS.items():
        work = plan.work_of(PlanSettings(llm=llm, vision=vision, recipe=recipe, tokens=tokens, samples=samples))
        found = {}
        for gpu in GPUS:
            row = plan.predict(work, cluster.read_device(gpu), plan.ENGINES["torch"], 1, 1)
            told = {key: row[key] for key in ("need", "fits", "mfu", "bound")}
            found[gpu] = {"seconds": row["step_s"], **told}
        yield {"name": name, "gpus": found}


def _decoding() -> Iterator[Report]:
    known = cluster.table()
    for title, name in DECODING.items():
        config = known["llm"][name]["config"]
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        kv = config.get("num_key_value_heads", heads) * config["hidden_size"] // heads
        skeleton = plan.work_of(PlanSettings(llm=name, vision="siglip_b16_224")).skeleton.llm
        weights = 2.0 * sum(p.numel() for p in skeleton.parameters())
        for streams in STREAMS:
            work = Work(streams * weights, weights + 2.0 * 2 * streams * CONTEXT * kv * layers)
            found = {gpu: decode_seconds(work, layers, gpu) for gpu in GPUS}
            yield {"name": f"{title}, {streams} sequences", "gpus": found}


def decode_seconds(work: Work, layers: int, gpu: str) -> Report:
    """Return {seconds, bound} of a step of decoding that is one CUDA graph; bound: operations, memory or kernels."""
    known = cluster.table()
    one = kernel_seconds(work, gpu)
    kernels = layers * known["decode_kernels_a_layer"] * known["graph_kernel_s"]
    rest = one["seconds"] - known["launch_s"]
    return {"seconds": rest + kernels, "bound": "kernels" if kernels > rest else one["bound"]}


def tables(result: Report) -> str:
    """Return the three tables and the decisions as Markdown."""
    titles = [cluster.table()["devices"][gpu]["title"] for gpu in GPUS]
    lines: list[str] = []
    texts = {
        "kernels": "### Kernels, bfloat16, milliseconds",
        "steps": "### Training steps, one GPU, milliseconds",
        "decoding": f"### A token of decoding, bfloat16 weights, {CONTEXT} tokens of context, milliseconds",
    }
    for key, title in texts.items():
        rows = [[row["name"], *(_cell(row["gpus"][gpu]) for gpu in GPUS)] for row in result[key]]
        lines += [title, "", *table(["", *titles], rows), ""]
    lines += ["### What each measurement decides", ""]
    lines += table(["measured", "expected", "if so", "if not"], result["decisions"])
    return "\n".join(lines)


def _cell(one: Report) -> str:
    if one.get("fits") is False:
        return f"does not fit ({one['need'] / 2**30:.0f} GiB)"
    text = f"{1e3 * one['seconds']:.3g} ({one['bound']}"
    return text + (f", MFU {one['mfu']:.0%}, {one['need'] / 2**30:.0f} GiB)" if "mfu" in one else ")")


def write_page(result: Report, path: Path) -> None:
    """Put the tables between the marks of a page. UserError for a page without them."""
    report.write_text(page(result, path), path, "--page")


def page(result: Report, path: Path) -> str:
    """Return the page with the tables in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page {path}: cannot read it ({error.strerror}); name a page that has the marks") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--page {path}: it lacks the line {BEGIN if not begin else END!r}; the tables go between both")
    return f"{before}{BEGIN}\n\n{tables(result)}\n\n{END}{after}"


def show(result: Report) -> None:
    """Print the tables."""
    for key in ("kernels", "steps", "decoding"):
        rows = [[row["name"], *(_cell(row["gpus"][gpu]) for gpu in GPUS)] for row in result[key]]
        report.show(f"PREDICTED, nothing ran: {key}, milliseconds", ["", *GPUS], rows)
    report.show("What follows", ["measured", "expected", "if so", "if not"], result["decisions"])
