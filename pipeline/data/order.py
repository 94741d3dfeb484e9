"""The planned order of samples, which depends on (seed, epoch) and not on the number of workers.

Shards are shuffled and grouped into windows of about ``window_rows`` rows, and rows are shuffled inside a window. So a
reader holds one window (two at a border), not all data. Data smaller than a window is shuffled as a whole. The epochs
follow one another, and their lengths follow from the numbers of rows and the weights of the lists
(``pipeline.data.mixture``), so the step alone is the cursor of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixture import Mixture

WINDOW_ROWS = 200_000
"""Rows in a shuffle window: 600 MB of two fp16 embeddings of width 768."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    visits: Ints
    """What it visits of which shards, in shuffled order; see ``Mixture.visits``."""
    starts: Ints
    """First row of each visit, counted inside the window; the last entry is the number of the window's rows."""
    first: int
    """First row of the window, counted inside the epoch."""
    divided: dict[int, Ints]
    """The rows of each visit that takes a part of its shard, by its place in the window."""

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def locations(self, rows: Ints) -> tuple[Ints, Ints]:
        """Shard numbers, and rows in the shards' tables, of some of its rows."""
        visits = np.searchsorted(self.starts, rows, side="right") - 1
        rows_of_shard = rows - self.starts[visits]
        for visit, part in self.divided.items():
            is_here = visits == visit
            rows_of_shard[is_here] = part[rows_of_shard[is_here]]
        return self.visits[visits, 0], rows_of_shard


class SampleOrder:
    """The order of all samples of one training.

    Args:
        shard_rows: Number of rows of each shard; at least one row in all.
        seed: Seed of the order.
        window_rows: Number of rows that are shuffled together.
        shard_lists: List of each shard.
        weights: Weight of each list; see ``Mixture``.

    Raises:
        ValueError: If there is no row.
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        seed: int,
        *,
        window_rows: int = WINDOW_ROWS,
        shard_lists: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        self.num_rows = sum(shard_rows)
        if self.num_rows == 0:
            raise ValueError("no rows to order")
        self.mixture = Mixture(shard_rows, seed, shard_lists, weights)
        self._seed = seed
        self._window_rows = window_rows
        # A batch that crosses a border uses two epochs or two windows.
        self._windows = lru_cache(maxsize=2)(self._plan_epoch)
        self._permutation = lru_cache(maxsize=2)(self._shuffle_window)

    def locations(self, start: int, stop: int) -> Ints:
        """The locations of samples ``start`` .. ``stop`` - 1 of the training.

        Returns:
            (stop - start, 2): shard number, and row in the shard's table.
        """
        locations = np.empty((stop - start, 2), dtype=np.int64)
        position = start
        while position < stop:
            epoch = self.mixture.epoch_of(position)
            offset = position - self.mixture.start(epoch)
            windows = self._windows(epoch)
            number = int(np.searchsorted([window.first for window in windows], offset, side="right")) - 1
            window = windows[number]
            inside = offset - window.first
            count = min(stop - position, window.num_rows - inside)
            rows = self._permutation(epoch, number)[inside : inside + count]
            out = locations[position - start : position - start + count]
            out[:, 0], out[:, 1] = window.locations(rows)
            position += count
        return locations

    def _plan_epoch(self, epoch: int) -> list[_Window]:
        visits = self.mixture.visits(epoch)
        visits = visits[np.random.default_rng((self._seed, epoch)).permutation(len(visits))]
        windows: list[_Window] = []
        members: list[int] = []
        first = rows = 0
        for place in np.flatnonzero(visits[:, 2]).tolist():
            num_rows = int(visits[place, 2])
            if members and rows + num_rows > self._window_rows:
                windows.append(self._window(visits[members], first))
                first, rows, members = first + rows, 0, []
            members.append(place)
            rows += num_rows
        return [*windows, self._window(visits[members], first)]

    def _window(self, visits: Ints, first: int) -> _Window:
        starts = np.concatenate([[0], np.cumsum(visits[:, 2])])
        parts = {place: self.mixture.part(visit) for place, visit in enumerate(visits)}
        return _Window(visits, starts, first, {place: rows for place, rows in parts.items() if rows is not None})

    def _shuffle_window(self, epoch: int, number: int) -> Ints:
        rng = np.random.default_rng((self._seed, epoch, number, 1))
        return rng.permutation(self._windows(epoch)[number].num_rows)


@dataclass(frozen=True)
class Share:
    """The samples of each global batch that one worker takes: a run of them, as long as the others' to within one."""

    batch_size: int
    """Global batch, in samples."""
    rank: int = 0
    world_size: int = 1

    @property
    def start(self) -> int:
        """Its first sample, counted inside the batch."""
        return self.rank * self.batch_size // self.world_size

    @property
    def stop(self) -> int:
        """The sample after its last one."""
        return (self.rank + 1) * self.batch_size // self.world_size

    @property
    def largest(self) -> int:
        """Samples of the worker that has the most."""
        return -(-self.batch_size // self.world_size)

    def __len__(self) -> int:
        return self.stop - self.start

    def largest_part(self, most: int) -> int:
        """Samples of the largest of all workers' ``parts``."""
        return -(-self.largest // self.num_parts(most))

    def parts(self, most: int) -> list[slice]:
        """The share in parts of at most ``most`` samples, evenly; 0: in one part."""
        num_parts = self.num_parts(most)
        cuts = [number * len(self) // num_parts for number in range(num_parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(cuts) if start < stop]

    def num_parts(self, most: int) -> int:
        """Parts of the worker that has the most."""
        return -(-self.largest // most) if most else 1
