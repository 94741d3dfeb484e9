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
