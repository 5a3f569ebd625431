"""Every Triton kernel against float64, by the rule of the tests: at most twice the error of torch in that dtype."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllava_fast.bench.case import BOTH, SUITE, Case, Setting
from tinyllava_fast.bench.gpu_job import STEPS, Job
from tinyllava_fast.log import log
from tinyllava_fast.ops import _agreement as agreement
from tinyllava_fast.ops._op import OPS, force_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ITEM_S = 30
NOT_INTERPRETED = ("nf4", "dequantize_nf4")
"""Write bfloat16 whatever they are given, which the interpreter rounds towards zero."""


@STEPS.register("kernels")
def run(job: Job) -> None:
    """Check the samples of the tests, ragged and empty ones among them, then the real shapes of `tlf-bench ops`."""
    _tell_fallbacks(job)
    left_out = NOT_INTERPRETED if job.tiny else ()
    dtypes = ["float32"] if job.tiny else list(DTYPES)
    modules = dict.fromkeys(op.module for op in OPS.values() if op.triton is not None and op.module not in left_out)
    job.each(
        (f"samples of {module}, {dtype}" for module, dtype in itertools.product(modules, dtypes)),
        ITEM_S,
        lambda name: _samples(job, name),
    )
    suite = [name for name in SUITE.names() if _has_kernel(name) and name not in left_out]
    job.each((f"{op}, {dtype}" for op, dtype in itertools.product(suite, dtypes)), ITEM_S, lambda n: _real(job, n))


def _has_kernel(op: str) -> bool:
    return any(one.module == op or one.name == op for one in OPS.values() if one.triton is not None)


def _tell_fallbacks(job: Job) -> None:
    """Tell each op that asked for its Triton kernel and did not get it."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """See logging.Handler."""
            text = record.getMessage()
            if "not running on triton" in text:
                job.tell(f"{text.partition(':')[0]}: reference", why=text)

    log.addHandler(Listener())


def _samples(job: Job, name: str) -> None:
    module, _, dtype = name.removeprefix("samples of ").partition(", ")
    found = [case for case in agreement.cases() if case[0].module == module and case[0].triton is not None]
    wrong: list[str] = []
    count = 0
    for op, sample in found[:2] if job.tiny else found:
        if agreement.runnable(op, sample, DTYPES[dtype], "triton") is None:
            count += 1
            wrong += agreement.disagreements(op, sample, DTYPES[dtype], "triton")
    job.tell(name, ok=not wrong, cases=count, wrong=wrong[:5])


@dataclass
class Rounded(Setting):
    """Numbers that are rounded to another dtype before they take this one: the exact result of rounded inputs."""

    low: torch.dtype = torch.float32

    def randn(self, *size: int, grad: bool = True) -> Tensor:
        """Return the numbers that a Setting of the dtype ``low`` draws, in this one's dtype."""
        drawn = torch.randn(*size, generator=self.generator).to(self.device, self.low)
        return drawn.to(self.dtype).requires_grad_(grad)


def _real(job: Job, name: str) -> None:
    op, _, text = name.partition(", ")
    dtype = DTYPES[text]
    options = {"device": job.device, "quick": job.tiny, "compile": False}
    low, exact = Setting(dtype, **options), Rounded(torch.float64, **options, low=dtype)
    for case, truth in zip(SUITE.get(op)(low), SUITE.get(op)(exact), strict=True):
        for what, error in compare(case, truth, dtype):
            job.tell(
                f"{op} {case.label}, {text}: {what}",
                ok=error.ours <= error.allowed,
                error=error.ours,
                allowed=error.allowed,
            )


def compare(case: Case, truth: Case, dtype: torch.dtype) -> Iterator[tuple[str, agreement.Errors]]:
    """Yield (what, errors) of the result and of each gradient of ours, on the device's kernels."""
    with force_backend("reference"):
        exact, theirs = _results(truth), _results(case)
    with force_backend("triton"):
        ours = _results(case)
    for index, three in enumerate(zip(exact, theirs, ours, strict=True)):
        yield (f"gradient {index}" if index else "result"), agreement.errors(*three, dtype)


def _results(case: Case) -> list[Tensor]:
    if BOTH not in case.work:
        with torch.no_grad():
            return [case.run["ours"]().clone()]
    out = case.run["ours"]()
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return [out.detach(), *torch.autograd.grad(out, case.leaves, incoming)]
