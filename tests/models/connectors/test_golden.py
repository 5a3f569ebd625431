"""Outputs and gradients of TinyLLaVA Factory's own connectors, from its weights under its names."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.vectors import GOLDEN, load, shared
from tinyllava_fast.models.connectors.base import CONNECTORS

CASES: dict[str, dict[str, object]] = load(GOLDEN / "connectors" / "connectors.json")["connectors"]
BESIDE = ("resampler", "qformer_small")  # the repository: too large for it
OPTIONS: dict[str, dict[str, object]] = {
    "resampler": {"num_queries": 6, "num_layers": 2},
    "qformer_small": {
        "num_queries": 6,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "intermediate_size": 128,
    },
    "qformer_full_formula": {"num_queries": 6},
}


def weights_by_formula(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The note in connectors.json: full-sized weights are drawn from their names instead of being stored."""
    weights = {}
    for key, shape in shapes.items():
        z = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
        if "LayerNorm" in key and key.endswith("weight"):
            z = np.float32(1) + np.float32(0.1) * z
        elif not key.endswith("query_tokens"):
            z = np.float32(0.02) * z
        weights[key] = torch.from_numpy(z)
    return weights


def test_all_vectors_are_here() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str) -> None:
    at = shared(f"connectors/{case}") if case in BESIDE else GOLDEN / "connectors" / case
    facts, io = CASES[case], np.load(at / "io.npz")
    kind = CONNECTORS.get(facts["connector_type"])
    x = torch.from_numpy(
        np.concatenate([io["input_clip"], io["input_dinov2"]], -1) if "input_clip" in io else io["input"]
    )
    connector = kind(x.shape[-1], facts["hidden_size"], kind.Options(**OPTIONS.get(case, {}))).eval()
    file = at / "weights.safetensors"
    stored = load_file(file) if file.exists() else weights_by_formula(facts["keys"])
    state = {k.removeprefix("_connector."): v for k, v in stored.items()}
    connector.load_state_dict(kind.from_reference_names(state))
    out = connector(x)
    tolerance = 1e-4 if case.startswith("qformer") else 1e-5
    np.testing.assert_allclose(out.detach().numpy(), io["output"], rtol=0, atol=tolerance)
    assert out.shape[1] == connector.num_tokens(x.shape[1])

    if not facts["keys"]:
        return
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    expected = {k.removeprefix("_connector."): v for k, v in facts["grad_norms_of_sum_y_times_linspace"].items()}
    # the same mapping applied to one-element tensors carries each norm to our name
    norms = kind.from_reference_names({k: torch.tensor(v, dtype=torch.float64) for k, v in expected.items()})
    found = {k: p.grad.double().norm() for k, p in connector.named_parameters() if p.grad is not None}
    assert found.keys() == norms.keys()
    for key, norm in norms.items():
        # a key's bias has no effect: its gradient is rounding noise
        torch.testing.assert_close(found[key], norm, rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
