"""Ids are found in a number of steps that does not grow with the rows."""

from typing import Any

import numpy as np
import pytest

from pipeline.retrieve.rows import are_among, ranks_of

_MOST = 1 << 53


class _Counted:
    """An array that counts how often it is read."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, places: Any) -> Any:
        self.num_reads += 1
        return self.values[places]


@pytest.mark.parametrize("count", [1000, 100_000, 3_000_000])
def test_an_id_is_found_in_as_many_looks_among_many_rows_as_among_few(count: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, _MOST, count)
    order = np.argsort(ids, kind="stable")
    targets = np.concatenate([ids[rng.integers(0, count, 50)], rng.integers(0, _MOST, 50)])
    counted: Any = _Counted(order)
    np.testing.assert_array_equal(ranks_of(targets, ids, counted), np.searchsorted(ids, targets, sorter=order))
    assert counted.num_reads <= 9  # halves would take 10, 17 and 22
    one = [_Counted(order) for _ in range(100)]
    for number, looks in enumerate(one):
        ranks_of(targets[number : number + 1], ids, looks)  # type: ignore[arg-type]
    assert np.mean([looks.num_reads for looks in one]) < 6


@pytest.mark.parametrize("spread", ["equal", "few", "uneven", "none"])
def test_ids_of_any_spread_are_found(spread: str) -> None:
    rng = np.random.default_rng(0)
    ids = {
        "equal": np.full(500, 7),
        "few": np.repeat([0, 5, _MOST - 1], 200),
        "uneven": np.sort((_MOST - 1) * rng.random(5000) ** 40).astype(np.int64),
        "none": np.zeros(0, np.int64),
    }[spread]
    order = rng.permutation(len(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    targets = np.concatenate([ids[::7], ids[::11] + 1, [-5, 0, 1, _MOST - 1, _MOST + 10, 2**62]])
    np.testing.assert_array_equal(ranks_of(targets, ids, order), np.searchsorted(ids, targets, sorter=order))


def test_values_are_looked_up_among_sorted_ones() -> None:
    values = np.array([[-1, 0, 5], [6, 7, 9]])
    np.testing.assert_array_equal(are_among(values, np.array([0, 6, 7])), [[False, True, False], [True, True, False]])
    assert not are_among(values, np.zeros(0, np.int64)).any()
