"""The cache of a frozen tower's features: what it may never do, and that the tower then rests."""

import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.conftest import SIGLIP
from tinyllava_fast.config.load import load_run
from tinyllava_fast.data.types import PackedBatch
from tinyllava_fast.errors import UserError
from tinyllava_fast.models.vision.siglip import SiglipTower
from tinyllava_fast.train.features import FeatureCache, digest_tower
from tinyllava_fast.train.loop import train

LIMIT = 2**20


def tower(seed=0, feature_layer=-1):
    built = SiglipTower.from_config(
        dict(SIGLIP), feature_layer=feature_layer, feature_select=None, seed=seed, where="vision"
    )
    return built.requires_grad_(False)


def batch(pixels):
    one = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(one, one, one, one.int(), one, one, pixels)


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def entries(folder):
    return sorted(p for p in folder.glob("??/*"))


def test_found_features_are_those_of_the_tower(tmp_path, images):
    net = tower()
    cache = FeatureCache(tmp_path, net, limit=LIMIT)
    expected = net(images)
    assert torch.equal(cache.attach(batch(images)).pixel_values, expected)
    again = FeatureCache(tmp_path, net, limit=LIMIT)
    net.forward = None  # the second run needs no tower
    assert torch.equal(again.attach(batch(images.flip(0))).pixel_values, expected.flip(0))
    assert (cache.misses, again.hits, again.misses) == (3, 3, 0)
    assert again.attach(batch(images[:0])).pixel_values.shape == (0, *expected.shape[1:])


def test_another_image_tower_layer_or_dtype_is_another_entry(images):
    net = tower()
    base = digest_tower(net)
    others = [tower(seed=1), tower(feature_layer=-2), tower().to(torch.bfloat16)]
    assert len({base, *map(digest_tower, others)}) == 4 and digest_tower(tower()) == base


def test_a_changed_image_is_not_served_stale(tmp_path, images):
    cache = FeatureCache(tmp_path, tower(), limit=LIMIT)
    cache.attach(batch(images))
    images[1, 0, 3, 3] += 1e-3
    torch.testing.assert_close(cache.attach(batch(images)).pixel_values, cache.tower(images))
    assert (cache.hits, cache.misses) == (2, 4)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:200] + b"x" + b[201:], lambda b: b + b"0"]
)
def test_a_damaged_entry_is_computed_again(tmp_path, images, damage, caplog):
    cache = FeatureCache(tmp_path, tower(), limit=LIMIT)
    expected = cache.attach(batch(images)).pixel_values
    path = entries(tmp_path)[0]
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        torch.testing.assert_close(cache.attach(batch(images)).pixel_values, expected)
    assert cache.damaged == 1 and "damaged" in caplog.text


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path, images):
    cache = FeatureCache(tmp_path, tower(), limit=LIMIT)
    cache.attach(batch(images[:1]))
    (first,) = entries(tmp_path)
    size = first.stat().st_size
    os.utime(first, (1, 1))
    stale = first.with_name(".tmp-dead")
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))
    small = FeatureCache(tmp_path, cache.tower, limit=3 * size)
    assert not stale.exists()
    many = torch.randn(9, 3, 16, 16)
    small.attach(batch(many))
    left = entries(tmp_path)
    assert len(left) <= 3 and first not in left and small.key(many[-1]) in [p.name for p in left]


def test_writers_at_once_do_no_harm(tmp_path, images):
    net = tower()
    expected = net(images)
    results = []

    def work():
        cache = FeatureCache(tmp_path, net, limit=3000)  # so small that they evict one another's entries
        results.extend(cache.attach(batch(images)).pixel_values for _ in range(10))
        assert not cache.damaged

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.allclose(r, expected, atol=1e-6) for r in results)


def test_a_second_epoch_and_a_second_run_call_no_tower(tiny_run, losses, monkeypatch, tmp_path):
    monkeypatch.setenv("TLF_CACHE", str(tmp_path / "cache"))
    calls = []
    forward = SiglipTower.forward
    monkeypatch.setattr(SiglipTower, "forward", lambda self, pixels: calls.append(len(pixels)) or forward(self, pixels))
    path = tiny_run(records=10, stages__finetune__recipe={"vision": {"tune": "frozen"}})
    plain = load_run(path, ["output_dir=" + str(tmp_path / "plain")])
    train(plain)
    without, calls[:] = len(calls), []
    cached = [f"stages.{s}.data.feature_cache=0.1" for s in ("pretrain", "finetune")]
    train(load_run(path, cached))
    assert 0 < len(calls) < without / 2  # the second stage finds what the first one made
    ours, expected = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert [o[2] for o in ours] == pytest.approx([e[2] for e in expected], rel=1e-5)
    calls.clear()
    train(load_run(path, [*cached, "output_dir=" + str(tmp_path / "again")]))
    assert not calls and losses(tmp_path / "again") == ours
    pixels = np.asarray(Image.open(tmp_path / "images" / "0.png")).copy()
    Image.fromarray(255 - pixels).save(tmp_path / "images" / "0.png")
    train(load_run(path, [*cached, "output_dir=" + str(tmp_path / "changed")]))
    assert calls and losses(tmp_path / "changed") != ours
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12
    calls.clear()  # the key is of the pixels, and so of how pictures are read
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "images" / "0.png").save(tmp_path / "images" / "0.png", exif=exif)
    turned = [f"stages.{s}.data.orientation=stored" for s in ("pretrain", "finetune")]
    train(load_run(path, [*cached, *turned, "output_dir=" + str(tmp_path / "stored")]))
    assert not calls and losses(tmp_path / "stored") == losses(tmp_path / "changed")
    train(load_run(path, [*cached, "output_dir=" + str(tmp_path / "upright")]))
    assert calls and losses(tmp_path / "upright") != losses(tmp_path / "changed")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.finetune.recipe.vision.tune=full", "the tower trains"),
        ("stages.finetune.data.augment={hflip: 0.5}", "changes images every epoch"),
        ("engine={type: deepspeed, zero_stage: 3}", "ZeRO 3"),
        ("stages.finetune.data.feature_cache=-1", "expected a number of at least 0, got -1"),
    ],
)
def test_where_features_cannot_be_kept(tiny_run, override, message):
    path = tiny_run(stages__finetune__recipe={"vision": {"tune": "frozen"}})
    with pytest.raises(UserError, match=rf"stages(\.finetune|\[1\])\.data\.feature_cache: .*{message}"):
        train(load_run(path, ["stages.finetune.data.feature_cache=1", override]))
