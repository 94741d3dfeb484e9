"""The planned order of samples: (seed, epoch) fixes it, whatever the number of workers.

Shards are shuffled and cut into windows of about ``window_rows`` rows, and rows are shuffled inside a window: a
reader holds one window (two while it crosses), not the data. Data smaller than a window is shuffled whole. Sample ``p``
of the training is row ``p mod N`` of epoch ``p // N``, so the cursor of a run is its step and nothing else.
Legend: N rows in an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WINDOW_ROWS = 200_000
"""Rows in a shuffle window: 600 MB of two fp16 embeddings of width 768."""

Places = NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    shards: Places
    """Shard numbers of the window, in their shuffled order."""
    starts: Places
    """First row of each of them, counted inside the window; one more entry holds the window's rows."""
    first: int
    """First row of the window, counted inside the epoch."""

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])


class SampleOrder:
    """Order of all samples of one training.

    Args:
        shard_rows: Rows of each shard, in rows; at least one in all.
        seed: Seed of the order.
        window_rows: Rows shuffled together, in rows.

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
        # Two epochs and two windows are in use when a batch crosses a border.
        self._windows = lru_cache(maxsize=2)(self._plan_epoch)
        self._permutation = lru_cache(maxsize=2)(self._shuffle_window)

    def places(self, start: int, stop: int) -> Places:
        """Where samples ``start`` .. ``stop`` - 1 of the training stand.

        Returns:
            (stop - start, 2): shard number and row inside the shard's own table.
        """
        found = np.empty((stop - start, 2), dtype=np.int64)
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
            out = found[position - start : position - start + count]
            out[:, 0] = window.shards[owners]
            out[:, 1] = rows - window.starts[owners]
            position += count
        return found

    def _plan_epoch(self, epoch: int) -> list[_Window]:
        shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(self._shard_rows))
        windows: list[_Window] = []
        members: list[int] = []
        first = rows = 0
        for shard in [int(shard) for shard in shuffled if self._shard_rows[shard]]:
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

    def _shuffle_window(self, epoch: int, number: int) -> Places:
        rng = np.random.default_rng((self._seed, epoch, number, 1))
        return rng.permutation(self._windows(epoch)[number].num_rows)


def worker_slice(step: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last-plus-one sample that a worker takes of the global batch of ``step`` (0-based).

    Raises:
        ValueError: If the batch does not divide among the workers.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} does not divide among {world_size} workers")
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return start, start + share
