from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import SampleOrder, Share

_SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


@given(shards=_SHARDS, window=st.integers(1, 20), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_every_row_once(shards: list[int], window: int, seed: int) -> None:
    order = SampleOrder(shards, seed, window_rows=window)
    rows = sorted((s, r) for s, count in enumerate(shards) for r in range(count))
    for epoch in range(2):
        visited = order.locations(epoch * order.num_rows, (epoch + 1) * order.num_rows)
        assert sorted(map(tuple, visited.tolist())) == rows


@given(shards=_SHARDS, window=st.integers(1, 20), cuts=st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=60, deadline=None)
def test_locations_do_not_depend_on_how_they_are_requested(shards: list[int], window: int, cuts: list[int]) -> None:
    whole = SampleOrder(shards, 3, window_rows=window).locations(0, 60)
    borders = [0, *sorted(cuts), 60]
    pieces = [SampleOrder(shards, 3, window_rows=window).locations(a, b) for a, b in pairwise(borders)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_locations_differ_between_epochs_and_seeds() -> None:
    order = SampleOrder([40, 40], 0)
    first, second = order.locations(0, 80), order.locations(80, 160)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, SampleOrder([40, 40], 1).locations(0, 80))


def test_locations_stay_inside_a_window() -> None:
    order = SampleOrder([10] * 12, 0, window_rows=30)
    locations = order.locations(0, 120)
    for start in range(0, 120, 30):
        assert len(set(locations[start : start + 30, 0].tolist())) == 3


@given(shards=_SHARDS, streams=st.integers(2, 4), part=st.integers(1, 3), window=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_streams_visit_every_row_once_an_epoch_and_share_shards_only_where_they_meet(
    shards: list[int], streams: int, part: int, window: int
) -> None:
    batch = streams * part
    shards = [*shards, 9 * batch - sum(shards) % batch]  # an epoch of whole batches
    order = SampleOrder(shards, 3, window_rows=window, num_streams=streams, batch_size=batch)
    rows = sorted((s, r) for s, count in enumerate(shards) for r in range(count))
    for epoch in range(2):
        visited = order.locations(epoch * order.num_rows, (epoch + 1) * order.num_rows)
        assert sorted(map(tuple, visited.tolist())) == rows
        of_streams = visited.reshape(-1, streams, part, 2).transpose(1, 0, 2, 3).reshape(streams, -1, 2)
        num_reads = sum(len(np.unique(locations[:, 0])) for locations in of_streams)
        assert num_reads <= np.count_nonzero(shards) + streams - 1


@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda shards: sum(shards) >= 40),
    streams=st.integers(2, 5),
    more=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_uneven_streams_lead_by_no_more_than_a_batch(
    shards: list[int], streams: int, more: int, cuts: list[int]
) -> None:
    def order() -> SampleOrder:
        return SampleOrder(shards, 3, window_rows=20, num_streams=streams, batch_size=streams + more)

    visits = Counter(map(tuple, order().locations(0, 4 * sum(shards)).tolist()))
    assert len(visits) == sum(shards)
    assert set(visits.values()) <= {3, 4, 5}
    assert sum(visits.values()) - 4 * len(visits) == 0
    assert sum(count != 4 for count in visits.values()) <= 2 * (streams + more)
    borders = [0, *sorted(cuts), 400]
    pieces = [order().locations(start, stop) for start, stop in pairwise(borders)]
    assert np.array_equal(np.concatenate(pieces), order().locations(0, 400))


def test_streams_shuffle_differently_and_windows_are_divided_among_them() -> None:
    order = SampleOrder([10] * 12, 0, window_rows=40, num_streams=2, batch_size=20)
    first, second = order.locations(0, 120).reshape(6, 2, 10, 2).transpose(1, 0, 2, 3).reshape(2, 60, 2)
    assert not np.array_equal(first[:, 1], second[:, 1])
    for locations in (first, second):
        for start in range(0, 60, 20):
            assert len(set(locations[start : start + 20, 0].tolist())) == 2


def test_sample_order_refuses_more_streams_than_its_rows_can_fill() -> None:
    with pytest.raises(ValueError, match="20 rows are too few for num_streams = 3: it needs 24"):
        SampleOrder([10, 10], 0, num_streams=3, batch_size=4)


def test_sample_order_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        SampleOrder([0, 0], 0)


@given(batch_size=st.integers(1, 40), world_size=st.integers(1, 9), most=st.integers(0, 12))
def test_shares_of_the_workers_together_are_the_global_batch(batch_size: int, world_size: int, most: int) -> None:
    shares = [Share(batch_size, rank, world_size) for rank in range(world_size)]
    assert [place for share in shares for place in range(share.start, share.stop)] == list(range(batch_size))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == shares[0].largest
    for share in shares:
        parts = [range(len(share))[part] for part in share.parts(most)]
        assert [place for part in parts for place in part] == list(range(len(share)))
        assert all(0 < len(part) <= (most or batch_size) for part in parts)
