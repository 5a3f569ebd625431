"""Records with lists of images and images in tiles: from the file to the pack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava_fast.config.augment import AugmentConfig
from tinyllava_fast.data.augment import augment
from tinyllava_fast.data.collate import truncate, widen
from tinyllava_fast.data.images import load_image, to_pixels
from tinyllava_fast.data.loader import Loader
from tinyllava_fast.data.records import read_records
from tinyllava_fast.data.templates.base import TEMPLATES, Segment
from tinyllava_fast.data.types import IMAGE_INDEX as IMG
from tinyllava_fast.errors import DataError, UserError

FILES = ["1.png", "2.png", "4.png"]
THREE = ["Compare <image> with <image>.", "red", "And\n<image>?", "blue"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GRID = {"image_mode": "anyres", "image_grid": [(32, 16), (16, 32), (32, 32)]}


@pytest.fixture
def pixels_of(folder, processor):
    """Pixels of the named files, in order."""
    return lambda *names: to_pixels([load_image(folder / "images" / n) for n in names], processor)


@pytest.fixture
def text_of(tokenizer):
    """The text of a segment, markers included."""

    def text(segment):
        parts: list[list[int]] = [[]]
        for token in segment.ids:
            parts.append([]) if token == IMG else parts[-1].append(token)
        return "<image>".join(tokenizer.decode(part) for part in parts)

    return text


def test_both_spellings(tmp_path, talk):
    import json

    rows = [talk(*THREE, image=FILES), talk(*THREE, images=FILES), talk("q", "a", images=[]), talk("q", "a", image=[])]
    rows += [talk("<image>", "a", image=["x.png"]), talk("<image>", "a", image="x.png", images=None)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    records = list(read_records(tmp_path / "d.json"))
    assert [r.images for r in records] == [tuple(FILES)] * 2 + [(), (), ("x.png",), ("x.png",)]
    assert [r.interleaved for r in records] == [True, True, False, False, True, False]


@pytest.mark.parametrize("name", sorted(TEMPLATES.names()))
def test_rendering_of_a_list_and_of_one_image(name, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    template, turns = TEMPLATES.get(name), list(zip(THREE[::2], THREE[1::2], strict=True))
    listed, single = (template.render(turns, tokenizer, flag).text for flag in (True, False))
    if name == "pretrain":
        assert (listed, single) == ("<image><image>red\n<image>blue\n", "<image>red\n<image>blue\n")
    elif name == "tokenizer":
        assert "user: Compare <image> with <image>.</s>" in listed and "user: Compare <image> with .</s>" in single
    else:
        assert "USER: Compare <image> with <image>. ASSISTANT: red" in listed and "USER: And\n<image>? ASS" in listed
        assert "USER: <image>\nCompare  with . ASSISTANT: red" in single and "USER: <image>\nAnd\n? ASS" in single


@pytest.mark.parametrize("name", ["llama", "pretrain", "tokenizer"])
def test_markers_of_a_list_show_its_images_in_order(make, talk, tokenizer, pixels_of, text_of, name, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    dataset = make([talk(*THREE, image=FILES)], template=name)
    [segment] = dataset.sources[0].store.sample(0)
    wanted = {"pretrain": "<image><image>red", "tokenizer": "user: Compare <image> with <image>.</s>"}
    assert wanted.get(name, "USER: Compare <image> with <image>. ASSISTANT: red</s>") in text_of(segment)
    assert dataset.images.tolist() == [3]
    assert torch.equal(dataset.pack(0, [0]).pixel_values, pixels_of(*FILES))


def test_one_image_by_name_is_as_before(make, talk, text_of, pixels_of):
    question = "What <image> is\n<image> this?"
    named = make([talk(question, "a", image="1.png")])
    listed = make([talk("<image>\nq", "a", image=["1.png"])])
    single = make([talk("<image>\nq", "a", image="1.png")])
    assert "USER: <image>\nWhat  is\n this? ASSISTANT" in text_of(named.sources[0].store.sample(0)[0])
    assert named.images.tolist() == [1]
    assert listed.sources[0].store.sample(0) == single.sources[0].store.sample(0)
    assert torch.equal(listed.pack(0, [0]).pixel_values, pixels_of("1.png"))


def test_every_image_has_its_own_draw(make, talk, folder, processor):
    noisy = AugmentConfig(shift=0.5, rotate=90, scale=0.5)
    rows = [
        talk("<image>\nq", "a", image="1.png"),
        talk("<image> <image> <image>", "a", images=["1.png", "1.png", "2.png"]),
    ]
    dataset = make(rows, augment=noisy, seed=5)
    one, two = load_image(folder / "images" / "1.png"), load_image(folder / "images" / "2.png")
    single = [augment(one, noisy, (5, 2, 0))]
    several = [augment(one, noisy, (5, 2, 1)), augment(one, noisy, (5, 2, 1, 1)), augment(two, noisy, (5, 2, 1, 2))]
    found = dataset.pack(2, [0, 1]).pixel_values
    assert torch.equal(found, to_pixels(single + several, processor))
    assert len({bytes(row.numpy().tobytes()) for row in found}) == 4


def errors(talk):
    record = r"data.json: record 0 \(id '0', line 1\): "
    yield [talk(*THREE, image=FILES[:2])], {}, record + "conversations: the record lists 2 images .* hold 3 <image>"
    yield [talk("q", "a", image=FILES)], {}, record + "conversations: the record names an image but no question"
    yield [talk("q", "a", image=FILES)], {"template": "pretrain"}, "lists 3 images but its questions hold 0 <image>"
    yield [talk("q <image>", "a", images=[])], {}, record + "conversations: a question contains <image>"
    yield [talk("q", "a", image="1.png", images=FILES)], {}, record + "images: given beside 'image'; keep one"
    yield [talk("q", "a", images="1.png")], {}, record + r"images: expected a list of paths, got '1.png'"
    yield [talk("q", "a", image=["1.png", ""])], {}, record + r"image\[1\]: expected a path, got ''"
    yield [talk(*THREE, image=["1.png", "no.png", "nor.png"])], {}, r"(?s)2 records name .*record 0 .*no.png.*nor.png"
    yield [talk(*THREE, image=FILES)], {"max_images": 2}, "3 images exceed batch.max_images=2"
    yield [talk(*THREE, image=FILES)], {"tokens_per_image": 300}, r"\d+ tokens exceed batch.tokens=600"
    yield [talk(*THREE, image=FILES)], {"tokens_per_image": 700}, "image: 700 image tokens do not fit"
    yield [talk("<image>q", "a", image="1.png")], {**GRID, "max_images": 2}, "3 images exceed batch.max_images=2"
    yield [talk("<image>q", "a", image="1.png")], {**GRID, "tokens_per_image": 200}, "600 image tokens do not fit"


@pytest.mark.parametrize("number", range(13))
def test_errors_name_record_and_field(make, talk, number):
    rows, settings, message = list(errors(talk))[number]
    with pytest.raises(DataError, match=message):
        make(rows, **settings)


def test_a_grid_needs_anyres(make):
    with pytest.raises(UserError, match=r"data.image_grid is for data.image_mode=anyres only; got image_mode='square'"):
        make(image_grid=[(32, 16)])
    with pytest.raises(UserError, match=r"data.image_grid: \[30, 16\] is no multiple"):
        make(image_mode="anyres", image_grid=[(30, 16)])


# Independent turns


def test_leading_images_are_shared_by_independent_turns(make, talk, tokenizer, pixels_of):
    rows = [talk("<image>\n<image>\nSame?", "no", "Why?", "so", image=FILES[:2])]
    dataset = make(rows, turns="independent")
    prefix, first, second = dataset.sources[0].store.sample(0)
    assert prefix.ids.count(IMG) == 2 and prefix.ids[-1] == IMG and not prefix.spans
    assert first.on_prefix and second.on_prefix and IMG not in first.ids + second.ids
    for segment, question, answer in ((first, "Same?", "no"), (second, "Why?", "so")):
        alone = make([talk(f"<image>\n<image>\n{question}", answer, image=FILES[:2])]).sources[0].store.sample(0)[0]
        assert prefix.ids + segment.ids == alone.ids
        assert prefix.labels() + segment.labels() == alone.labels()
    assert torch.equal(dataset.pack(0, [0]).pixel_values, pixels_of(*FILES[:2]))


def test_a_turn_adds_its_own_image_to_the_shared_ones(make, talk, text_of, pixels_of):
    dataset = make([talk("<image>\nWhat?", "a", "<image>\nAnd now?", "b", image=FILES[:2])], turns="independent")
    prefix, first, second = dataset.sources[0].store.sample(0)
    assert text_of(second).strip() == "<image>\nAnd now? ASSISTANT: b</s>"
    assert [s.ids.count(IMG) for s in (prefix, first, second)] == [1, 0, 1]
    batch = dataset.pack(0, [0])
    assert torch.equal(batch.pixel_values, pixels_of(*FILES[:2]))
    assert batch.prefix[1:3].tolist() == [[0, int(batch.cu_seqlens[1])]] * 2


def test_what_cannot_be_shared_stands_alone(make, talk, pixels_of):
    rows = [talk("First <image> then <image>.", "a", "Why?", "b", "See <image>", "c", image=FILES)]
    dataset = make(rows, turns="independent", max_images=7)
    segments = dataset.sources[0].store.sample(0)
    assert [s.on_prefix for s in segments] == [False] * 3
    assert [s.ids.count(IMG) for s in segments] == [2, 2, 3] and dataset.images.tolist() == [7]
    order = [FILES[i] for i in (0, 1, 0, 1, 0, 1, 2)]
    assert torch.equal(dataset.pack(0, [0]).pixel_values, pixels_of(*order))
    before = talk("<image>\n<image>\nSee <image>", "c", image=FILES)
    assert segments[2] == make([before]).sources[0].store.sample(0)[0]


@pytest.mark.parametrize("most", [1, 2])
def test_records_split_between_turns_keep_their_images(make, talk, most, pixels_of):
    rows = [talk("<image>\nA <image>?", "a", "B?", "b", "C <image>?", "c", image=FILES)]
    whole = make(rows, turns="independent", max_images=9)
    split = make(rows, turns="independent", turns_per_sample=most, max_images=9)
    assert len(split) == 4 - most
    expected = [1 - most + i for i in range(most, 4)]
    assert expected[0] == 1 and split.report.supervised_tokens == whole.report.supervised_tokens
    alone = make([talk("<image>\n<image>\nC <image>?", "c", image=FILES)], turns="independent")
    assert split.sources[0].store.sample(len(split) - 1) == alone.sources[0].store.sample(0)
    assert torch.equal(split.pack(0, [len(split) - 1]).pixel_values, pixels_of(*FILES))


# Bad images


def test_one_bad_image_of_a_list_drops_the_record(make, talk, folder):
    (folder / "images" / "2.png").write_bytes(b"broken")
    rows = [talk("q", "a", id="x"), talk(*THREE, image=FILES, id="y"), talk("<image>q", "a", image="1.png", id="z")]
    with pytest.raises(DataError, match=r"(?s)data.json: .*id 'y'.*: image: .*2.png: truncated or not an image"):
        make(rows).pack(0, [0, 1, 2])
    batch = make(rows, on_bad_image="skip").pack(0, [0, 1, 2])
    rest = make([rows[0], rows[2]]).pack(0, [0, 1])
    assert batch.sample_ids == ["x", "z"] and len(batch.skipped) == 1 and "record id 'y'" in batch.skipped[0]
    assert all(torch.equal(v, rest.tensors()[k]) for k, v in batch.tensors().items())


def test_unreadable_headers_are_never_silent(make, talk, folder):
    (folder / "images" / "2.png").write_bytes(b"broken")
    rows = [talk(*THREE, image=FILES, id="y"), talk("<image>q", "a", image="1.png", id="z")]
    with pytest.raises(DataError, match=r"(?s)data.json: .*id 'y'.*: image: .*2.png: truncated or not an image"):
        make(rows, **GRID)
    dataset = make(rows, **GRID, on_bad_image="skip")
    assert len(dataset) == 1 and dataset.report.records == 1
    loader = Loader(dataset)
    assert [b.sample_ids for b in loader] == [["z"]]
    assert len(loader.skipped) == 1 and "record id 'y'" in next(iter(loader.skipped))
    with pytest.raises(DataError, match=r"data.json: every record was skipped; the first: .*record id 'y'"):
        make(rows[:1], **GRID, on_bad_image="skip")
    with pytest.raises(DataError, match="1 records name a missing image file"):
        make([talk("<image>q", "a", image="gone.png")], **GRID, on_bad_image="skip")


# Tiles


def test_tiles_follow_the_whole_image(make, talk, folder, processor):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    picture = Image.new("RGB", (32, 32))
    for number, colour in enumerate(colours):
        x, y = 16 * (number % 2), 16 * (number // 2)
        picture.paste(colour, (x, y, x + 16, y + 16))
    picture.save(folder / "images" / "four.png")
    Image.new("RGB", (40, 20), (1, 2, 3)).save(folder / "images" / "wide.png")
    rows = [talk("See <image> and <image>!", "yes", image=["wide.png", "four.png"], id="t"), talk("q", "a")]
    dataset = make(rows, **GRID, max_images=8)
    assert dataset.images.tolist() == [3 + 5, 0] and dataset.sources[0].files.grid == GRID["image_grid"]
    batch = dataset.pack(0, [0, 1])
    assert batch.pixel_values.shape == (8, 3, 16, 16)
    means = ((batch.pixel_values[4:].mean((2, 3)) + 1) * 127.5).round().int().tolist()
    assert means == [list(c) for c in colours]
    [sample], _ = dataset.sources[0].sample(0)
    runs = np.flatnonzero(np.array(sample.ids) == IMG)
    assert np.diff(runs)[:2].tolist() == [1, 1] and np.diff(runs)[2] > 1  # three inputs, text, five inputs
    slots = batch.image_slots.reshape(8, 4)
    assert (slots[1:3, 0] - slots[:2, 3]).tolist() == [1, 1]  # flat, one after the other
    square = make(rows, max_images=8)
    assert dataset.lengths[0] == square.lengths[0] + 6 * 4
    assert dataset.fingerprint != square.fingerprint


def test_a_file_that_changes_size_is_noticed(make, talk, folder):
    rows = [talk("<image>q", "a", image="1.png", id="r")]
    dataset = make(rows, **GRID)
    Image.new("RGB", (64, 64)).save(folder / "images" / "1.png")
    with pytest.raises(DataError, match=r"record id 'r': image: .*1.png: the size of the image has changed"):
        dataset.pack(0, [0])


def test_truncation_never_cuts_between_tiles(make, talk, folder):
    Image.new("RGB", (64, 64)).save(folder / "images" / "four.png")
    rows = [talk("<image> <image>", "yes", image=["1.png", "four.png"])]
    whole = make(rows, **GRID, max_images=8)
    need = int(whole.lengths[0])
    ids = whole.sources[0].sample(0)[0][0].ids
    after = len(ids) - 1 - max(i for i, t in enumerate(ids) if t == IMG)
    cut = make(rows, **GRID, tokens=need - after - 1, overlong="truncate")
    assert cut.images.tolist() == [3] and cut.sources[0].sample(0)[1] == [(0, 3)]
    assert cut.pack(0, [0]).pixel_values.shape[0] == 3
    kept = make(rows, **GRID, tokens=need - after, overlong="truncate", max_images=8)
    assert kept.images.tolist() == [8]


def test_widening_moves_spans_and_keeps_the_rest():
    sample = [Segment([1, IMG, 5, IMG, 6, 7], [(2, 3), (4, 6)], False, (0, 1)), Segment([IMG, 2], [(1, 2)], True, (1,))]
    wide = widen(sample, [1, 3, 2])
    assert wide == [
        Segment([1, IMG, 5, IMG, IMG, IMG, 6, 7], [(2, 3), (6, 8)], False, (0, 1, 1, 1)),
        Segment([IMG, IMG, 2], [(2, 3)], True, (1, 1)),
    ]
    assert widen(sample, [1, 1, 1]) == sample
    assert truncate(sample, 6, 1, [1, 3, 2]) == [Segment([1, IMG, 5, IMG], [(2, 3)], False, (0, 1))]
    assert truncate(sample, 5, 1, [1, 3, 2]) == [Segment([1, IMG, 5], [(2, 3)], False, (0,))]
    assert truncate(sample, 10, 1, [1, 3, 2]) == [sample[0], Segment([IMG], [], True, (1,))]
