"""Rows kept for prompts that begin alike: what is found is what a search of everything finds, and no row is lost."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from PIL import Image

from tinyllava_fast.data.objects import DecodedImage
from tinyllava_fast.infer.scheduling.pool import KVPool
from tinyllava_fast.infer.scheduling.prefixes import BLOCK, LEAST_SHARED, ROWS_A_TOKEN, Kept, PrefixCache
from tinyllava_fast.infer.scheduling.sequence import IMAGE_ROW, ImageSpan, Sequence
from tinyllava_fast.infer.types import Request, Sampling


def make_cache(rows: int, *, share: bool = True, reuse: bool = True) -> PrefixCache:
    pool = KVPool(rows, [1], 2, dtype=torch.float32, device=torch.device("cpu"))
    return PrefixCache(pool, share=share, reuse=reuse)


def place(cache: PrefixCache, prompt: list[int], new: int = 8) -> Sequence | None:
    """A sequence with rows, which hold what is reused; None if there is no room."""
    sequence = Sequence(Request.ask("?", sampling=Sampling(max_new_tokens=new)), prompt, online=True)
    kept, length = cache.longest(prompt)
    return sequence if cache.place(sequence, prompt, kept, min(length, len(prompt) - 1)) else None


def compute(cache: PrefixCache, sequence: Sequence, stop: int) -> None:
    """Write a sequence's rows up to a token, as a model would: a number for all tokens before."""
    own = sequence.start - sequence.shared_rows[1]
    for place in range(sequence.num_cached_tokens, stop):
        for tensor in (*cache.pool.k, *cache.pool.v):
            tensor[own + place] = state(sequence.prompt, place)
    sequence.num_cached_tokens = max(stop, sequence.num_cached_tokens)


def state(prompt: list[int], place: int) -> float:
    return float(hash(tuple(prompt[: place + 1])) % 2**20)


def ended(cache: PrefixCache, prompt: list[int]) -> None:
    sequence = place(cache, prompt)
    assert sequence is not None
    compute(cache, sequence, len(prompt))
    cache.release(sequence)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_rows(cache: PrefixCache, alive: list[Sequence]) -> None:
    """Every row belongs to one owner or to none, and sequences see the rows of their own tokens."""
    spans = cache.pool.rows
    held = [(kept.start, kept.num_own) for kept in cache._ended]
    held += [(s.start, s.num_reserved_rows) for s in alive if s.num_reserved_rows]
    held += spans._holes
    ordered = sorted(held)
    assert all(sum(a) == b[0] for a, b in pairwise(ordered)) and sum(n for _, n in ordered) == spans.size
    read = {kept: kept.num_own for kept in cache._ended if kept.readers}
    assert cache.num_rows == sum(kept.num_own for kept in cache._ended if kept not in read)
    for sequence in alive:
        start, shared = sequence.shared_rows
        rows = [*range(start, start + shared), *range(sequence.start, sequence.start + sequence.num_own_cached)]
        found = cache.pool.k[0][rows, 0, 0].tolist()
        assert found == [state(sequence.prompt, place) for place in range(sequence.num_cached_tokens)]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "copied"])
def test_what_is_found_is_best_and_no_row_is_lost(share: bool) -> None:
    rng = random.Random(0)
    cache = make_cache(2600, share=share)
    stems = [[rng.randrange(50) for _ in range(rng.randrange(0, 220))] for _ in range(5)]
    stems += [stem + [rng.randrange(50) for _ in range(130)] for stem in stems]
    alive: list[Sequence] = []
    shared = 0
    for _ in range(400):
        prompt = rng.choice(stems) + [rng.randrange(50) for _ in range(rng.randrange(1, 90))]
        there: list[Kept] = [*cache._ended, *cache._running.values()]
        lengths = {kept: common(kept.content[: kept.num_tokens], prompt) for kept in there}
        worth = {k: n - cache._num_copied(k, n) / ROWS_A_TOKEN for k, n in lengths.items() if n >= BLOCK}
        found, length = cache.longest(prompt)
        assert (found is None) == (not worth)
        if found is not None:
            assert lengths[found] == length and worth[found] == max(worth.values())
            assert length > (1 - 1 / ROWS_A_TOKEN) * max(lengths.values()) - 1
        sequence = place(cache, prompt)
        if sequence is not None:
            shared += sequence.shared_rows[1]
            compute(cache, sequence, rng.randrange(len(prompt) + 1))
            alive.append(sequence)
        check_rows(cache, alive)
        if len(alive) > 5 or sequence is None:
            cache.release(alive.pop(rng.randrange(len(alive))), keep=rng.random() < 0.9)
            check_rows(cache, alive)
    assert shared > 10_000 if share else shared == 0
    for sequence in alive:
        cache.release(sequence, keep=False)
    while cache.evict():
        pass
    assert cache.pool.rows.take(2600) == 0 and not cache._by_block and not cache._running and not cache.num_rows


