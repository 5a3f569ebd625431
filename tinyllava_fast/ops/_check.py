"""Checks of tensors for every ``_check``; the text names the op, the argument and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect(
    op: str,
    name: str,
    tensor: Tensor,
    dims: str,
    dtypes: tuple[torch.dtype, ...],
    like: Tensor | None = None,
) -> None:
    """Raise ValueError unless the tensor has as many dimensions as ``dims`` names ("T D") and one of the dtypes.

    like: a tensor whose device it must share.
    """
    if tensor.dim() != len(dims.split()):
        raise ValueError(f"{op}: {name} must be [{', '.join(dims.split())}], got shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors are on {like.device}")


def expect_range(op: str, name: str, values: Tensor, low: int, high: int, what: str) -> None:
    """Raise ValueError naming the first value outside low..high (inclusive). Reads the values: CPU tensors only.

    what: the remedy or the meaning of the bounds, ends the sentence.
    """
    if values.numel() == 0:
        return
    least, most = torch.aminmax(values)
    if int(least) >= low and int(most) <= high:
        return
    where = int(((values < low) | (values > high)).nonzero()[0, 0])
    raise ValueError(f"{op}: {name}[{where}] is {int(values[where])}, outside {low}..{high}: {what}")
