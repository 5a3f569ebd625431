"""What each row of each connector reads, and where the tokens of each tower lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.test_parts import KINDS, TOWERS, config_of
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.build import build_model
from tinyllava_fast.models.connectors.base import CONNECTORS, Connector
from tinyllava_fast.models.connectors.resampler import ResamplerConnector


def make(name: str) -> Connector:
    cls = CONNECTORS.get(name)
    made = cls(32, 32, cls.Options(**cls.tiny())).eval()
    made.reset(torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("name", KINDS)
def test_rows_read_shares_of_the_tokens_that_change_them(name: str) -> None:
    connector = make(name)
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reads = connector.reads(features)
        assert reads.shape == (2, connector.num_tokens(16), 16)
        torch.testing.assert_close(reads.sum(-1), torch.ones(reads.shape[:2]))
        changed = features.clone()
        changed[:, 5] += 1
        moved = (connector(changed) - connector(features)).abs().amax(-1) > 1e-6
    assert torch.equal(moved, reads[..., 5] > 0)


def test_a_connector_that_says_nothing_is_asked_by_its_gradient() -> None:
    connector = make("pixel_shuffle")
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    said, found = connector.reads(features), Connector.reads(connector, features)
    assert torch.equal(said > 0, found > 0)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))


def test_resampler_weights_are_those_of_its_attention() -> None:
    connector = make("resampler")
    assert isinstance(connector, ResamplerConnector)
    attention = connector.layers[0][0]
    media, latents = torch.randn(2, 5, 32), torch.randn(2, 3, 32)

    def by_hand(weights: Tensor) -> Tensor:
        joined = torch.cat([attention.norm_media(media), attention.norm_latents(latents)], 1)
        values = attention.to_kv(joined).chunk(2, -1)[1].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        return attention.to_out((weights @ values).transpose(1, 2).flatten(2))

    torch.testing.assert_close(by_hand(attention.weights(media, latents)), attention(media, latents))


@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_changed_patch_changes_its_own_token_most(tower: str, select: str) -> None:
    lmm = build_model(config_of(tower, "mlp", feature_select=select, feature_layer=0), seed=1)
    numbers = lmm.vision.patch_numbers
    assert len(numbers) == lmm.vision.num_tokens
    side = int((max(numbers) + 1) ** 0.5)
    size = lmm.image_size // side
    pixels = torch.zeros(1, 3, lmm.image_size, lmm.image_size)
    for patch in (1, side * side - 1):
        other, (y, x) = pixels.clone(), divmod(patch, side)
        other[:, :, y * size : (y + 1) * size, x * size : (x + 1) * size] = 1
        with torch.no_grad():
            moved = (lmm.vision(other) - lmm.vision(pixels))[0].abs().sum(-1)
        assert moved.nonzero()[:, 0].tolist() == [numbers.index(patch)]


def test_a_tower_without_a_grid_is_refused() -> None:
    lmm = build_model(config_of("clip", "mlp"), seed=1)
    lmm.vision.num_tokens = 7
    with pytest.raises(UserError, match="7 tokens, which are no square grid"):
        _ = super(type(lmm.vision).__mro__[1], lmm.vision).patch_numbers
