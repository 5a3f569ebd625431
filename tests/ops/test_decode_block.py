"""Agreement of the backends is in test_every_op.py; here: equality with transformers' own functions, and refusals."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tinyllava_fast.ops.decode_block import rms_norm, rotate, silu_gate


def test_equals_transformers() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 16, generator=g)
    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight.data.uniform_(generator=g)
    flat = x.view(30, 16)
    torch.testing.assert_close(rms_norm.infer(flat, norm.weight.detach(), 1e-5), norm(flat).detach())
    angles = torch.randn(5, 8, generator=g).repeat(1, 2)
    q, k = x[:, :4].transpose(0, 1)[None], x[:, 4:].transpose(0, 1)[None]
    expected = torch.cat(apply_rotary_pos_emb(q, k, angles.cos()[None], angles.sin()[None]), 1)[0].transpose(0, 1)
    torch.testing.assert_close(rotate.infer(x, 6, angles.cos(), angles.sin()), expected)


def test_refusals() -> None:
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="gate and up side by side"):
        silu_gate.op(x)
    with pytest.raises(ValueError, match="the weight has 4 entries"):
        rms_norm.op(x, torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="the head size must be even"):
        rotate.op(torch.ones(2, 1, 5), 1, x, x)
    with pytest.raises(ValueError, match="sine is"):
        rotate.op(torch.ones(2, 1, 4), 1, torch.ones(2, 4), torch.ones(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_far_below_zero_is_shut(dtype: torch.dtype) -> None:
    """Beyond 2^127 the exponential of the C++ kernel wrapped: silu(-95) was -95, silu(-89) nan."""
    gate = torch.cat([torch.linspace(-500, 100, 2401), torch.tensor([-3e38, 3e38, torch.nan])]).to(dtype)
    y = silu_gate.infer(torch.stack([gate, torch.ones_like(gate)], 1))[:, 0]
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), atol=1e-6, rtol=2e-2, equal_nan=True)
