from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.data.images import load_image, to_pixels
from tinyllava_fast.data.split import Split
from tinyllava_fast.data.templates.base import TEMPLATES
from tinyllava_fast.errors import DataError, UserError


@pytest.mark.parametrize("turns", ["conversation", "independent"])
def test_every_record_is_in_exactly_one_pack(make, turns):
    dataset = make(turns=turns)
    assert len(dataset) == 24
    for epoch in range(3):
        plan = dataset.plan(epoch)
        assert sorted(np.concatenate(plan).tolist()) == list(range(24))
        for pack in plan:
            assert dataset.lengths[pack].sum() <= 600
            assert dataset.images[pack].sum() <= 5 and dataset.segments[pack].sum() <= 24


def test_the_order_of_packs_has_no_trend_of_length(make, talk):
    """Packing fills the longest samples it sees first and leaves the shortest for the end."""
    rows = [talk("q", "word " * int(n)) for n in np.random.default_rng(0).lognormal(3, 1, 600).clip(1, 150)]
    dataset = make(rows, max_segments=64, lookahead=64)
    for epoch in range(3):
        counts = np.array([len(pack) for pack in dataset.plan(epoch)])
        assert len(counts) > 50
        places = np.arange(len(counts))
        assert abs(np.corrcoef(places, counts)[0, 1]) < 0.3
        assert counts[-3:].max() < counts.max()  # the packs of what was left are not the last ones


def test_the_plan_is_a_function_of_seed_and_epoch(make):
    def plan(seed, epoch, first=None):
        dataset = make(seed=seed)
        if first is not None:
            dataset.plan(first)
        return [p.tolist() for p in dataset.plan(epoch)]

    assert plan(0, 1) == plan(0, 1, first=0) == plan(0, 1, first=5)
    assert plan(0, 1) != plan(0, 0) and plan(0, 1) != plan(1, 1)


@pytest.mark.parametrize("turns", ["conversation", "independent"])
def test_packs_hold_what_the_template_says(make, folder, tokenizer, processor, turns):
    dataset = make(turns=turns, image_multiple=2)
    rows = json.loads((folder / "data.json").read_text())
    template = TEMPLATES.get("llama")
    for pack in dataset.plan(0):
        batch = dataset.pack(0, pack)
        assert batch.sample_ids == [f"r{i}" for i in pack] and batch.num_samples == len(pack)
        assert batch.num_tokens == dataset.lengths[pack].sum() == batch.cu_seqlens[-1]
        samples = template.encode([rows[i]["conversations"] for i in pack], tokenizer, turns)
        learnt = [label for sample in samples for s in sample for label in s.labels() if label != -100]
        assert batch.labels[batch.labels != -100].tolist() == learnt
        pictures = [load_image(folder / "images" / rows[i]["image"]) for i in pack if "image" in rows[i]]
        count = len(pictures)
        assert count == dataset.images[pack].sum()
        assert batch.pixel_values.shape[0] == count + count % 2
        assert torch.equal(batch.pixel_values[:count], to_pixels(pictures, processor))
        assert batch.image_slots.shape == (4 * (count + count % 2),)
        assert (batch.input_ids[batch.image_slots[: 4 * count]] == 0).all()


def test_report(make, talk, folder):
    dataset = make()
    assert dataset.report.as_dict() == {
        "records": 24,
        "text_only": 8,
        "tokens": int(dataset.lengths.sum()),
        "supervised_tokens": sum(dataset.pack(0, p).num_supervised for p in dataset.plan(0)),
        "unsupervised": 0,
        "truncated": 0,
        "across": 0,
    }
    # Reference masks reject a question with a separator: the sample stays, and is counted.
    dataset = make([talk("say ASSISTANT: x", "a"), talk("q", "a")], masks="reference")
    assert (len(dataset), dataset.report.unsupervised, dataset.report.records) == (2, 1, 2)
    assert make([talk("say ASSISTANT: x", "a")]).report.unsupervised == 0


def test_one_image_for_every_marker_of_a_record(make, talk):
    dataset = make([talk("<image>\na?", "x", "<image>\nb?", "y", image="1.png")])
    batch = dataset.pack(0, [0])
    assert dataset.images.tolist() == [2]
    assert torch.equal(batch.pixel_values[0], batch.pixel_values[1])


def test_pad_mode_reaches_the_pixels(make):
    square, pad = (make(image_mode=mode).pack(0, [1]).pixel_values for mode in ("square", "pad"))
    assert square.shape == pad.shape and not torch.equal(square, pad)


def test_augmentation_depends_on_seed_epoch_and_record_alone(make):
    noisy = AugmentConfig(shift=0.5, rotate=90, scale=0.5)
    dataset = make(augment=noisy, on_bad_image="skip")
    one = dataset.pack(3, [4, 1]).pixel_values
    assert torch.equal(one[1], dataset.pack(3, [1]).pixel_values[0])
    assert torch.equal(one[1], make(augment=noisy).pack(3, [1]).pixel_values[0])
    assert not torch.equal(one, make().pack(3, [4, 1]).pixel_values)


