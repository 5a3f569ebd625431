"""The settings of each benchmark, which are its flags at the same time: nothing heavy is imported for ``--help``.

A field made by ``option`` is a flag of `tlf-bench`; the others are for callers. Each class raises UserError, which
names the flag, for values that measure nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, TypeVar

from tinyllava_fast.config.schema import BatchConfig, DataConfig
from tinyllava_fast.errors import UserError, nearest

T = TypeVar("T")
S = TypeVar("S", bound="Settings")

SMOLLM2, TINYLLAMA_1B = (Path(__file__).parent / "workloads" / f"{name}.yaml" for name in ("smollm2", "tinyllama_1b"))
ENGINES = ("ddp", "fsdp")
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("bf16", "autocast", "master", "float32")  # how the peer keeps its weights, see peer.py
_CACHED = "stages.0.data.feature_cache=1"
_FROZEN = "stages.0.recipe.llm.tune=frozen"
MODES: dict[str, tuple[str, ...]] = {  # what is added to the workload; the peer has no features to keep
    "finetune": (),
    "finetune-cached": (_CACHED,),
    "pretrain": (_FROZEN,),
    "pretrain-cached": (_FROZEN, _CACHED),
    "lora": ("stages.0.recipe.llm.tune=lora",),
    "qlora": ("stages.0.recipe.llm.tune=qlora",),
}
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {  # name: mode, what is added to it
    "qlora": ("qlora", ()),
    "lora": ("lora", ()),
    "full, 8-bit AdamW": ("finetune", ("stages.0.optim.type=adamw8bit",)),
    "full, AdamW": ("finetune", ()),
}
PLAN_RECIPES = ("full", "full+tower", "lora", "pretrain")
MOST_GPUS = 1024
SYSTEM_TOKENS = 40  # of text that a record of `tlf-bench packing` has at least, beside an image


def option(
    default: T,
    text: str,
    *,
    flag: str = "",
    metavar: str | None = None,
    parse: Callable[[str], object] | None = None,
    names: Collection[str] = (),
) -> T:
    """Return a dataclass field that is a flag too: a switch for a bool, repeated for a tuple, else one value.

    text: its help, to which the default is added. flag: its name, if not that of the field. parse: the value of a
    text; the default's type where none is given. names: the values that it may have, if not any.
    """
    told = {"help": text, "flag": flag, "metavar": metavar, "parse": parse, "names": names}
    return field(default=default, metadata=told)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of the settings of all benchmarks. A count whose default is at least 1 must be that too."""

    quick_values: ClassVar[Mapping[str, object]] = {}
    """The values that ``--quick`` sets: the least that shows that the command works; its numbers mean nothing."""

    def __post_init__(self) -> None:
        for one in fields(self):
            names = one.metadata.get("names")
            for value in _values(getattr(self, one.name)):
                if names and value not in names:
                    raise UserError(f"{_flag(one)} {value!r}; {nearest(value, names)}")
                if type(value) is int and value < 1 <= min(_values(one.default), default=1):
                    raise UserError(f"{_flag(one)} {value}: at least 1")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags to a parser."""
        for one in fields(cls):
            if "help" not in one.metadata:
                continue
            name, text, parse = _flag(one), one.metadata["help"], one.metadata["parse"]
            if isinstance(one.default, bool):
                text += f" (default {'yes' if one.default else 'no'})"
                switch = argparse.BooleanOptionalAction
                parser.add_argument(name, dest=one.name, default=argparse.SUPPRESS, action=switch, help=text)
                continue
            values = _values(one.default)
            if one.default is not None and parse is None:
                text += f" (default {', '.join(map(str, values))})"
            parser.add_argument(
                name,
                dest=one.name,
                default=argparse.SUPPRESS,
                action="append" if isinstance(one.default, tuple) else "store",
                type=parse or (str if one.default is None else type(values[0])),
                metavar=one.metadata["metavar"] or name[2:].replace("-", "_").upper(),
                help=text,
            )

    @classmethod
    def read(cls: type[S], args: argparse.Namespace) -> S:
        """Return the settings that the flags say."""
        given = {one.name: getattr(args, one.name) for one in fields(cls) if one.name in args}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return cls(**(given | dict(cls.quick_values if getattr(args, "quick", False) else {})))


def _values(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _flag(one: Field[object]) -> str:
    return one.metadata.get("flag") or "--" + one.name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class StepSettings(Settings):
    """The settings that all measurements of training steps have."""

    mode: str = option(
        "finetune",
        "finetune, finetune-cached (our tower's features cached), pretrain (connector only), pretrain-cached, lora "
        "(against peft's), qlora (nf4; against our lora and peft's)",
        names=MODES,
    )
    lora_rank: int = option(128, "rank in lora and qlora; alpha is twice it")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(StepSettings):
    """The settings of `tlf-bench train`."""

    quick_values: ClassVar = {"quick": True}

    rounds: int = option(5, "timed rounds")
    steps: int = option(1, "steps of each competitor in a round")
    warmup: int = option(2, "untimed first steps of each")
    samples: int = option(8, "samples a step")
    peers: tuple[str, ...] = option(
        ("bf16",),
        f"how the peer keeps its weights: {', '.join(PRECISIONS)}; repeat for several peers",
        flag="--peer",
        metavar="WEIGHTS",
        names=PRECISIONS,
    )
    peer_checkpointing: bool = option(False, "the peer recomputes its activations, as TinyLLaVA Factory's scripts set")
    reference: bool = option(True, "after the race, take the losses of the peer in float32")
    quick: bool = False  # GEMM peaks of tiny shapes: MFU then means nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.peers or len(set(self.peers)) < len(self.peers):
            raise UserError(f"--peer {' '.join(self.peers)}: name each peer once")


@dataclass(frozen=True, kw_only=True)
class ScalingSettings(StepSettings):
    """The settings of `tlf-bench scaling`."""

    quick_values: ClassVar = {"samples": 1, "steps": 1, "warmup": 1}

    factors: tuple[int, ...] = option((1, 2, 4), "size of a step in those; repeat", flag="--factor")
    samples: int = option(4, "samples of the smallest step")
    steps: int = option(4, "timed steps of each size")
    warmup: int = option(2, "untimed first steps of each size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.factors, default=0) < 1 or len(set(self.factors)) < max(len(self.factors), 2):
            raise UserError(f"--factor {' '.join(map(str, self.factors))}: name at least two sizes, each once")


@dataclass(frozen=True, kw_only=True)
class RanksSettings(Settings):
    """The settings of `tlf-bench ranks`."""

    quick_values: ClassVar = {"rounds": 1, "steps": 1, "warmup": 1, "tokens": 192, "records": 34}

    engines: tuple[str, ...] = option(("ddp", "fsdp"), "of several processes; repeat", flag="--engine", names=ENGINES)
    processes: int = option(2, "of each engine, which share the cores")
    packs: int = option(2, "of a step, over all processes: a multiple of their number")
    tokens: int = option(2048, "budget of a pack")
    steps: int = option(4, "timed steps of a run")
    warmup: int = option(2, "untimed first steps of a run")
    rounds: int = option(3, "runs of each engine")
    records: int = option(510, "in the mix, one in 17 text alone")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 2 or self.packs % self.processes:
            raise UserError(
                f"--packs {self.packs}: must be a multiple of --processes {self.processes}, which must be at least 2"
            )


@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """The settings of `tlf-bench fit`."""

    quick_values: ClassVar = {"steps": 1}

    recipes: tuple[str, ...] = option(
        tuple(RECIPES), "only this row of the table; repeat", flag="--recipe", names=RECIPES
    )
    samples: tuple[int, ...] = option((1, 3), "samples of a step; repeat, two sizes give the slope")
    steps: int = option(2, "timed steps of each size")
    warmup: int = 1  # untimed: moments are made there
    lora_rank: int = option(128, "rank in lora and qlora")
    limit: int = option(
        0,
        "GiB that a state may take (default: what is available)",
        parse=lambda text: int(float(text) * 2**30),  # in bytes from here on
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.samples)) < 2:
            raise UserError("--samples: two sizes of a step are needed to tell what a token adds")


@dataclass(frozen=True, kw_only=True)
class ParitySettings(Settings):
    """The settings of `tlf-bench parity`."""

    quick_values: ClassVar = {"steps": 2, "samples": 2, "seeds": 2}

    steps: int = option(20, "of each seed")
    samples: int = option(4, "samples a step")
    seeds: int = option(3, "seeds, from 0 on")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 2:
            raise UserError(f"--seeds {self.seeds}: noise from seed to seed needs at least 2")


@dataclass(frozen=True, kw_only=True)
class InferSettings(Settings):
    """The settings of `tlf-bench infer`."""

    quick_values: ClassVar = {
        "questions": 4, "per_image": 2, "peer_questions": 2, "single_questions": 1, "rounds": 1, "requests": 1,
        "new_tokens": 2, "latency_tokens": 3, "quick": True,
    }  # fmt: skip

    questions: int = option(600, "questions that ours answers in a round")
    per_image: int = 10
    peer_questions: int = option(32, "of them for the batched peer")
    single_questions: int = option(8, "of them for the peer of batch 1")
    rounds: int = option(3, "timed rounds")
    requests: int = option(10, "single requests timed for latency")
    new_tokens: int = 16
    latency_tokens: int = 32
    dtype: str = option("bfloat16", "bfloat16 or float32", names=DTYPES)
    weights: str | None = option(None, "of our language model: int8 or nf4 (default: dense, as --dtype)")
    compile: bool = option(False, "compile our decode step")
    agreement: bool = option(True, "compare float32 answers too")
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class OpsSettings(Settings):
    """The settings of `tlf-bench ops`."""

    quick_values: ClassVar = {"quick": True}

    ops: tuple[str, ...] = option((), "only this op; may be repeated", flag="--op", parse=str)  # none: all
    dtype: str = option("bfloat16", "bfloat16 or float32", names=DTYPES)
    rounds: int = option(9, "most timed rounds of a row")
    device: str = option("cpu", "cpu or cuda")
    compile: bool = option(True, "include candidates under torch.compile, which cost minutes of compilation")
    sweep: bool = False  # further sizes, for plots
    quick: bool = False  # tiny shapes, for tests
    hurry: float = 1.0  # the seconds of a row and of a call in it, as a share of the usual ones


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """The settings of `tlf-bench serve`."""

    quick_values: ClassVar = {"clients": 3, "seconds": 2, "questions": 4, "per_image": 2, "new_tokens": 3}

    clients: int = option(200, "clients that ask at the same time, each one question after another")
    seconds: int = option(60, "how long they begin new questions")
    questions: int = option(600, "different questions")
    per_image: int = option(10, "questions about each image")
    new_tokens: int = option(16, "tokens of an answer")
    dtype: str = option("bfloat16", "bfloat16 or float32", names=DTYPES)


@dataclass(frozen=True, kw_only=True)
class PackingSettings(Settings):
    """The settings of `tlf-bench packing`. Raises UserError for values that no plan exists for."""

    quick_values: ClassVar = {"records": 2000}

    records: int = option(665_000, "records of an epoch")
    text_only: float = option(0.06, "share of records without image")
    longest: int = option(2048, "tokens that a record is cut at, its image included")
    budgets: tuple[int, ...] = option((4096, 8448, 16384), "budget of a pack; repeat", flag="--tokens")
    image_tokens: tuple[int, ...] = option((196, 576, 729), "of an image; repeat")
    lookahead: int = option(BatchConfig.lookahead, "records the planner looks at")
    seed: int = option(0, "of the lengths and their order")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text_only <= 1:
            raise UserError(f"--text-only {self.text_only}: a share, from 0 to 1")
        if min(self.budgets) < self.longest:
            raise UserError(f"--tokens {min(self.budgets)}: less than the longest sample of {self.longest} tokens")
        if max(self.image_tokens) + SYSTEM_TOKENS >= self.longest or min(self.image_tokens) < 1:
            raise UserError(f"--image-tokens {self.image_tokens}: an image and {SYSTEM_TOKENS} tokens of text must fit")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """The settings of `tlf-bench plan`. Names of devices and models are those of plan.yaml."""

    gpus: int = option(8, "processes, one a GPU, from 1 to 1,024")
    gpu: str = option("h100", "device: a100, h100, h200, l40s, rtx4090, rtx5090, or cpu, the one measured")
    llm: str = option("phi_2", "language model, as configs/model/llm names it")
    vision: str = option("siglip_so400m_384", "vision tower, as configs/model/vision names it")
    recipe: str = option(
        "full", f"what trains: {', '.join(PLAN_RECIPES)} (pretrain: the connector)", names=PLAN_RECIPES
    )
    lora_rank: int = option(128, "rank in lora")
    engine: str = option("all", "only this one: torch, ddp, fsdp, zero1, zero2, zero3, zero2-offload, zero3-offload")
    tokens: int = option(8448, "tokens of a pack")
    samples: int = option(8, "samples of a pack, each with one image")
    packs: int = option(1, "packs that each GPU takes in a step")
    node_gbps: float | None = option(
        None, "Gb/s between nodes, all ports of one together (default: the device's)", parse=float
    )
    per_node: int | None = option(None, "GPUs of a node (default: the device's)", parse=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus > MOST_GPUS:
            raise UserError(
                f"--gpus {self.gpus}: at most {MOST_GPUS:,}, beyond which nothing here has been thought about"
            )
        for name, value in (("--node-gbps", self.node_gbps), ("--per-node", self.per_node)):
            if value is not None and not 0 < value < 1e6:
                raise UserError(f"{name} {value}: a number above 0")


@dataclass(frozen=True, kw_only=True)
class PlanCheckSettings(Settings):
    """The settings of `tlf-bench plan-check`. shrunk: overrides of its workload. lengths: of a pack's samples."""

    quick_values: ClassVar = {
        "steps": 1, "processes": (2,), "lengths": (40, 30),
        "shrunk": (
            "model.llm.config.vocab_size=128", "model.llm.config.hidden_size=64",
            "model.llm.config.num_hidden_layers=2", "model.llm.config.intermediate_size=96",
            "model.vision.config.image_size=32",
        ),
    }  # fmt: skip

    engines: tuple[str, ...] = option(
        ("ddp", "fsdp", "zero2", "zero3"),
        "only this engine; repeat",
        flag="--engine",
        names=("ddp", "fsdp", "zero1", "zero2", "zero3"),
    )
    processes: tuple[int, ...] = option((2, 4), "processes; repeat")
    network: tuple[int, ...] = option((), "Mbit/s of a process's link, a network namespace (root); repeat", parse=int)
    deepspeed: bool = option(False, "DeepSpeed with more than 2 processes too: its start takes longer than its steps")
    steps: int = option(3, "timed steps of each")
    source: Path | None = option(  # noqa: RUF009 a dataclass field
        None, "measure nothing: plan again for what this report holds", flag="--from", metavar="FILE", parse=Path
    )
    lengths: tuple[int, ...] = (160, 120, 104)
    shrunk: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.processes or min(self.processes) < 2:
            raise UserError(f"--processes {' '.join(map(str, self.processes))}: at least 2")


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Settings):
    """The settings of `tlf-bench stream`."""

    quick_values: ClassVar = {"records": 2000, "shards": 4, "shuffle_buffer": 256}

    records: int = option(1_000_000, "records of the set")
    shards: int = option(64, "files that they are in")
    form: str = option("jsonl", "jsonl (text alone) or tar (WebDataset, a tiny picture each)", names=("jsonl", "tar"))
    workers: int = option(1, "processes that build packs; another reads, and half as many tokenize for it")
    shuffle_buffer: int = option(DataConfig.shuffle_buffer, "records that are shuffled and packed together")
    tokens: int = option(8448, "budget of a pack")
    seed: int = option(0, "of the records")
