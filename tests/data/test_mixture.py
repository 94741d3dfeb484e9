"""Several lists with weights: which rows an epoch sees, and in what order."""

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import Mixture
from pipeline.data.order import SampleOrder, Share

_LISTS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0])),
    min_size=1,
    max_size=3,
).filter(lambda lists: sum(sum(rows) for rows, _ in lists) > 0)
_ROWS = [rows for _ in range(2) for rows in (7, 5, 0, 8)]


def _order(lists: list[tuple[list[int], float]], seed: int = 0, window_rows: int = 12) -> SampleOrder:
    shard_rows = [rows for shards, _ in lists for rows in shards]
    shard_lists = [number for number, (shards, _) in enumerate(lists) for _ in shards]
    weights = [weight for _, weight in lists]
    return SampleOrder(shard_rows, seed, window_rows=window_rows, shard_lists=shard_lists, weights=weights)


def _two(first: float, second: float, *, seed: int = 0, window_rows: int = 12) -> SampleOrder:
    return _order([(_ROWS[:4], first), (_ROWS[4:], second)], seed, window_rows)


def _epoch(order: SampleOrder, epoch: int) -> Counter[Any]:
    starts = [order.mixture.start(number) for number in (epoch, epoch + 1)]
    return Counter(map(tuple, order.locations(*starts).tolist()))


@given(lists=_LISTS, window=st.integers(1, 30), seed=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_each_row_is_seen_as_often_as_its_weight_says(
    lists: list[tuple[list[int], float]], window: int, seed: int
) -> None:
    order = _order(lists, seed, window)
    counts: Counter[Any] = Counter()
    stops = np.cumsum([len(rows) for rows, _ in lists]).tolist()
    shards_of = [range(stop - len(rows), stop) for (rows, _), stop in zip(lists, stops, strict=True)]
    for epoch in range(10):
        counts += _epoch(order, epoch)
        for shards, (rows, weight) in zip(shards_of, lists, strict=True):
            times = [counts[s, row] for s, count in zip(shards, rows, strict=True) for row in range(count)]
            expected = Fraction(str(weight)) * (epoch + 1)
            assert sum(times) == int(expected * sum(rows))
            assert max(times, default=0) - min(times, default=0) <= 1, "every row, before one is seen again"


def test_a_weight_of_two_shows_each_row_twice_in_every_epoch_and_a_half_the_other_rows_in_the_next() -> None:
    order = _two(2.0, 0.5)
    first, second = _epoch(order, 0), _epoch(order, 1)
    assert [first[0, row] for row in range(7)] == [2] * 7
    halves = [{place for place in epoch if place[0] >= 4} for epoch in (first, second)]
    assert [len(half) for half in halves] == [10, 10]
    assert not halves[0] & halves[1]
    assert _epoch(order, 2).keys() != first.keys(), "the next cycle has another order"


def test_an_epoch_opens_no_more_shards_than_it_needs() -> None:
    order = _order([([10] * 100, 0.1), ([10] * 4, 1.0)])
    for epoch in range(12):
        assert len({shard for shard, _ in _epoch(order, epoch) if shard < 100}) == 10


def test_a_divided_shard_is_divided_by_lot() -> None:
    order = _order([([40], 0.5)])
    parts = [{row for _, row in _epoch(order, epoch)} for epoch in range(4)]
    assert parts[0] | parts[1] == parts[2] | parts[3] == set(range(40))
    assert parts[0] not in (set(range(20)), parts[2], parts[3])


def test_all_weights_one_and_one_list_give_the_order_of_before() -> None:
    # What SampleOrder gave before there were lists, at the beginning of two epochs.
    before = [[7, 0], [7, 1], [7, 6]], [[4, 1], [1, 1], [4, 3]]
    for order in (
        SampleOrder(_ROWS, 3, window_rows=12),
        SampleOrder(_ROWS, 3, window_rows=12, shard_lists=[0, 0, 0, 0, 1, 1, 1, 1]),
        _two(1.0, 1.0, seed=3),
    ):
        assert (order.locations(0, 3).tolist(), order.locations(40, 43).tolist()) == before


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_order_is_the_same_for_any_workers_and_from_any_step(world_size: int) -> None:
    batch, num_steps = 7, 30
    whole = _two(2.0, 0.5, window_rows=20).locations(0, batch * num_steps)
    shares = [Share(batch, rank, world_size) for rank in range(world_size)]
    for begin in (0, 11, 23):
        order = _two(2.0, 0.5, window_rows=20)  # another process, which resumes in the middle of an epoch
        parts = [
            order.locations(step * batch + share.start, step * batch + share.stop)
            for step in range(begin, num_steps)
            for share in shares
        ]
        assert np.array_equal(np.concatenate(parts), whole[begin * batch :])


def test_a_selection_has_the_lists_as_the_samples_have_them() -> None:
    assert Mixture([10, 10, 20], 0, [0, 0, 1], [2.0, 0.5]).sizes(10) == [8, 2]
    assert Mixture([10, 10, 20], 0, [0, 0, 1]).sizes(8) == [4, 4]
    assert Mixture([90, 10], 0, [0, 1], [1.0, 50.0]).sizes(20) == [10, 10], "the second list has no more"
    assert Mixture([3, 0, 4], 0, [0, 1, 2], [1.0, 9.0, 1.0]).sizes(20) == [3, 0, 4]


def test_rows_too_few_for_a_sample_wait_for_a_later_epoch() -> None:
    order = _order([([3], 0.1)])
    assert [sum(_epoch(order, epoch).values()) for epoch in range(10)] == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert len(order.locations(0, 3)) == 3