def test_truncation(make, talk):
    long = [talk("q", "word " * 500), talk("<image>\nwhat?", "yes", image="1.png")]
    with pytest.raises(DataError, match=r"data.json: record 0 .*conversations: \d+ tokens exceed batch.tokens=100"):
        make(long, tokens=100)
    dataset = make(long, tokens=100, overlong="truncate")
    assert dataset.lengths[0] == 100 and dataset.report.truncated == 1
    assert dataset.pack(0, [0]).num_tokens == 100
    with pytest.raises(DataError, match=r"conversations: \d+ tokens exceed data.max_tokens=80; raise data.max_tokens"):
        make(long, tokens=100, max_tokens=80)
    dataset = make(long, tokens=100, overlong="truncate", max_tokens=80)
    assert dataset.lengths[0] == 80 and dataset.lengths[1] < 80 and dataset.batch.tokens == 100
    assert list(make(long, tokens=100, overlong="truncate", max_tokens=999).lengths) == [100, dataset.lengths[1]]


def errors(talk):
    picture = {"image": "1.png"}
    yield [talk("<image>\nq", "a")], {}, r"record 0 \(id '0', line 1\): conversations: a question contains <image>"
    yield [talk("q", "a", **picture)], {}, "names an image but no question contains <image>"
    yield [talk("q", "a"), talk("q", "the <image>", id="x")], {}, r"record 1 \(id 'x', line 1\): .*own '<image>'"
    yield [talk("q", "b ASSISTANT: c")], {}, "answer 0 contains the template's own ' ASSISTANT: '"
    yield [talk("q", "b</s>")], {}, "answer 0 contains the template's own '</s>'"
    yield [talk("q", "b")], {"template": "pretrain"}, "names no image, which this template needs"
    yield [talk("<image>q", "a", **picture)], {"tokens_per_image": 600}, "600 image tokens do not fit batch.tokens=600"
    two = talk("<image>q", "a", "<image>q", "b", **picture)
    yield [two], {"max_images": 1}, "2 images exceed batch.max_images=1; raise it"
    yield [two], {"turns": "independent", "max_segments": 2}, "3 segments exceed batch.max_segments=2; raise it"
    gone = [talk("<image>q", "a", image=f"gone{i}.png") for i in range(9)]
    yield (
        [*gone, talk("q", "a")],
        {},
        r"(?s)9 records name a missing image file.*record 0 .*gone0.png.*gone4.png does not exist$",
    )


@pytest.mark.parametrize("number", range(10))
def test_errors_name_the_record(make, talk, folder, number):
    rows, settings, message = list(errors(talk))[number]
    with pytest.raises(DataError, match=message) as error:
        make(rows, **settings)
    assert str(error.value).startswith(str(folder / "data.json"))


def test_the_wrong_template_for_a_tokenizer(make):
    with pytest.raises(UserError, match=r"data.template: it ends answers with '<\|endoftext\|>'"):
        make(template="phi")
    with pytest.raises(UserError, match=r"data.template: unknown chat template 'lama'; did you mean 'llama'\?"):
        make(template="lama")


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_bad_images_fail_or_are_skipped(make, folder, content):
    path = folder / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content == "half" else content)
    with pytest.raises(DataError, match=r"(?s)data.json: .*id 'r1'.*: image: .*1.png: .*on_bad_image=skip|skip.*1.png"):
        make().pack(0, [0, 1, 2])
    dataset = make(on_bad_image="skip")
    assert len(dataset.skipped) == (content != "half") and len(dataset) == 24
    batch = dataset.pack(0, [0, 1, 2])
    rest = dataset.pack(0, [0, 2])
    assert batch.sample_ids == ["r0", "r2"] and rest.skipped == []
    assert len(batch.skipped) == 1 and "record id 'r1': image: " in batch.skipped[0]
    assert all(torch.equal(v, rest.tensors()[k]) for k, v in batch.tensors().items())


BAD = {"0": b"", "1": b"<html>403</html>", "2": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}


