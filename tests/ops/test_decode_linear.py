from __future__ import annotations

import pytest
import torch

from tinyllava_fast.ops import quantize_int8
from tinyllava_fast.ops.decode_linear import decode_linear_fwd, dequantize_int8, in_huge_pages


def test_int8_rounds_to_the_nearest_step() -> None:
    w = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    w[3] = 0
    held = quantize_int8(w)
    back = dequantize_int8(*held, torch.float32)
    assert held.values.dtype == torch.int8 and int(held.values.abs().max()) == 127
    assert bool(((back - w).abs() <= held.scale[:, None] * 0.5001).all()) and not back[3].any()


def test_refuses_more_rows_than_are_few() -> None:
    with pytest.raises(ValueError, match="17 rows, the kernel takes at most 16"):
        decode_linear_fwd.op(torch.ones(17, 8), torch.ones(4, 8), None, None)
    with pytest.raises(ValueError, match="at most 64"):
        decode_linear_fwd.op(torch.ones(65, 8), torch.ones(4, 8, dtype=torch.int8), torch.ones(4), None)


def test_copies_to_huge_pages() -> None:
    w = torch.randn(16, 64)
    assert torch.equal(in_huge_pages(w), w) and in_huge_pages(w).data_ptr() != w.data_ptr()
