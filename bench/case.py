"""The cases of the op benchmark: one op on one shape, ours next to everything else that computes the same.

A file of ``bench/suite/`` registers a function under an op's name; it yields that op's cases, and nothing else changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from tinyllava_fast.registry import Registry

FORWARD, BOTH = "forward", "forward+backward"
Run = Callable[[], Tensor]
Candidate = Run | str
"""A text is the reason why a peer cannot take part."""


@dataclass(frozen=True)
class Work:
    """The least that a pass must do: floating-point operations, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Case:
    """One op on one shape: candidates that return the same tensor, and the leaves that receive gradients."""

    op: str
    label: str  # the shape; op and label together name a row
    candidates: Mapping[str, Candidate]  # "ours" among them
    work: Mapping[str, Work]  # of each pass that is measured, in order
    leaves: tuple[Tensor, ...] = ()
    frozen: tuple[Tensor, ...] = ()  # inputs without a gradient that a backward pass may keep; they exist anyway
    headline: Mapping[str, str] = field(default_factory=dict)  # key of the headline -> the competitor it is about
    memory_headline: Mapping[str, str] = field(default_factory=dict)  # the same for peak extra memory
    axes: Mapping[str, float] = field(default_factory=dict)  # plot -> this case's place on its horizontal axis
    masks: bool = False  # each candidate draws its own dropout mask, so that results differ
    main: bool = True  # False: one of many sizes, timed in fewer rounds

    @property
    def run(self) -> dict[str, Run]:
        """The candidates that take part."""
        return {name: one for name, one in self.candidates.items() if not isinstance(one, str)}

    @property
    def absent(self) -> dict[str, str]:
        """The reasons why the others cannot."""
        return {name: one for name, one in self.candidates.items() if isinstance(one, str)}


@dataclass
class Setting:
    """The properties that the cases of a run share. Tensors come from one seeded generator."""

    dtype: torch.dtype
    device: str = "cpu"
    quick: bool = False  # tiny shapes that only show that everything works
    sweep: bool = False  # further sizes, for plots
    compile: bool = True  # include candidates that need Inductor
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def randn(self, *size: int, grad: bool = True) -> Tensor:
        """Return normal numbers of the run's dtype and device."""
        return torch.randn(*size, generator=self.generator).to(self.device, self.dtype).requires_grad_(grad)

    def randint(self, high: int, *size: int) -> Tensor:
        """Return integers of 0..high-1 on the run's device."""
        return torch.randint(0, high, size, generator=self.generator).to(self.device)

    def compiled(self, name: str, run: Callable[..., Tensor]) -> dict[str, Run]:
        """Return {name: the function under Inductor}, empty where the run leaves Inductor out."""
        return {name: torch.compile(run, dynamic=False)} if self.compile else {}


SUITE: Registry[Callable[[Setting], Iterator[Case]]] = Registry("op", "tinyllava_fast.bench.suite")


@dataclass(frozen=True)
class Pack:
    """The pack that the ops are timed on: LLaVA samples of 374 tokens, 196 of them of an image, 4,096 tokens together.

    Widths are those of SmolLM2-135M: 9 query and 3 key heads of 64, hidden size 576, 49,152 words.
    """

    tokens: int = 4096
    sample: int = 374
    image_tokens: int = 196
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    width: int = 576
    vocabulary: int = 49152

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample; the last one is what is left."""
        full, rest = divmod(self.tokens, self.sample)
        return [self.sample] * full + ([rest] if rest else [])

    @property
    def bounds(self) -> list[int]:
        """The positions at which samples begin, and the end."""
        return list(accumulate(self.lengths, initial=0))


TINY = Pack(tokens=32, sample=13, image_tokens=3, heads=4, kv_heads=2, head_dim=8, width=32, vocabulary=101)


def pack_of(setting: Setting, **changes: int) -> Pack:
    """Return the pack of a run, the tiny one for a quick run, where changes do not apply."""
    return TINY if setting.quick else Pack(**changes)


def nbytes(*tensors: Tensor) -> int:
    """Return the bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


def works(flops: float, read: float, written: float, grads: float, *, backward: float = 2.0) -> dict[str, Work]:
    """Return the work of the two passes.

    flops: of the forward pass; backward: how many times that the backward pass takes. read, written: bytes of inputs
    and outputs, both of which the backward pass reads (outputs as their gradients). grads: bytes of gradients.
    """
    forward = read + written
    return {FORWARD: Work(flops, forward), BOTH: Work(flops * (1 + backward), 2 * forward + grads)}


@functools.cache
def lacking(package: str) -> str | None:
    """Return None if the package is installed, else the reason why its candidate is absent."""
    return None if find_spec(package) else f"{package.replace('_', '-')} is not installed"


def gpu_peer(package: str, device: str) -> str | None:
    """Return None if a package that only runs on GPUs can take part, else the reason why not."""
    return lacking(package) or (None if device.startswith("cuda") else "it runs on a GPU only")
