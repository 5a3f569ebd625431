"""One op, one meaning, three speeds.

``define_op`` turns a plain torch function (the reference, and the op's meaning) into the opaque custom op
``tlf::<name>``. At run time, inside the op, the fastest backend that supports the arguments is called:

    triton     kernels/<module>.py, function of the same name      CUDA tensors
    cpp        the ``cpp`` function given here, calling _C         CPU tensors
    reference  the decorated body                                  anything

The choice is invisible to torch.compile, so switching it never recompiles. ``check`` runs in the real and in the
fake kernel: eager and compiled code report the same sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.log import log_once
from tinyllava_fast.ops import _cpp

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
BACKENDS = ("triton", "cpp", "reference")
OPS: dict[str, Op[..., Any]] = {}
_forced: list[str] = []
_unchecked: list[bool] = []
_inlined: list[bool] = []


@dataclass(frozen=True)
class Sample:
    """One case of an op, used by correctness, gradient, opcheck and benchmark runs alike."""

    args: tuple[Any, ...]  # float tensors in float32; the tests cast them to every dtype
    label: str = ""
    differentiable: bool = True
    kept: tuple[int, ...] = ()  # places of float tensors that keep their dtype and receive no gradient


class Context(Protocol):
    """The context that torch hands from an op's forward pass to its backward pass. settings: other than tensors."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    settings: tuple[object, ...]

    def save_for_backward(self, *tensors: object) -> None:
        """Keep tensors, or None, as ``saved_tensors``."""

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Let these outputs have no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Give None, not zeros, for the gradient of an output that was not used, if False."""


@dataclass
class Op(Generic[P, R_co]):
    """A registered op. ``op.op(...)`` calls it through the dispatcher; ``op.reference`` is its meaning."""

    name: str
    module: str  # file stem shared by ops/, kernels/ and csrc/ops/
    reference: Callable[P, R_co]
    check: Callable[..., None]
    check_values: Callable[..., None] | None
    cpp: Callable[..., object] | None
    cpp_supports: Callable[..., str | None]  # None if it can run, else the reason why not
    triton_supports: Callable[..., str | None]
    samples: Callable[..., Iterator[Sample]] | None
    mutates: tuple[int, ...] = ()  # places of the arguments that are written to
    op: CustomOpDef = field(init=False)
    direct: Callable[P, R_co] = field(init=False)  # what op runs; takes no gradient
    chosen: Callable[P, R_co] | None = None  # the backend of all checked calls; ``run`` once two differed

    def infer(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the op past torch's dispatcher, which costs as much as a small op, unless a compiler traces the call."""
        if _inlined:
            return self.reference(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.op(*args, **kwargs)
        if _unchecked and self.chosen is not None:
            return self.chosen(*args, **kwargs)
        return self.direct(*args, **kwargs)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the op through the dispatcher where gradients are recorded, else as ``infer``."""
        return self.op(*args, **kwargs) if torch.is_grad_enabled() else self.infer(*args, **kwargs)

    @functools.cached_property
    def triton(self) -> Callable[..., object] | None:
        """Return the Triton launcher, or None where the kernel file or triton itself is missing."""
        try:
            kernels = importlib.import_module(f"tinyllava_fast.kernels.{self.module}")
        except ModuleNotFoundError:
            return None
        return getattr(kernels, self.name, None)

    def why_not(self, backend: str, args: tuple[object, ...]) -> str | None:
        """Return None if the backend can run these arguments, else the reason."""
        device = _device_of(args)
        if backend == "cpp":
            if self.cpp is None:
                return "it has no C++ kernel"
            if device != "cpu":
                return f"its C++ kernel takes CPU tensors, got {device}"
            return _cpp.load()[1] or self.cpp_supports(*args)
        if backend == "triton":
            if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                return f"its Triton kernel takes CUDA tensors, got {device}"
            return "it has no Triton kernel" if self.triton is None else self.triton_supports(*args)
        return None

    def pick(self, args: tuple[object, ...]) -> Callable[P, R_co]:
        """Return the forced backend, else that of the device, else the reference; say once if it falls back."""
        wanted = backend_wanted()
        if wanted is None:
            wanted = "triton" if _device_of(args) == "cuda" else "cpp"
        reason = self.why_not(wanted, args)
        if reason is not None:
            log_once(f"{self.name}: not running on {wanted} because {reason}; using the torch reference")
            wanted = "reference"
        implementation: Callable[P, R_co] | None = getattr(self, wanted)  # on demand: triton is costly to import
        assert implementation is not None  # noqa: S101 why_not() has just said that it is there
        return implementation


def define_op(
    *,
    module: str,
    check: Callable[..., None],
    fake: Callable[..., object],
    name: str | None = None,
    check_values: Callable[..., None] | None = None,
    cpp: Callable[..., object] | None = None,
    cpp_supports: Callable[..., str | None] = lambda *_: None,
    triton_supports: Callable[..., str | None] = lambda *_: None,
    samples: Callable[..., Iterator[Sample]] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[P, R_co]], Op[P, R_co]]:
    """Register the decorated reference as ``tlf::<name>`` (default: the reference's own name).

    The reference needs full type annotations (they become the schema), positional arguments without defaults (the
    dispatcher drops arguments that equal a default), and may not return an alias of an input. check(*args) raises
    ValueError from shapes and dtypes alone; check_values(*args) does so from the values and runs on CPU tensors only,
    because reading values would stall a GPU. fake(*args) returns empty outputs; cpp takes the same arguments and
    returns the same outputs as the reference. mutates: names of the arguments that the op writes to.
    """

    def wrap(reference: Callable[P, R_co]) -> Op[P, R_co]:
        op_name = name or reference.__name__
        defaults = [p.name for p in inspect.signature(reference).parameters.values() if p.default is not p.empty]
        if defaults:
            raise TypeError(f"op {op_name}: give no defaults in the reference, only in the public function: {defaults}")
        if op_name in OPS:
            raise ValueError(f"op {op_name} is defined twice: {OPS[op_name].module} and {module}")
        places = tuple(list(inspect.signature(reference).parameters).index(argument) for argument in mutates)
        entry = Op(op_name, module, reference, check, check_values, cpp, cpp_supports, triton_supports, samples, places)

        def run(*args: P.args, **kwargs: P.kwargs) -> R_co:
            check(*args, **kwargs)
            if check_values is not None and _device_of(args) == "cpu":
                check_values(*args, **kwargs)
            implementation = entry.pick(args)
            entry.chosen = implementation if entry.chosen in (None, implementation) else run
            return implementation(*args, **kwargs)

        def run_fake(*args: object) -> object:
            check(*args)
            return fake(*args)

        # from the reference, not from run: string annotations are resolved in the globals of the function's own file
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        entry.op = torch.library.custom_op(f"tlf::{op_name}", run, mutates_args=mutates, schema=schema)
        entry.op.register_fake(run_fake)
        entry.direct = run
        OPS[op_name] = entry
        return entry

    return wrap


@contextlib.contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on "triton", "cpp" or "reference" where it can; it says once where it can't."""
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}; {nearest(name, BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Inside the block ``Op.infer`` neither checks its arguments nor looks for a backend.

    Only for calls whose arguments differ from those of earlier, checked ones in nothing but their values.
    """
    _unchecked.append(True)
    try:
        yield
    finally:
        _unchecked.pop()


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Inside the block, where no gradient is recorded, an op is its reference's torch operations, unchecked.

    For tracers whose graphs another engine runs: they may hold no op of ours.
    """
    _inlined.append(True)
    try:
        yield
    finally:
        _inlined.pop()


def is_inlined() -> bool:
    """Return whether ``inlined`` is in force."""
    return bool(_inlined)


def backend_wanted() -> str | None:
    """Return the backend that force_backend() or TLF_BACKEND names; None: the fastest."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("TLF_BACKEND", "auto")
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise UserError(f"TLF_BACKEND={name!r}; {nearest(name, ('auto', *BACKENDS))}")
    return name


def _device_of(args: tuple[object, ...]) -> str:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
    return "cpu"
