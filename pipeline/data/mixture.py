"""Which shards an epoch visits, where several lists have weights.

The shards of a list form an endless sequence: all of them, shuffled, then all of them in another order, and so on. An
epoch takes the next ``weight * R`` rows of each list's sequence. So a weight of 2 visits every shard twice in an epoch,
one of 0.5 opens half of the shards, and the next epoch opens the other half; a shard at the border of two epochs is
divided between them. Everything follows from (seed, epoch) and the numbers of rows.
Legend: S shards, R rows of a list, V visits of an epoch.
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_CYCLE, _PART = 2, 3
"""What a random generator is for; the order of samples uses others (``pipeline.data.order``)."""


class Mixture:
    """The shards of a training, by list.

    Args:
        shard_rows: Rows of each shard, S numbers.
        seed: Seed of the training.
        shard_lists: List of each shard, from 0; empty: all are of one list.
        weights: Weight of each list, above 0; empty: each is 1.
    """

    def __init__(
        self, shard_rows: Sequence[int], seed: int, shard_lists: Sequence[int] = (), weights: Sequence[float] = ()
    ) -> None:
        self._rows = np.asarray(shard_rows, dtype=np.int64)
        self._seed = seed
        lists = np.asarray(shard_lists or [0] * len(self._rows), dtype=np.int64)
        num_lists = 1 + int(lists.max(initial=0))
        # A decimal's own fraction: 0.1 of 10 rows is one row in every epoch.
        self._weights = [Fraction(str(weight)) for weight in weights or [1] * num_lists]
        assert num_lists <= len(self._weights)
        self._members = [np.flatnonzero(lists == number) for number in range(len(self._weights))]
        self._list_rows = [int(self._rows[members].sum()) for members in self._members]

    @property
    def epoch_rows(self) -> Fraction:
        """Samples of an epoch, in the mean of many."""
        return sum((w * rows for w, rows in zip(self._weights, self._list_rows, strict=True)), Fraction(0))

    def sizes(self, count: int) -> list[int]:
        """Rows of each list in a selection of ``count`` rows that stands for the samples; fewer if there are fewer.

        Where a list has too few rows for its share, others fill it up. There is at least one row in all.
        """
        shares = [w * rows / self.epoch_rows for w, rows in zip(self._weights, self._list_rows, strict=True)]
        stops = [round(count * share) for share in itertools.accumulate(shares, initial=Fraction(0))]
        sizes = [min(b - a, rows) for (a, b), rows in zip(itertools.pairwise(stops), self._list_rows, strict=True)]
        for number, rows in enumerate(self._list_rows):
            sizes[number] += min(count - sum(sizes), rows - sizes[number])
        return sizes

    def start(self, epoch: int) -> int:
        """Samples before an epoch."""
        return sum(self._seen(number, epoch) for number in range(len(self._weights)))

    def epoch_of(self, position: int) -> int:
        """The epoch of a sample; at least one row in all."""
        epoch = int(position // self.epoch_rows)  # or the one after: parts of rows are cut off
        while self.start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def visits(self, epoch: int) -> Ints:
        """The visits of an epoch in the order of the shards, (V, 4): shard, first row, number of rows, cycle.

        The first row is counted among the shard's rows in the order of ``part``. A whole cycle visits shards without
        rows, too, because the shuffling of the visits depends on how many there are.
        """
        parts = [self._visits_of_list(number, epoch) for number in range(len(self._weights))]
        visits = np.concatenate(parts)
        return visits[np.argsort(visits[:, 0], kind="stable")]

    def part(self, visit: Ints) -> Ints | None:
        """The rows of the shard that a visit takes; None: all.

        They are drawn by lot, because the rows of a table stand in the order of their list.
        """
        shard, first, count, cycle = visit.tolist()
        num_rows = int(self._rows[shard])
        if count == num_rows:
            return None
        rows = np.random.default_rng((self._seed, cycle, shard, _PART)).permutation(num_rows)
        return rows[first : first + count]

    def _seen(self, number: int, epoch: int) -> int:
        """Rows of a list before an epoch, counted in its endless sequence."""
        return int(epoch * self._weights[number] * self._list_rows[number])

    def _visits_of_list(self, number: int, epoch: int) -> Ints:
        members, num_rows = self._members[number], self._list_rows[number]
        start, stop = self._seen(number, epoch), self._seen(number, epoch + 1)
        if not num_rows:
            return np.stack([members, *[np.zeros_like(members)] * 3], axis=1)
        parts = [np.empty((0, 4), dtype=np.int64)]
        for cycle in range(start // num_rows, -(-stop // num_rows)):
            low, high = (min(max(place - cycle * num_rows, 0), num_rows) for place in (start, stop))
            shards = members
            if high - low < num_rows:  # of a whole cycle the order does not matter: the windows shuffle it
                shards = members[np.random.default_rng((self._seed, cycle, number, _CYCLE)).permutation(len(members))]
            stops = np.cumsum(self._rows[shards])
            firsts = np.maximum(low - (stops - self._rows[shards]), 0)
            counts = np.minimum(high - (stops - self._rows[shards]), self._rows[shards]) - firsts
            is_visited = (counts > 0) | (high - low == num_rows)
            columns = [shards, firsts, counts, np.full(len(shards), cycle)]
            parts.append(np.stack(columns, axis=1)[is_visited])
        return np.concatenate(parts)
