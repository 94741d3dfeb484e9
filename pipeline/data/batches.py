"""Batches of one worker in the planned order, starting at any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import Batch
from pipeline.data.order import SampleOrder, Share
from pipeline.data.samples import Samples
from pipeline.errors import DataError

PREFETCH_BYTES = 256 << 20
"""Batches are read ahead up to this size, at least two and at most 16: enough to ride out a slow one."""
_MOST_AHEAD = 16
_THREADS = 2
"""Threads that read ahead, a batch each: while one copies vectors, which leaves the GIL, the other makes texts."""
_AHEAD_STEPS = 32
"""Steps by which a shard is opened before its first row, one a step: a new window has many shards. In steps of large
batches it is a window: shards of the one after the next would displace those that are read first."""


def iterate_batches(
    samples: Samples, order: SampleOrder, share: Share, start_step: int, *, prefetch: bool = False
) -> Generator[Batch]:
    """Yield this worker's batches of steps ``start_step``, ``start_step`` + 1, ... without end.

    Args:
        samples: The rows.
        order: Their planned order.
        share: This worker's part of each batch.
        start_step: First step, 0-based.
        prefetch: Read ahead in threads.
    """
    ahead_steps = max(1, min(_AHEAD_STEPS, samples.window_rows // share.batch_size))

    @lru_cache(2 * _AHEAD_STEPS)  # each is asked for when its shards are opened, and when it is read
    def locations(step: int) -> NDArray[np.int64]:
        first = step * share.batch_size
        return order.locations(first + share.start, first + share.stop)

    def read(step: int) -> Batch:
        batch = samples.batch(locations(step))
        samples.open_one(locations(step + ahead_steps))
        return batch

    step = start_step
    if not prefetch:
        while True:
            yield read(step)
            step += 1
    with ThreadPoolExecutor(_THREADS) as threads:
        first = read(step)
        num_ahead = max(2, min(_MOST_AHEAD, PREFETCH_BYTES // max(1, first.num_bytes)))
        ahead = deque(threads.submit(read, step + 1 + i) for i in range(num_ahead))
        yield first
        while True:
            yield ahead.popleft().result()
            ahead.append(threads.submit(read, step + 1 + num_ahead))
            step += 1


def plan_order(samples: Samples, seed: int, *, where: str, batch_size: int = 1) -> SampleOrder:
    """Plan the order of a training's samples; only with several streams it depends on the size of the global batch.

    Raises:
        DataError: If there are no samples, or too few for the streams.
    """
    if samples.num_rows == 0:
        raise DataError(
            f"{where}: no row to train on in {len(samples.reader.shards)} shards; look at the download's counts"
        )
    reader = samples.reader
    try:
        return SampleOrder(
            reader.shard_rows,
            seed,
            window_rows=samples.window_rows,
            shard_lists=reader.shard_lists,
            weights=samples.weights,
            num_streams=samples.num_streams,
            batch_size=batch_size,
        )
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
