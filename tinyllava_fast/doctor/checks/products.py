"""torch's own matrix products: that they are right, and how fast."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tinyllava_fast import hardware
from tinyllava_fast.bench import report
from tinyllava_fast.bench.machine import DTYPES
from tinyllava_fast.doctor.finding import CHECKS, Finding, fault, note, ok

_SHAPE = (1024, 1024, 1024)  # large enough for the peak, and done in a moment
# Of a sum of 512 products of standard normals, 23 in size: the rounding of the result, and of float32 sums.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.5}


@CHECKS.register("products")
def products() -> Iterator[Finding]:
    """Each dtype that models are trained in, on the CPU and, if there is one, on the GPU."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        rates = {}
        for name, dtype in DTYPES.items():
            error = product_error(dtype, device)
            if not error <= _ALLOWED[name]:
                yield fault(
                    f"torch's {name} product on {device} is wrong by {error:.3g}",
                    "install another torch (constraints.txt names one that is tested), and report this to torch",
                    device=device, dtype=name, error=error,
                )  # fmt: skip
            rate = max(hardware.gemm_rates(dtype, device, shapes=(_SHAPE,), rounds=3, min_seconds=0.03).values())
            rates[name] = rate
        said = ", ".join(f"{name} {report.quantity(rate, 'FLOP/s')}" for name, rate in rates.items())
        yield ok(f"products on {device}: {said}", device=device, flops_per_s=rates)
        if rates["bfloat16"] < 0.7 * rates["float32"]:
            yield note(
                f"bfloat16 is slower than float32 on {device}: no instructions for it, or torch does not use them",
                "train with engine.dtype=float32 here",
            )


def product_error(dtype: torch.dtype, device: str) -> float:
    """Return the largest error of torch's linear layer in the dtype, against the same inputs in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 512, generator=generator).to(dtype) for rows in (64, 96))
    exact = torch.nn.functional.linear(x.double(), weight.double())
    got = torch.nn.functional.linear(x.to(device), weight.to(device)).cpu().double()
    return float((got - exact).abs().nan_to_num(nan=torch.inf).max())
