"""The planned order of samples, which depends on (seed, epoch) and not on the number of workers.

Shards are shuffled and grouped into windows of about ``window_rows`` rows, and rows are shuffled inside a window. So a
reader holds one window (two at a border), not all data. Data smaller than a window is shuffled as a whole. Sample ``p``
of the training is row ``p mod N`` of epoch ``p // N``, so the step alone is the cursor of a run.
Legend: N rows in an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WINDOW_ROWS = 200_000
"""Rows in a shuffle window: 600 MB of two fp16 embeddings of width 768."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    shards: Ints
    """Shard numbers of the window, in shuffled order."""
    starts: Ints
    """First row of each shard, counted inside the window; the last entry is the number of the window's rows."""
    first: int
    """First row of the window, counted inside the epoch."""

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])


class SampleOrder:
    """The order of all samples of one training.

    Args:
        shard_rows: Number of rows of each shard; at least one row in all.
        seed: Seed of the order.
        window_rows: Number of rows that are shuffled together.

    Raises:
        ValueError: If there is no row.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, *, window_rows: int = WINDOW_ROWS) -> None:
        self.num_rows = sum(shard_rows)
        if self.num_rows == 0:
            raise ValueError("no rows to order")
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
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
            epoch, offset = divmod(position, self.num_rows)
            windows = self._windows(epoch)
            number = int(np.searchsorted([window.first for window in windows], offset, side="right")) - 1
            window = windows[number]
            inside = offset - window.first
            count = min(stop - position, window.num_rows - inside)
            rows = self._permutation(epoch, number)[inside : inside + count]
            owners = np.searchsorted(window.starts, rows, side="right") - 1
            out = locations[position - start : position - start + count]
            out[:, 0] = window.shards[owners]
            out[:, 1] = rows - window.starts[owners]
            position += count
        return locations

    def _plan_epoch(self, epoch: int) -> list[_Window]:
        shard_order = np.random.default_rng((self._seed, epoch)).permutation(len(self._shard_rows))
        windows: list[_Window] = []
        members: list[int] = []
        first = rows = 0
        for shard in [int(shard) for shard in shard_order if self._shard_rows[shard]]:
            if members and rows + self._shard_rows[shard] > self._window_rows:
                windows.append(self._window(members, first))
                first, rows, members = first + rows, 0, []
            members.append(shard)
            rows += int(self._shard_rows[shard])
        return [*windows, self._window(members, first)]

    def _window(self, members: list[int], first: int) -> _Window:
        shards = np.asarray(members, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(self._shard_rows[shards])])
        return _Window(shards, starts, first)

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