def test_many_questions_about_one_image_hold_its_rows_once() -> None:
    rng = random.Random(1)
    system, image = [1] * 40, [-5] * 200
    cache = make_cache(800)
    alive = []
    for number in range(9):
        question = place(cache, system + image + [10 + number] + [rng.randrange(50) for _ in range(20)])
        assert question is not None
        compute(cache, question, len(question.prompt))
        alive.append(question)
    assert {s.shared_rows for s in alive} == {(0, 240)}
    assert cache.pool.rows.free_rows == 800 - 240 - sum(s.num_reserved_rows for s in alive) > 200
    other = place(cache, [*system, *[-6] * 150])  # the few tokens of the system's text are copied
    assert other is not None and other.shared_rows == (0, 0) and other.num_cached_tokens == 40
    check_rows(cache, [*alive, other])
    for one in (*alive, other):
        cache.release(one, keep=False)
    assert cache.num_rows == 240 and cache.pool.rows.free_rows == 560  # the stem is kept


def test_a_long_text_before_each_image_is_copied_once_an_image() -> None:
    system, image = [1] * 100, [-5] * 200
    cache = make_cache(2000)
    ended(cache, [*system, *image, 7])
    ended(cache, [*system, *[-6] * 200, 7])
    assert [len(kept.content) for kept in cache._ended if kept.branches] == [100]
    questions = [place(cache, [*system, *image, 8 + number, 9]) for number in range(3)]
    assert len({s.shared_rows for s in questions if s is not None and s.shared_rows[1] == 300}) == 1
    for question in questions:
        assert question is not None and question.num_cached_tokens == 300 and question.num_own_cached == 0
        compute(cache, question, 302)
    check_rows(cache, [s for s in questions if s is not None])


def test_rows_that_are_read_stay_and_the_others_go_in_the_order_of_their_use() -> None:
    cache = make_cache(400)
    prompts = [[number] * 100 for number in range(3)]
    for prompt in prompts:
        ended(cache, prompt)
    spans = cache.pool.rows
    assert cache.num_rows == 300 and cache.longest([0] * 20)[1] == 20  # used again: the second is the oldest now
    reader = place(cache, [*prompts[2], 5], new=1)
    assert reader is not None and reader.shared_rows[1] == 100 and cache.num_rows == 200
    assert spans.take(99) is not None and spans.take(80) is not None
    assert [cache.longest(prompt)[1] for prompt in prompts] == [100, 0, 100]
    assert spans.take(100) is not None and spans.take(100) is None  # the third has a reader
    assert [cache.longest(prompt)[1] for prompt in prompts] == [0, 0, 100]
    cache.release(reader, keep=False)
    assert spans.take(100) is not None and cache.num_rows == 0


def test_a_long_stem_gives_way_to_a_sequence_that_uses_little_of_it() -> None:
    cache = make_cache(1000)
    ended(cache, [*[1] * 80, *[2] * 800])
    other = place(cache, [*[1] * 80, *[3] * 700])
    assert other is not None and other.num_cached_tokens == 80
    compute(cache, other, 780)
    check_rows(cache, [other])


def test_a_conversation_that_goes_on_replaces_its_beginning() -> None:
    cache = make_cache(300)
    first = list(range(40))
    ended(cache, first)
    ended(cache, [*first, 7, 7, 7])
    assert [len(kept.content) for kept in cache._ended] == [43]
    ended(cache, first)  # nothing new
    assert [len(kept.content) for kept in cache._ended] == [43] and cache.pool.rows.free_rows == 257
    ended(cache, [1] * (BLOCK - 1))  # too short to be found
    assert cache.num_rows == 43
    turns = list(range(100, 200))
    for _ in range(3):
        ended(cache, turns)
        turns = [*turns, *turns[:30]]
    kept = [k for k in cache._ended if k.content[0] == 100]
    assert sorted(k.num_own for k in kept) == [60, 100]  # the first turn is a stem, and the last goes on from it


def test_without_reuse_nothing_is_found() -> None:
    cache = make_cache(600, reuse=False)
    running = place(cache, [1] * 100)
    assert running is not None
    compute(cache, running, 100)
    assert cache.longest([1] * 100) == (None, 0)
    cache.release(running)
    assert cache.longest([1] * 100) == (None, 0) and cache.pool.rows.free_rows == 600


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


def test_a_short_beginning_is_copied() -> None:
    cache = make_cache(600)
    ended(cache, list(range(200)))
    short = place(cache, [*range(LEAST_SHARED - 1), *[0] * 30])
    assert short is not None and short.shared_rows == (0, 0) and short.num_cached_tokens == LEAST_SHARED - 1
    check_rows(cache, [short])


def test_images_are_told_apart_by_their_whole_digests() -> None:
    def of(digest: bytes) -> list[int]:
        image = DecodedImage(Image.new("RGB", (1, 1)), digest)
        return Sequence(Request.ask("?", image), [1, IMAGE_ROW, IMAGE_ROW], [ImageSpan(1, 2, 0)]).content()

    first, last = of(bytes(16)), of(bytes(15) + b"\1")
    assert first != last and first[1] == first[2] < 0 and last[1] < 0