def test_files_that_are_no_pictures_are_named_together_at_the_start(make, talk, folder):
    rows = [talk("<image>q", "a", image=f"{i}.png", id=f"x{i}") for i in range(16)]
    for number in range(12):
        (folder / "images" / f"{number}.png").write_bytes(BAD.get(str(number), b"%PDF-1.7"))
    for number in (12, 15):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{number}.png")
    with pytest.raises(DataError) as error:
        make(rows)
    first, *lines = str(error.value).splitlines()
    assert first == (
        f"{folder / 'data.json'}: 12 records name an image that cannot be read; replace it, remove its record, or set "
        "data.on_bad_image=skip"
    )
    assert len(lines) == 10
    for number, what in enumerate(("the file is empty", r"a web page \(HTML\)", "git lfs pull", "a PDF document")):
        line = lines[number]
        assert re.search(rf"record {number} \(id 'x{number}', line 1\): image: .*images/{number}.png: .*{what}", line)
    dataset = make(rows, on_bad_image="skip")
    assert len(dataset.skipped) == 12 and "git lfs pull" in dataset.skipped[2]
    batch = dataset.pack(0, range(16))
    assert batch.sample_ids == ["x12", "x13", "x14", "x15"] and batch.skipped == dataset.skipped


def test_missing_and_damaged_files_are_named_together(make, talk, folder):
    (folder / "images" / "1.png").write_bytes(b"")
    rows = [talk("<image>q", "a", image=name) for name in ("1.png", "gone.png", "https://host/cat.png", "2.png")]
    with pytest.raises(DataError) as error:
        make(rows)
    for words in ("2 records name a missing image file", "gone.png does not exist", "1 records name an image that"):
        assert words in str(error.value)
    assert "https://host/cat.png is a URL; pictures are not downloaded" in str(error.value)


@pytest.mark.parametrize("content", ["empty", "half"])
def test_nothing_left_after_skipping_is_refused(make, talk, folder, content):
    for number in (1, 2):
        path = folder / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60] if content == "half" else b"")
    rows = [talk("<image>q", "a", image=f"{i}.png", id=f"x{i}") for i in (1, 2)]
    with pytest.raises(DataError, match=r"data.json: every record was skipped; the first: .*record id 'x1'"):
        make(rows, on_bad_image="skip")
    assert len(make([*rows, talk("q", "a")], on_bad_image="skip").pack(0, [0, 1, 2]).skipped) == 2


def test_orientation_and_background_reach_the_pixels(make, talk, folder):
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 20, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(folder / "images" / "1.png", exif=exif)
    rows = [talk("<image>q", "a", image="1.png")]

    def corners(**keys):
        pixels = make(rows, **keys).pack(0, [0]).pixel_values[0]
        return [[round(v) for v in pixels[:, y, x].tolist()] for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]

    red, white, black = [1, -1, -1], [1, 1, 1], [-1, -1, -1]
    assert corners() == corners(orientation="upright", background="white") == [red, red, white, white]
    assert corners(orientation="stored") == [red, white, red, white]
    assert corners(background="drop") == [red, red, black, black]
    assert corners(orientation="stored", background="drop") == [red, black, red, black]


def test_fingerprint(make, folder, talk):
    base = make().fingerprint
    assert base == make().fingerprint
    others = [
        make(seed=1),
        make(tokens=601),
        make(turns="independent"),
        make(tokens_per_image=5),
        make([talk("q", "a")]),
    ]
    assert len({base, *(d.fingerprint for d in others)}) == 6


def test_turns_per_sample_splits_records_and_loses_no_turn(make, talk):
    rows = [talk("<image>\na?", "1", "b?", "2", "c?", "3", image="1.png", id="r0"), talk("d?", "4", "e?", "5", id="r1")]
    whole, split = make(rows, turns="independent"), make(rows, turns="independent", turns_per_sample=2)
    assert (len(whole), len(split)) == (2, 3)
    assert split.images.tolist() == [1, 1, 0]
    assert split.report.supervised_tokens == whole.report.supervised_tokens
    alone = make([talk("<image>\nc?", "3", image="1.png")], turns="independent")
    assert (
        split.sources[0].store.sample(1)[0].ids == alone.sources[0].store.sample(0)[0].ids
    )  # a later turn brings its image along


def test_turns_per_sample_needs_independent_turns(make):
    with pytest.raises(UserError, match=r"turns_per_sample splits records .* got turns='conversation'"):
        make(turns_per_sample=2)


def test_records_with_images_of_both_sides_are_counted(make, folder, talk, caplog):
    names = sorted(path.name for path in (folder / "images").iterdir())
    held = [name for name in names if Split(0.5, held_out=True).holds(name)]
    kept = [name for name in names if name not in held]
    assert held and kept
    rows = [talk("<image>\n<image>\nq", "a", image=[held[0], kept[0]]), talk("<image>\nq", "a", image=f"./{held[0]}")]
    rows += [talk("<image>\nq", "a", image=name) for name in kept] + [talk(f"q{n}", "a") for n in range(20)]
    sides = [make(rows, split=Split(0.5, side)) for side in (True, False)]
    assert [side.report.across for side in sides] == [1, 1]
    assert sum(map(len, sides)) == len(rows) - 1 and "1 records show images of both sides" in caplog.text
    assert sides[0].report.records - sides[0].report.text_only == 1
