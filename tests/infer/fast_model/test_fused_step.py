"""One call a step equals the layers of decoder_layer.py one after the other, hidden states and pool alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import make_engine, make_model
from tinyllava_fast.infer.fast_model.prepare import prepare_model
from tinyllava_fast.infer.fast_model.runner import PackedDecoder
from tinyllava_fast.infer.types import Request, Sampling
from tinyllava_fast.ops._op import force_backend

ROWS = 2600
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 40, "num_key_value_heads": 1},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 18, "tie_word_embeddings": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decoder_of(family: str, dtype: torch.dtype, weights: str | None) -> PackedDecoder:
    lmm = make_model(**FAMILIES[family])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lmm.llm.parameters():
            if parameter.ndim == 1:  # norms and biases that are not their neutral values
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    lmm.to(dtype)
    decoder = PackedDecoder(prepare_model(lmm, weights), ROWS, share_prefix=family not in ("mistral", "qwen2"))
    for tensor in (*decoder.pool.k, *decoder.pool.v):
        tensor.normal_(generator=generator)
    return decoder


def tokens_of(decoder: PackedDecoder, count: int) -> np.ndarray:
    """Ragged sequences side by side; every other one has a prefix where prefixes are shared."""
    rng = np.random.default_rng(count)
    lengths = rng.integers(0, 90, count)
    starts = 60 + np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    tokens = np.zeros((count, 5), dtype=np.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = rng.integers(0, 260, count), starts, lengths
    if decoder._share_prefix:
        tokens[::2, 3:] = (7, 50)
    return tokens


@torch.inference_mode()
def layer_by_layer(decoder: PackedDecoder, tokens: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    k, v = ([t.clone() for t in tensors] for tensors in (decoder.pool.k, decoder.pool.v))
    return decoder._run_step._plain(*decoder._step_tokens(tokens), k, v), [*k, *v]


def check(decoder: PackedDecoder, tokens: np.ndarray) -> Tensor:
    expected, pool = layer_by_layer(decoder, tokens)
    fused = decoder._fused
    assert fused is not None
    got = fused(tokens)
    if got is None:  # more sequences than it takes where a GEMM is faster
        fused(tokens[:1])
        assert fused._plan is not None
        got = fused._plan(tokens)
    for ours, theirs in zip((got, *decoder.pool.k, *decoder.pool.v), (expected, *pool), strict=True):
        if got.dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
        else:  # a rounding that falls the other way is seen by everything after it
            assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()
    return got


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [("float32", None), ("float32", "nf4"), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "nf4")],
)
def test_equals_the_layers(family: str, dtype: str, weights: str | None) -> None:
    decoder = decoder_of(family, DTYPES[dtype], weights)
    for count in (1, 5, 17):
        check(decoder, tokens_of(decoder, count))


def test_angles_grow_with_the_positions() -> None:
    decoder = decoder_of("llama", torch.float32, None)
    check(decoder, np.array([[5, 100, 3, 0, 0], [6, 200, 1500, 10, 80]]))
    assert decoder._fused(np.array([[5, 0, 2300, 0, 0]])) is not None  # type: ignore[misc]
    assert decoder._fused._plan.positions > 2300  # type: ignore[union-attr]


def test_replaced_weights_and_pools_are_seen_and_old_ones_stay_alive() -> None:
    decoder = decoder_of("llama", torch.float32, None)
    tokens = tokens_of(decoder, 4)
    before = check(decoder, tokens)
    layer = decoder.lmm.family.layers(decoder.lmm.llm)[1]
    layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight.data * 2
    layer.down.values = layer.down.values * 0.5
    assert torch.equal(decoder._fused(tokens), before)  # type: ignore[misc]
    decoder._fused.look_again()  # type: ignore[union-attr]
    after = check(decoder, tokens)
    assert not torch.allclose(after, before)
    decoder.pool.v[0] = decoder.pool.v[0] * 3
    decoder._fused.look_again()  # type: ignore[union-attr]
    assert not torch.allclose(check(decoder, tokens), after)


def test_what_it_does_not_know_goes_layer_by_layer(tokenizer: Any) -> None:
    many = Request.ask("why?", sampling=Sampling(max_new_tokens=3))
    for kinds, because in (
        ({"model_type": "phi", "num_key_value_heads": 4}, "does not know the layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "longest sequence"),
    ):
        lmm = make_model(**kinds)
        engine = make_engine(prepare_model(lmm), tokenizer)
        assert len(engine.answers([many])[0].tokens) == 3
        fused = engine._decoder._fused
        assert fused is not None and fused._plan is None and because in str(fused._why_not())
    decoder = decoder_of("llama", torch.float32, None)
    with force_backend("reference"):
        assert decoder._fused(tokens_of(decoder, 1)) is None  # type: ignore[misc]
    decoder._fused.look_again()  # type: ignore[union-attr]
    assert decoder._fused(tokens_of(decoder, 17)) is None  # type: ignore[misc] # torch's GEMM is faster
