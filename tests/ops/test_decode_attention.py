"""Properties of decode_attention that the registry-wide tests do not check."""

from __future__ import annotations

import pytest
import torch

from tinyllava_fast.ops.decode_attention import decode_attention


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"softcap": float("inf")}, "softcap not infinite, got 0 and inf"),
        ({"softcap": -1.0}, "softcap must not be negative, softcap not infinite, got 0 and"),
        ({"softcap": float("nan")}, "softcap must not be negative, softcap not infinite, got 0 and"),
        ({"scale": 0.0}, "scale must be positive, got 0"),
    ],
)
def test_numbers_are_those_of_packed_attention(numbers: dict[str, float], text: str) -> None:
    q, start = torch.zeros(2, 4, 8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"^decode_attention: .*{text}"):
        decode_attention(q, q[:, :2], q[:, :2], start, start + 1, **numbers)
