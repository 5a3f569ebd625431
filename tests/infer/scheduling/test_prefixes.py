"""Rows kept for prompts that begin alike: what is found is what a search of everything finds, and no row is lost."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from tinyllava_fast.data.objects import DecodedImage
from tinyllava_fast.infer.scheduling.pool import Spans
from tinyllava_fast.infer.scheduling.prefixes import BLOCK, PrefixCache
from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW, ImageSpan, Sequence
from tinyllava_fast.infer.types import Request


def running(prompt: list[int], spans: Spans, cached: int | None = None) -> Sequence:
    """A sequence whose first tokens are in the pool."""
    sequence = Sequence(Request.ask("?"), prompt, online=True)
    start = spans.take(len(prompt) + 5)
    assert start is not None
    sequence.start, sequence.num_reserved_rows = start, len(prompt) + 5
    sequence.num_cached_tokens = len(prompt) if cached is None else cached
    return sequence


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_the_longest_common_beginning_is_found() -> None:
    rng = random.Random(0)
    spans = Spans(6000)
    cache = PrefixCache(spans)
    stems = [[rng.randrange(50) for _ in range(rng.randrange(0, 120))] for _ in range(6)]
    alive: dict[Sequence, list[int]] = {}
    kept: list[list[int]] = []
    for _ in range(300):
        prompt = rng.choice(stems) + [rng.randrange(50) for _ in range(rng.randrange(1, 90))]
        there = [p[: s.num_cached_tokens] for s, p in alive.items()] + kept
        longest = max((common(p, prompt) for p in there), default=0)
        found, length = cache.longest(prompt)
        assert length == (longest if longest >= BLOCK else 0) and (found is None) == (length == 0)
        if found is not None:
            assert found.content[:length] == prompt[:length] and cache.holds(found)
        sequence = running(prompt, spans, rng.randrange(len(prompt) + 1))
        cache.watch(sequence, prompt)
        alive[sequence] = prompt
        if len(alive) > 4:
            ended = rng.choice(list(alive))
            cache.release(ended)
            del alive[ended]
        kept = [entry.content for entry in cache._ended]  # a short or repeated one is not kept
        held = sum(s.num_reserved_rows for s in alive)
        assert spans.free_rows + cache.num_rows + held == spans.size
    assert len(kept) > 10
    for sequence in alive:
        cache.release(sequence, keep=False)
    while cache.evict():
        pass
    assert spans.take(spans.size) == 0 and not cache._by_block and not cache._running


def test_rows_are_given_back_in_the_order_of_their_use() -> None:
    spans = Spans(200)
    cache = PrefixCache(spans)
    prompts = [[number] * 50 for number in range(3)]
    for prompt in prompts:
        cache.release(running(prompt, spans))
    assert spans.free_rows == 50 and cache.num_rows == 150
    assert cache.longest([0] * 20)[1] == 20  # used again: the second is the oldest now
    assert spans.take(50) is not None and spans.take(40) is not None
    assert [cache.longest(prompt)[1] for prompt in prompts] == [50, 0, 50]


def test_a_conversation_that_goes_on_replaces_its_beginning() -> None:
    spans = Spans(300)
    cache = PrefixCache(spans)
    first = list(range(40))
    cache.release(running(first, spans))
    cache.release(running([*first, 7, 7, 7], spans))
    assert [len(kept.content) for kept in cache._ended] == [43]
    cache.release(running(first, spans))  # nothing new
    assert [len(kept.content) for kept in cache._ended] == [43] and spans.free_rows == 257
    cache.release(running([1] * (BLOCK - 1), spans))  # too short to be found
    assert cache.num_rows == 43


def test_images_are_told_apart_by_their_pixels() -> None:
    picture = Image.new("RGB", (4, 6), "red")
    same, wider = DecodedImage.of(picture.copy()), DecodedImage.of(Image.new("RGB", (6, 4), "red"))
    prompt = [5, IMAGE_ROW, IMAGE_ROW, IMAGE_ROW, 6]

    def content(image: DecodedImage) -> list[int]:
        request = Request.ask("?", image)
        return Sequence(request, list(prompt), [ImageSpan(1, 3, 0)]).content()

    red = content(DecodedImage.of(picture))
    assert red == content(same) and red[0] == 5 and red[4] == 6
    assert red[1] == red[2] == red[3] < 0 and common(red, content(wider)) == 1
    with pytest.raises(TypeError, match="decoded image"):
        Sequence(Request.ask("?", picture), list(prompt), [ImageSpan(1, 3, 0)]).content()


def test_images_are_told_apart_by_their_whole_digests() -> None:
    def of(digest: bytes) -> list[int]:
        image = DecodedImage(Image.new("RGB", (1, 1)), digest)
        return Sequence(Request.ask("?", image), [1, IMAGE_ROW, IMAGE_ROW], [ImageSpan(1, 2, 0)]).content()

    first, last = of(bytes(16)), of(bytes(15) + b"\1")
    assert first != last and first[1] == first[2] < 0 and last[1] < 0
