"""Packs of a step shared out by their work: equally many for each rank, nearly equal sums."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllava_fast.data.balance import PackCosts, idle_share, share_out


@pytest.mark.parametrize(("packs", "ranks"), [(2, 2), (8, 2), (12, 4), (4, 1), (8, 8)])
def test_every_pack_is_computed_once_and_each_rank_has_as_many(packs: int, ranks: int) -> None:
    work = np.random.default_rng(0).lognormal(0, 0.5, packs).tolist()
    shares = share_out(work, ranks)
    assert sorted(pack for share in shares for pack in share) == list(range(packs))
    assert {len(share) for share in shares} == {packs // ranks}


def test_the_order_of_the_plan_where_nothing_is_to_be_gained() -> None:
    assert share_out([3.0, 9.0, 1.0], 1) == [[0, 1, 2]]
    assert share_out([1.0, 5.0], 2) == [[0], [1]]  # not the heaviest to rank 0 in every step
    assert share_out([1.0, 5.0, 4.0], 3) == [[0], [1], [2]]
    assert share_out([2.0] * 4, 2) == [[0, 2], [1, 3]]


def test_ranks_wait_for_one_another_less_than_in_turn() -> None:
    """At the end of a step, and also where they wait after every pack."""
    steps = np.random.default_rng(1).lognormal(0, 0.3, (200, 8))

    def idle(shares_of, each: bool) -> float:
        tables = [np.array([[step[pack] for pack in share] for share in shares_of(step, 2)]) for step in steps]
        return idle_share(np.concatenate([t.T for t in tables]) if each else np.stack([t.sum(1) for t in tables]))

    def in_turn(step: np.ndarray, ranks: int) -> list[list[int]]:
        return [list(range(rank, len(step), ranks)) for rank in range(ranks)]

    assert idle(share_out, each=False) < 0.025 < 0.07 < idle(in_turn, each=False)
    assert idle(share_out, each=True) < 0.5 * idle(in_turn, each=True)


def test_the_work_of_a_pack() -> None:
    costs = PackCosts(pack=1000.0, image=100.0, pair=1.0, text=10.0)
    lengths, images = np.array([3, 6]), np.array([0, 1])
    assert costs.of(lengths, images, tokens_per_image=4) == 1000 + 100 + (6 + 21) + 10 * 5
    assert costs.of(lengths[:0], images[:0], tokens_per_image=4) == 1000


def test_idle_share() -> None:
    assert idle_share(np.array([[1.0, 1.0], [2.0, 2.0]])) == 0
    assert idle_share(np.array([[1.0, 0.5], [0.5, 1.0]])) == pytest.approx(0.25)
    assert idle_share(np.zeros((3, 2))) == 0
