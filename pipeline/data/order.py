"""The planned order of samples, which depends on (seed, epoch) and not on the number of workers.

Shards are shuffled and grouped into windows of about ``window_rows`` rows, and rows are shuffled inside a window. So a
reader holds one window (two at a border), not all data. Data smaller than a window is shuffled as a whole. The epochs
follow one another, and their lengths follow from the numbers of rows and the weights of the lists
(``pipeline.data.mixture``), so the step alone is the cursor of a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixture import Mixture

WINDOW_ROWS = 200_000
"""Rows in a shuffle window: 600 MB of two fp16 embeddings of width 768."""

_LEAST_ROWS_OF_STREAM = 8
"""With fewer, a stream could have no row in an epoch, as its borders are rounded."""

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

    With ``num_streams`` the shards of an epoch are divided into as many runs of equal length, each with windows of its
    own, and every batch takes an equal part of each, the first stream's samples first. Workers on one machine have
    neighbouring shares of a batch, so a machine reads the shards of its own streams alone. Where two streams meet, both
    read a part of one shard.

    Args:
        shard_rows: Number of rows of each shard; at least one row in all.
        seed: Seed of the order.
        window_rows: Number of rows that are shuffled together, of all streams.
        shard_lists: List of each shard.
        weights: Weight of each list; see ``Mixture``.
        num_streams: Streams, at most ``batch_size``.
        batch_size: Samples of a batch; with one stream the order does not depend on it.

    Raises:
        ValueError: If there is no row, or there are too few for the streams.
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        seed: int,
        *,
        window_rows: int = WINDOW_ROWS,
        shard_lists: Sequence[int] = (),
        weights: Sequence[float] = (),
        num_streams: int = 1,
        batch_size: int = 1,
    ) -> None:
        self.num_rows = sum(shard_rows)
        if self.num_rows == 0:
            raise ValueError("no rows to order")
        self.mixture = Mixture(shard_rows, seed, shard_lists, weights)
        least = _LEAST_ROWS_OF_STREAM * num_streams
        if num_streams > 1 and self.mixture.epoch_rows < least:
            raise ValueError(f"{self.num_rows} rows are too few for num_streams = {num_streams}: it needs {least}")
        self._seed = seed
        self._batch_size = batch_size
        self._cuts = [number * batch_size // num_streams for number in range(num_streams + 1)]
        # A batch that crosses a border uses two epochs.
        shuffle = lru_cache(maxsize=2)(self._shuffle)
        self._streams = [
            _Stream(self.mixture, shuffle, seed, number, cuts, batch_size, max(1, window_rows // num_streams))
            for number, cuts in enumerate(pairwise(self._cuts))
        ]

    def locations(self, start: int, stop: int) -> Ints:
        """The locations of samples ``start`` .. ``stop`` - 1 of the training.

        Returns:
            (stop - start, 2): shard number, and row in the shard's table.
        """
        if len(self._streams) == 1:
            return self._streams[0].locations(start, stop)
        parts = [np.empty((0, 2), dtype=np.int64)]
        for batch in range(start // self._batch_size, -(-stop // self._batch_size)):
            first = batch * self._batch_size
            for stream, (low, high) in zip(self._streams, pairwise(self._cuts), strict=True):
                begin, end = (min(max(sample - first, low), high) - low for sample in (start, stop))
                if begin < end:
                    before = batch * (high - low)
                    parts.append(stream.locations(before + begin, before + end))
        return np.concatenate(parts)

    def _shuffle(self, epoch: int) -> Ints:
        """The visits of an epoch in shuffled order; see ``Mixture.visits``."""
        visits = self.mixture.visits(epoch)
        return visits[np.random.default_rng((self._seed, epoch)).permutation(len(visits))]


class _Stream:
    """The samples that every batch takes from one run of each epoch's shuffled shards.

    Args:
        mixture: The shards of an epoch.
        shuffle: The visits of an epoch in shuffled order.
        seed: Seed of the order.
        number: Number of the stream.
        cuts: Its first sample of a batch, and the sample after its last.
        batch_size: Samples of a batch.
        window_rows: Rows of a window.
    """

    def __init__(
        self,
        mixture: Mixture,
        shuffle: Callable[[int], Ints],
        seed: int,
        number: int,
        cuts: tuple[int, int],
        batch_size: int,
        window_rows: int,
    ) -> None:
        self._mixture, self._shuffle, self._seed, self._number = mixture, shuffle, seed, number
        self._cuts, self._batch_size, self._window_rows = cuts, batch_size, window_rows
        # A batch that crosses a border uses two epochs or two windows.
        self._windows = lru_cache(maxsize=2)(self._plan_epoch)
        self._permutation = lru_cache(maxsize=2)(self._shuffle_window)

    def locations(self, start: int, stop: int) -> Ints:
        """The locations of its samples ``start`` .. ``stop`` - 1, (stop - start, 2): shard number, row in its table."""
        locations = np.empty((stop - start, 2), dtype=np.int64)
        position = start
        while position < stop:
            epoch = self._epoch_of(position)
            offset = position - self._start(epoch)
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

    def _below(self, samples: int) -> tuple[int, int]:
        """Of so many samples of all streams: those of the streams before it, and those of it and of these."""
        low, high = self._cuts
        return samples * low // self._batch_size, samples * high // self._batch_size

    def _start(self, epoch: int) -> int:
        """Its samples before an epoch."""
        low, high = self._below(self._mixture.start(epoch))
        return high - low

    def _epoch_of(self, position: int) -> int:
        low, high = self._cuts
        # Its epochs begin up to one sample earlier or later than their share of all samples does.
        epoch = max(0, self._mixture.epoch_of(position * self._batch_size // (high - low)) - 1)
        while self._start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _visits(self, epoch: int) -> Ints:
        """What it visits in an epoch; a shard at its border is divided with the stream beside it."""
        visits = self._shuffle(epoch)
        (low, high), (next_low, next_high) = (self._below(self._mixture.start(number)) for number in (epoch, epoch + 1))
        first, last = next_low - low, next_high - high
        stops = np.cumsum(visits[:, 2])
        starts = stops - visits[:, 2]
        begins, ends = np.clip(first - starts, 0, visits[:, 2]), np.clip(last - starts, 0, visits[:, 2])
        visits = visits.copy()
        visits[:, 1] += begins
        visits[:, 2] = ends - begins
        return visits

    def _plan_epoch(self, epoch: int) -> list[_Window]:
        visits = self._visits(epoch)
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
        parts = {place: self._mixture.part(visit) for place, visit in enumerate(visits)}
        return _Window(visits, starts, first, {place: rows for place, rows in parts.items() if rows is not None})

    def _shuffle_window(self, epoch: int, number: int) -> Ints:
        of_stream = (self._number,) if self._number else ()
        rng = np.random.default_rng((self._seed, epoch, number, 1, *of_stream))
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
