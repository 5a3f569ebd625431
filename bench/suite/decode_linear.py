"""decode_linear: the linear layers of token-by-token decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tinyllava_fast.bench.case import SUITE, Case, Setting, pack_of
from tinyllava_fast.bench.suite._layers import layers_case
from tinyllava_fast.ops import linear


@SUITE.register("decode_linear")
def cases(setting: Setting) -> Iterator[Case]:
    """The first projection of SmolLM2-135M's MLP for one row and for sixteen, weights in the run's dtype and int8."""
    outputs = pack_of(setting).width * 8 // 3
    for rows in (3,) if setting.quick else (1, 16):
        for int8 in (False, True):
            yield layers_case(
                "decode_linear", setting, linear, rows=rows, outputs=outputs, layers=64, int8=int8, join=torch.cat
            )
